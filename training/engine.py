"""The one place where techniques are composed: what is trained, precision, checkpointing, placement, in this order.

Both engines answer alike: `params` (fp32, what the optimizer holds), `copies` (their images in the model, where those
are others), `save` and `check` (the result), `save_state` and `load_state` (what a run goes on from), `inference`.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from errors import UsageError
from lora import add_lora, check_saved_lora, load_lora, save_lora
from sft import add_masters, check_saved_transformer, load_masters, save_masters, save_transformer


SAVE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BYTES_PER_WEIGHT = 4 + 4 + 8  # fp32 weight, gradient, and Adam's two moments; the model's copy comes on top


@dataclass
class Engine:
    transformer: nn.Module
    params: list[nn.Parameter]
    facts: dict  # what inference must do as training did, beyond a plain load; written beside the result

    @contextlib.contextmanager
    def inference(self):
        """The transformer as a pipeline needs it; back in training mode afterwards."""
        self.transformer.eval()
        try:
            with torch.no_grad():
                yield self.transformer
        finally:
            self.transformer.train()


@dataclass
class LoraEngine(Engine):
    """A frozen transformer in the compute dtype with a trainable fp32 adapter."""

    pipeline_class: type
    copies = None

    def save(self, directory: Path) -> Path:
        return save_lora(self.transformer, directory, self.pipeline_class, self.facts)

    def check(self, directory: Path) -> None:
        check_saved_lora(self.transformer, directory)

    def save_state(self, directory: Path) -> None:
        self.save(directory)

    def load_state(self, directory: Path) -> None:
        load_lora(self.transformer, directory)


@dataclass
class SftEngine(Engine):
    """A transformer in the compute dtype whose every weight is trained on an fp32 master."""

    save_dtype: torch.dtype
    copies: list[nn.Parameter] | None

    def save(self, directory: Path) -> Path:
        return save_transformer(self.transformer, self.params, self.save_dtype, directory, self.facts)

    def check(self, directory: Path) -> None:
        check_saved_transformer(self.transformer, self.params, self.save_dtype, directory)

    def save_state(self, directory: Path) -> None:
        self.save(directory)
        save_masters(self.transformer, self.params, directory)

    def load_state(self, directory: Path) -> None:
        load_masters(self.transformer, self.params, directory)


def build_lora_engine_from_args(
    args, transformer: nn.Module, pipeline_class, device: torch.device, seed: int
) -> LoraEngine:
    """`transformer`, on the CPU in the compute dtype and frozen, made ready to train a LoRA on `device`."""
    params = add_lora(transformer, args.rank, args.lora_alpha, seed)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.to(device).train()
    return LoraEngine(transformer, params, inference_facts_from_args(args), pipeline_class)


def build_sft_engine_from_args(
    args, transformer: nn.Module, dtype: torch.dtype, stored_dtype: torch.dtype, device: torch.device
) -> SftEngine:
    """`transformer`, on the CPU in fp32, made ready to train all its weights on `device`, computing in `dtype`.

    The masters start from the stored weights, not from their rounding to `dtype`.
    """
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    save_dtype = SAVE_DTYPES[args.save_dtype] if args.save_dtype else stored_dtype
    facts = inference_facts_from_args(args)
    if dtype == torch.float32:
        params = list(transformer.requires_grad_(True).to(device).train().parameters())
        return SftEngine(transformer, params, facts, save_dtype, copies=None)
    masters = add_masters(transformer, device)
    nn.Module.to(transformer, device, dtype).train()  # diffusers' own .to() warns of modules that it has none of here
    return SftEngine(transformer, masters, facts, save_dtype, copies=list(transformer.parameters()))


def inference_facts_from_args(args) -> dict:
    """Choices of image-to-video training that a stock pipeline does not know of; empty for the defaults."""
    facts = {}
    if args.drop_learned_positions:
        facts["drop_learned_positions"] = True
    if args.image_latent_scale != "pipeline":
        facts["image_latent_scale"] = args.image_latent_scale
    return facts


def check_sft_fits(num_weights: float, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse, before anything is loaded, what the device cannot hold even without activations."""
    if device.type != "cuda":
        return
    copy_bytes = 0 if dtype == torch.float32 else dtype.itemsize
    needed = num_weights * (BYTES_PER_WEIGHT + copy_bytes) / 2**30
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    if needed > free:
        raise UsageError(
            f"full fine-tuning of {num_weights / 1e9:.1f} billion weights needs {needed:.0f} GiB for fp32 weights, "
            f"gradients and optimizer states, and {free:.0f} GiB are free on the GPU; train a LoRA, or a smaller model"
        )
