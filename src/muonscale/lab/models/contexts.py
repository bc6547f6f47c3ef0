"""Context managers: quiet transformers, seeded random numbers, evaluation mode."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Hide the progress bars and warnings of transformers inside the block."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def seed_rng(seed: int, device: torch.device | str = "cpu") -> Generator[None]:
    """Seed the random numbers of the CPU and of `device` in the block; restore them after."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else 0
    with torch.random.fork_rng(devices=[index] if on_gpu else []):
        # torch.manual_seed would also seed every other GPU, which the fork does not restore.
        torch.random.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Put a model into evaluation mode without gradients in the block; restore its mode after."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: tensors that FSDP gathers within it cannot be used in training again.
        with torch.no_grad():
            yield
    finally:
        model.train(training)
