"""LoRA files: written so that every reader applies the trained strength, and read in all common layouts.

Readers add s * B @ A to a weight. diffusers reads s from the metadata since 0.34; earlier releases and most other
tools ignore it and take 1. So B is written times its scaling, and the metadata says 1 as well: alpha is the rank. Of
peft's config, the file holds nine settings, which peft 0.18 and newer know: an unknown one is a TypeError there.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from base import tensor_file
from base.errors import UsageError
from base.file_kinds import placeholder
from base.files import written_beside


WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # what load_lora_weights(folder) looks for
PEFT_NAME, PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"  # peft's own
PREFIX = "transformer."  # diffusers' name for the adapted part of the pipeline
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps peft's config, as JSON
TRAINING_KEY = "training"  # where this toolkit keeps the inference notes, and the flags in RECORDED
RECORDED = ("lora_alpha", "use_rslora")  # as trained, if the scaling was not 1: --init_lora compares them

PEFT_PREFIX, COMFYUI_PREFIX, KOHYA_PREFIX = "base_model.model.", "diffusion_model.", "lora_unet__"
# Modules that ComfyUI names differently from diffusers; all others have the same name in both
COMFYUI_MODULES = (
    ("transformer_blocks.", "blocks."),
    (".attn1.to_q", ".q"),
    (".attn1.to_k", ".k"),
    (".attn1.to_v", ".v"),
    (".attn1.to_out.0", ".attn_out"),
    (".ff.net.0.proj", ".ff_proj"),
    (".ff.net.2", ".ff_out"),
    ("time_embedding.", "time_embedding_"),
    ("ofs_embedding.", "ofs_embedding_"),
)
PARTS = {
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "alpha": "alpha",
}
ALIGNMENT = 64  # bytes; diffusers computes on the mapped file, and a CPU rounds differently if that is misaligned


class LoraFile(NamedTuple):
    """Contents of a LoRA file, under diffusers' names of the layers."""

    tensors: dict[str, torch.Tensor]  # by peft's keys: <layer>.lora_A.weight and so on
    alphas: dict[str, float]  # by layer, if the file has tensors for it
    config: dict  # peft's, empty if the file has none
    inference_notes: dict  # what inference must do as training did
    recorded: dict  # RECORDED


# ---------------------------------------------------------------- names


def comfyui_module(module: str) -> str:
    """ComfyUI's name for a module that diffusers calls `module`."""
    for theirs, ours in COMFYUI_MODULES:
        module = module.replace(theirs, ours)
    return module


def kohya_module(module: str) -> str:
    """The name in files of kohya's sd-scripts; with two underscores, as VideoX-Fun's own trainer writes it."""
    return KOHYA_PREFIX + module.replace(".", "_")


def peft_key(key: str, modules: dict[str, str]) -> tuple[str, str | None]:
    """(layer, part) of a key in any layout; `modules` maps the other layouts' names to diffusers'.

    (key, None) for anything that is not part of a LoRA.
    """
    for prefix in (PEFT_PREFIX, PREFIX, COMFYUI_PREFIX):
        key = key.removeprefix(prefix)
    layer, *rest = re.split(r"\.(?=lora_|alpha$)", key, maxsplit=1)
    part = PARTS.get("".join(rest).replace(".default", ""))
    layer = re.sub(r"^lora_(unet|transformer)_+", KOHYA_PREFIX, layer)
    return (modules.get(layer, layer), part) if part else (key, None)


# ---------------------------------------------------------------- reading


def find_file(path: Path) -> Path:
    """`path`, or the LoRA file in that folder: a run's, or one written by peft's save_pretrained."""
    if not path.is_dir():
        return path
    is_peft = (path / PEFT_NAME).exists() and not (path / WEIGHTS_NAME).exists()
    return path / (PEFT_NAME if is_peft else WEIGHTS_NAME)


