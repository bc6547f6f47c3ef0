"""DistributedDataParallel; each rank keeps its share of the optimizer's state (ZeRO-1).

torchrun --nproc-per-node 2 examples/ddp.py checkpoint.pt           # saves after 20 of 40 steps
torchrun --nproc-per-node 2 examples/ddp.py checkpoint.pt --resume  # goes on from there
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from muonscale import Muon, parameter_groups

dist.init_process_group("gloo")
text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # its bytes are the tokens
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
model, losses = DistributedDataParallel(model), []
optimizer = Muon(parameter_groups(model, lr=3e-3), process_group=dist.group.WORLD)
if resumed := "--resume" in sys.argv:
    saved = torch.load(sys.argv[1])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
for step in range(20 if resumed else 0, 40):
    if step == 20 and not resumed:
        saved = {"model": model.state_dict(), "optimizer": optimizer.full_state_dict()}
        if dist.get_rank() == 0:  # full_state_dict gathers, so that all ranks call it
            torch.save(saved, sys.argv[1])
    ids = text[1024 * step : 1024 * (step + 1)].view(2, 8, 64)[dist.get_rank()]
    losses.append(model(input_ids=ids, labels=ids).loss)
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
print(f"loss {losses[0].item()} -> {losses[-1].item()} on rank {dist.get_rank()}\n", end="")
dist.destroy_process_group()
