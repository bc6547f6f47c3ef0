"""The Hugging Face Trainer makes Muon, saves and resumes.

python examples/hf_trainer.py folder           # saves after 20 of 40 steps
python examples/hf_trainer.py folder --resume  # goes on from there
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from muonscale import MuonFactory

text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # its bytes are the tokens
dataset = [{"input_ids": ids, "labels": ids} for ids in text[:40960].view(-1, 64)]
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
set_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
arguments = TrainingArguments(
    sys.argv[1],
    max_steps=40,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    lr_scheduler_type="cosine",
    warmup_steps=4,
    save_steps=20,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
options = {"lr": 3e-3, "weight_decay": 0.1}  # those of TrainingArguments are AdamW's and not used
trainer = Trainer(
    model, arguments, train_dataset=dataset, optimizer_cls_and_kwargs=(MuonFactory, options)
)
checkpoint = str(Path(sys.argv[1]) / "checkpoint-20") if "--resume" in sys.argv else None
trainer.train(resume_from_checkpoint=checkpoint)
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
print("loss", losses[0], "->", losses[-1])
