"""Adapters in, adapters out: low-rank adaptation (arXiv 2106.09685) by peft, in files that diffusers loads."""

import json
import os
import warnings
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from draws import draw_seed
from errors import UsageError


TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights(folder) looks for
ADAPTER = "default"  # peft's name for the trained adapter
PREFIX = "transformer."  # diffusers' name for the adapted part of the pipeline


class ComputeDtypeLinear(nn.Linear):
    """A linear layer whose fp32 weight is cast to the input's dtype: the arithmetic that inference does.

    peft would cast the input up instead: for a bf16 model 4 fp32 copies of the hidden states a block.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype))


def add_lora(transformer: nn.Module, rank: int, alpha: float, seed: int) -> list[nn.Parameter]:
    """Add a trainable fp32 adapter on q, k, v and out of every attention; returns its weights in a fixed order.

    A is drawn on the CPU from (seed, "lora_init"), B is zero: the model is unchanged before the first update.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGET_MODULES), init_lora_weights=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(seed, "lora_init"))
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for linear in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
                linear.__class__ = ComputeDtypeLinear
                linear.weight.data = linear.weight.data.float()
    return [param for param in transformer.parameters() if param.requires_grad]


def save_lora(transformer: nn.Module, directory: Path, pipeline_class, facts: dict | None = None) -> Path:
    """Write the adapter with alpha and rank in its metadata, so that `load_lora_weights(directory)` alone restores it.

    `facts`, what else inference must know, goes into the metadata's "training" entry, which diffusers leaves alone.

    Never `.alpha` tensors beside metadata: diffusers refuses both. Equal runs write equal bytes. Written beside
    and renamed: a reader sees the old file or the new one.
    """
    metadata = {key: plain(value) for key, value in transformer.peft_config[ADAPTER].to_dict().items()}
    temporary_name = f".{os.getpid()}-{WEIGHTS_NAME}"
    pipeline_class.save_lora_weights(
        save_directory=directory,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
        transformer_lora_adapter_metadata=metadata,
        weight_name=temporary_name,
    )
    temporary = Path(directory, temporary_name)
    finish_header(temporary, {"training": json.dumps(facts, sort_keys=True)} if facts else {})
    return temporary.replace(Path(directory, WEIGHTS_NAME))


def plain(value):
    """JSON for a value of peft's configuration; sets in order, since their own order changes with PYTHONHASHSEED."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if hasattr(value, "value") else value


def finish_header(path: Path, more_metadata: dict[str, str]) -> None:
    """Add to a safetensors file's metadata and sort the keys of its header: the library writes them in random order."""
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:header_end])
    header["__metadata__"] |= more_metadata
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    path.unlink()  # the library makes files that only their owner can read
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + content[header_end:])
        file.flush()
        os.fsync(file.fileno())


def load_lora(transformer: nn.Module, directory: Path) -> None:
    """Load a saved adapter into the trained one, bit for bit; any missing, unexpected or misshapen key is an error."""
    path = Path(directory, WEIGHTS_NAME)
    try:
        saved = {key.removeprefix(PREFIX): value for key, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: not readable as a LoRA file ({error})") from error
    current = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    differing = sorted(current.keys() ^ saved.keys())
    differing += [key for key in current if key in saved and saved[key].shape != current[key].shape]
    if differing:
        raise UsageError(
            f"{path}: does not fit this model and rank, {len(differing)} keys differ, e.g. {differing[0]}"
        )
    set_peft_model_state_dict(transformer, saved, adapter_name=ADAPTER)


def check_saved_lora(transformer: nn.Module, directory: Path) -> None:
    """Load the file as diffusers does, as a second adapter of the same transformer, and compare it with the trained one.

    Never a second model in memory. An inequality is a defect of the toolkit, not of the user's input.
    """
    check = "saved"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second adapter
        transformer.load_lora_adapter(directory, weight_name=WEIGHTS_NAME, adapter_name=check, prefix="transformer")
    try:
        for name, module in transformer.named_modules():
            if isinstance(module, LoraLayer):
                for part in (module.lora_A, module.lora_B):
                    loaded = part[check].weight
                    if not torch.equal(loaded, part[ADAPTER].weight.to(loaded.dtype)):
                        raise RuntimeError(f"{directory}: {name} differs after saving")
                if module.scaling[check] != module.scaling[ADAPTER]:
                    raise RuntimeError(f"{directory}: {name} is scaled differently after saving")
    finally:
        transformer.set_adapter(ADAPTER)
        transformer.delete_adapters(check)
