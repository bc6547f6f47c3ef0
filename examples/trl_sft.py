"""TRL's SFTTrainer, with a tokenizer trained here: python examples/trl_sft.py FOLDER"""

import sys

import tokenizers as tok
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from muonscale import Muon, parameter_groups

sums = [(a, b) for a in range(20) for b in range(20)]
prompts = [f"What is {a} plus {b} ?" for a, b in sums]
dataset = Dataset.from_dict({"prompt": prompts, "completion": [f" It is {a + b}" for a, b in sums]})
words = tok.Tokenizer(tok.models.WordLevel(unk_token="?"))
words.pre_tokenizer = tok.pre_tokenizers.Whitespace()
special = tok.trainers.WordLevelTrainer(special_tokens=["</s>", "?"])
words.train_from_iterator([*prompts, *dataset["completion"]], special)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
set_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_attention_heads=4, **sizes))
optimizer = Muon(parameter_groups(model, lr=3e-3, weight_decay=0.1))
arguments = SFTConfig(
    sys.argv[1],
    max_steps=40,
    lr_scheduler_type="cosine",  # of the learning rate that the optimizer was given
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
options = {"processing_class": tokenizer, "optimizers": (optimizer, None)}
trainer = SFTTrainer(model, arguments, train_dataset=dataset, **options)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
print("loss", losses[0], "->", losses[-1])
