"""Muon in a plain loop; needs torch alone: python examples/plain_pytorch.py"""

from pathlib import Path

import torch
from torch import Tensor, nn

from muonscale import Muon, grouping_report, parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, 64), nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.layers(self.tokens(ids) + self.positions.weight, mask))


text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # its bytes are the tokens
torch.manual_seed(0)
model, losses = Model(), []
optimizer = Muon(parameter_groups(model, lr=3e-3, weight_decay=0.1))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
print(grouping_report(optimizer.param_groups, model).summary())
for _ in range(100):
    ids = text[torch.randint(len(text) - 64, (16, 1)) + torch.arange(65)]
    loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
print("loss", losses[0], "->", losses[-1])