def read_lora(path: Path, modules: Iterable[str] = ()) -> LoraFile:
    """Read a LoRA file, and the config that peft writes beside its own.

    `modules`, the transformer's, are needed for layouts with other names.
    """
    names = {form(module): module for module in modules for form in (kohya_module, comfyui_module)}
    tensors, alphas = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                layer, part = peft_key(key, names)
                if part == "alpha":
                    alphas[layer] = float(file.get_tensor(key))
                else:
                    tensors[f"{layer}.{part}" if part else key] = file.get_tensor(key)
            is_peft = any(key.startswith(PEFT_PREFIX) for key in file.keys())  # noqa: SIM118
        config = dict(json.loads(metadata.get(METADATA_KEY, "{}")))
        if is_peft and (beside := path.with_name(PEFT_CONFIG_NAME)).exists():
            config = dict(json.loads(beside.read_text(encoding="utf-8")))
        inference_notes = dict(json.loads(metadata.get(TRAINING_KEY, "{}")))
        config = {key.removeprefix(PREFIX): value for key, value in config.items()}
        recorded = {name: inference_notes.pop(name) for name in RECORDED if name in inference_notes}
        named = [values["lora_alpha"] for values in (config, recorded) if "lora_alpha" in values]
        if not all(math.isfinite(alpha) for alpha in (*alphas.values(), *named)):
            raise ValueError("its alpha is not finite")
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = placeholder(path) if path.is_file() else None
        raise UsageError(f"{path}: {reason or f'not readable as a LoRA file ({error})'}") from error
    return LoraFile(tensors, alphas, config, inference_notes, recorded)


def rank_and_alpha(file: LoraFile, path: Path) -> tuple[int, float]:
    """(rank, alpha) of the file. Without metadata and `.alpha` tensors, alpha is the rank, as in diffusers."""
    ranks = {tensor.shape[0] for key, tensor in file.tensors.items() if key.endswith(".lora_A.weight")}
    alphas = {file.alphas.get(layer, file.config.get("lora_alpha")) for layer in layers_in(file)}
    if len(ranks) != 1 or len(alphas) != 1 or file.config.get("rank_pattern") or file.config.get("alpha_pattern"):
        raise UsageError(f"{path}: must be a LoRA file with one rank and one alpha for all layers")
    (rank,), (alpha,) = ranks, alphas
    return rank, rank if alpha is None else alpha


def scaling_of(file: LoraFile, path: Path) -> float:
    """The factor that a reader of this layout applies to B @ A."""
    rank, alpha = rank_and_alpha(file, path)
    return alpha / (math.sqrt(rank) if file.config.get("use_rslora") and not file.alphas else rank)


def layers_in(file: LoraFile) -> set[str]:
    return {key.removesuffix(".lora_A.weight") for key in file.tensors if key.endswith(".lora_A.weight")}


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """In fp32; as is for a factor of 1. Exact for powers of two, otherwise rounded once."""
    return tensor if factor == 1 else tensor.float() * factor


# ---------------------------------------------------------------- writing


def lora_metadata(config, inference_notes: dict, prefix: str) -> dict[str, str]:
    """Metadata for a file whose B is scaled already. `config`: peft's, as trained."""
    settings = {
        "r": config.r,
        "lora_alpha": config.r,
        "target_modules": sorted(config.target_modules),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": config.use_dora,
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
    }
    recorded = {name: getattr(config, name) for name in RECORDED}
    if all(recorded[name] == settings[name] for name in RECORDED):
        recorded = {}
    settings = {prefix + name: value for name, value in settings.items()}
    return {"format": "pt", METADATA_KEY: json.dumps(settings, sort_keys=True)} | training_entry(
        inference_notes | recorded
    )


def training_entry(inference_notes: dict) -> dict[str, str]:
    return {TRAINING_KEY: json.dumps(inference_notes, sort_keys=True)} if inference_notes else {}


def write_tensors(
    path: Path,
    sizes: tensor_file.Sizes,
    tensor_of: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
) -> None:
    """Write tensors of these dtypes and shapes, requested one by one; equal content gives equal bytes."""
    header = tensor_file.encoded(tensor_file.describe(sizes, metadata), ALIGNMENT, sort_keys=True)
    with written_beside(path, durable=True) as temporary:
        tensor_file.write_file(temporary, header, sizes, tensor_of)
