"""Lightning, with a schedule and clipping: python examples/lightning_module.py FOLDER
With --resume it goes on from the end of the first of two epochs."""

import sys
from pathlib import Path

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from muonscale import Muon, parameter_groups

text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # its bytes are the tokens
sizes, losses = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}, []


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = Muon(parameter_groups(self, lr=3e-3))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


lightning.seed_everything(0)
saving = lightning.pytorch.callbacks.ModelCheckpoint(sys.argv[1], "{epoch}", save_top_k=-1)
trainer = lightning.Trainer(
    max_epochs=2, gradient_clip_val=1.0, accelerator="cpu", logger=False, callbacks=saving
)
batches = torch.utils.data.DataLoader(text[:20480].view(-1, 64), batch_size=16)
start = f"{sys.argv[1]}/epoch=0.ckpt" if "--resume" in sys.argv else None
trainer.fit(Model(), batches, ckpt_path=start)
print("loss", losses[0], "->", losses[-1])
