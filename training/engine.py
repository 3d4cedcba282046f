"""The one place where techniques are composed: adapters, precision, checkpointing, placement, in this order."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lora import add_lora, check_saved_lora, load_lora, save_lora


@dataclass
class LoraEngine:
    """A frozen transformer in the compute dtype with a trainable fp32 adapter."""

    transformer: nn.Module
    pipeline_class: type
    params: list[nn.Parameter] = field(default_factory=list)

    def save(self, directory: Path) -> Path:
        """Write what was trained, in the form that diffusers loads."""
        return save_lora(self.transformer, directory, self.pipeline_class)

    def load(self, directory: Path) -> None:
        load_lora(self.transformer, directory)

    def check(self, directory: Path) -> None:
        """Raise unless the files in `directory`, loaded by diffusers, equal what was trained."""
        check_saved_lora(self.transformer, directory)

    @contextlib.contextmanager
    def inference(self):
        """The transformer as a pipeline needs it; back in training mode afterwards."""
        self.transformer.eval()
        try:
            with torch.no_grad():
                yield self.transformer
        finally:
            self.transformer.train()


def build_lora_engine_from_args(args, transformer: nn.Module, pipeline_class, device: torch.device, seed: int):
    """`transformer`, frozen and on the CPU, made ready to train on `device`."""
    params = add_lora(transformer, args.rank, args.lora_alpha, seed)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.to(device).train()
    return LoraEngine(transformer, pipeline_class, params)
