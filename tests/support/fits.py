"""A short fit in a plain `pl.Trainer`, and a small language model to fit."""

import pytorch_lightning as pl
import torch
import transformers
from toy import loader


def fit(module, *techniques, steps=3, data=None, **options):
    """Train on the CPU; the losses that Lightning saw."""
    seen = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(outputs["loss"]))

    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False, limit_val_batches=0,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[*techniques, Losses()], **options,
    )  # fmt: skip
    torch.manual_seed(3)
    trainer.fit(module, data if data is not None else loader(generator=torch.Generator().manual_seed(5)))
    return seen


def llama(layers=2, hidden=16, attention="sdpa"):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(layers)
    return transformers.LlamaForCausalLM(config)


class Language(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**{k: v for k, v in batch.items() if k != "loss_weight"}).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
