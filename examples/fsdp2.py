"""FSDP2 and its checkpoints: torchrun --nproc-per-node 2 examples/fsdp2.py FOLDER
With --resume it goes on from step 20 of 40, on any number of processes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from muonscale import Muon, parameter_groups

dist.init_process_group("gloo")
text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # its bytes are the tokens
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
for module in [*model.model.layers, model]:
    fully_shard(module)
optimizer = Muon(parameter_groups(model, lr=3e-3))  # after the parameters are sharded
losses, resumed = [], "--resume" in sys.argv
parts = "model_state_dict", "optim_state_dict"
if resumed:
    state = dict(zip(parts, get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=sys.argv[1])
    set_state_dict(model, optimizer, **state)
for step in range(20 if resumed else 0, 40):
    if step == 20 and not resumed:
        state = dict(zip(parts, get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=sys.argv[1])
    ids = text[1024 * step : 1024 * (step + 1)].view(16, 64)
    ids = ids.chunk(dist.get_world_size())[dist.get_rank()]
    losses.append(model(input_ids=ids, labels=ids).loss)
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
print(f"loss {losses[0].item()} -> {losses[-1].item()} on rank {dist.get_rank()}\n", end="")
