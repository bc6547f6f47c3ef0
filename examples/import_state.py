"""Going on from a checkpoint of another Muon optimizer: python examples/import_state.py"""

from pathlib import Path

import torch
from torch import nn

from muonscale import Muon, convert_state_dict, parameter_groups
from muonscale.optim.migrate.convert_state import join_state_dicts

text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # its bytes are the tokens
torch.manual_seed(0)
layers = [nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Tanh()]
model = nn.Sequential(nn.Embedding(256, 64), *layers, nn.Linear(64, 256, bias=False))
losses: list[torch.Tensor] = []


def train(*optimizers: torch.optim.Optimizer) -> None:
    for _ in range(50):
        ids = text[torch.randint(len(text) - 1, (1024, 1)) + torch.arange(2)]
        losses.append(nn.functional.cross_entropy(model(ids[:, 0]), ids[:, 1]))
        losses[-1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


matrices = [(name, p) for name, p in model.named_parameters() if name in ("1.weight", "3.weight")]
others = [(name, p) for name, p in model.named_parameters() if name in ("0.weight", "5.weight")]
muon = torch.optim.Muon([p for _, p in matrices], lr=3e-3, adjust_lr_fn="match_rms_adamw")
adamw = torch.optim.AdamW([p for _, p in others], lr=3e-3)
train(muon, adamw)
# Also "keller", "keller_2024", "moonlight" and "normuon".
old_muon = convert_state_dict(muon.state_dict(), matrices, "torch")
old_adamw = convert_state_dict(adamw.state_dict(), others, "torch")
optimizer = Muon(parameter_groups(model, lr=3e-3))
optimizer.load_state_dict(join_state_dicts([old_muon, old_adamw]))
train(optimizer)
print("loss", losses[0].item(), "->", losses[49].item(), "->", losses[-1].item())
