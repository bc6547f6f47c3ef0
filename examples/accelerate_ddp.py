"""Accelerate with DDP: torchrun --nproc-per-node 2 examples/accelerate_ddp.py FOLDER
With --resume it goes on from batch 40 of 80; two batches are a step."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from muonscale import Muon, parameter_groups

text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # its bytes are the tokens
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
optimizer = Muon(parameter_groups(model, lr=3e-3))
# Accelerate moves the schedule on once for each process.
schedule = get_scheduler("cosine", optimizer, num_warmup_steps=8, num_training_steps=80)
batches = torch.utils.data.DataLoader(text[:40960].view(-1, 64), batch_size=4)
model, optimizer, schedule, batches = accelerator.prepare(model, optimizer, schedule, batches)
losses, resumed = [], "--resume" in sys.argv
if resumed:
    accelerator.load_state(sys.argv[1])
    batches = accelerator.skip_first_batches(batches, 40)
for number, ids in enumerate(batches, start=40 if resumed else 0):
    if number == 40 and not resumed:
        accelerator.save_state(sys.argv[1])
    with accelerator.accumulate(model):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
accelerator.print("loss", losses[0], "->", losses[-1])
accelerator.end_training()
