"""Accelerate with FSDP2: torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py FOLDER
With --resume it goes on from step 20 of 40, on any number of processes."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import LlamaConfig, LlamaForCausalLM

from muonscale import Muon, parameter_groups

text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # its bytes are the tokens
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    state_dict_type="SHARDED_STATE_DICT",
)
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
losses = []
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
# In one call: it shards the model and puts the sharded parameters into the optimizer's groups.
model, optimizer = accelerator.prepare(model, Muon(parameter_groups(model, lr=3e-3)))
if resumed := "--resume" in sys.argv:
    accelerator.load_state(sys.argv[1])
for step in range(20 if resumed else 0, 40):
    if step == 20 and not resumed:
        accelerator.save_state(sys.argv[1])
    ids = text[1024 * step : 1024 * (step + 1)].view(16, 64)
    ids = ids.chunk(accelerator.num_processes)[accelerator.process_index]
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
accelerator.print("loss", losses[0], "->", losses[-1])
