"""The trained LoRA in further forms, made from its file: no model is loaded, one weight at a time is in memory.

ComfyUI's layout, as its own code reads it (Comfy-Org/ComfyUI): comfy/lora.py maps `diffusion_model.<module>` to every
weight of a model; comfy/weight_adapter/lora.py takes `.lora_up.weight` [out, rank], `.lora_down.weight` [rank, in] and
`.alpha` from there and adds strength * alpha / rank * up @ down; comfy/ldm/cogvideo/model.py names the modules.
kijai's ComfyUI-CogVideoXWrapper keeps diffusers' names: it loads the LoRA's own file, by load_lora_weights.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from durable import flush_descriptor, rename
from errors import UsageError
from lora import METADATA_KEY, PREFIX, WEIGHTS_NAME
from runtime import write_json
from sft import SUBFOLDER


COMFYUI_NAME = "pytorch_lora_weights_comfyui.safetensors"
COMFYUI_PREFIX = "diffusion_model."
# Modules that ComfyUI calls otherwise than diffusers; all the rest have one name in both
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
BASE_NAME = "diffusion_pytorch_model"  # diffusers' name of a model's weight files
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class LoraWeights(NamedTuple):
    """One layer's adapter. `magnitude` [out] is DoRA's length of every weight row."""

    down: torch.Tensor  # A [rank, in], of a convolution [rank, in, h, w]
    up: torch.Tensor  # B [out, rank], of a convolution [out, rank, 1, 1]
    scaling: float
    magnitude: torch.Tensor | None = None


def export_lora_from_args(args, base_dir: Path, variant: str | None, only_missing: bool = False) -> None:
    """What --export asks for, beside the LoRA in output_dir. `base_dir` holds the transformer that it was trained on."""
    output_dir = Path(args.output_dir)
    if "comfyui" in args.export and not (only_missing and (output_dir / COMFYUI_NAME).exists()):
        export_comfyui(output_dir / WEIGHTS_NAME, output_dir / COMFYUI_NAME)
    if "merged" in args.export and not (only_missing and (output_dir / SUBFOLDER).exists()):
        merge_lora(output_dir / WEIGHTS_NAME, base_dir, output_dir / SUBFOLDER, variant)


def read_lora(path: Path) -> tuple[dict[str, LoraWeights], dict]:
    """(weights by the name of their module, what training noted for inference) of a LoRA's file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(metadata[METADATA_KEY])
    alpha, use_rslora = config[f"{PREFIX}lora_alpha"], config[f"{PREFIX}use_rslora"]
    layers = {}
    for module in sorted({name.split(".lora_")[0] for name in tensors}):
        down, up = (tensors.pop(f"{module}.lora_{part}.weight").float() for part in "AB")
        scaling = alpha / (math.sqrt(down.shape[0]) if use_rslora else down.shape[0])
        layers[module] = LoraWeights(down, up, scaling, tensors.pop(f"{module}.lora_magnitude_vector", None))
    if tensors:
        raise RuntimeError(f"{path}: {len(tensors)} tensors have no place in an export, e.g. {sorted(tensors)[0]}")
    return layers, json.loads(metadata.get("training", "{}"))


# ---------------------------------------------------------------- ComfyUI


def export_comfyui(lora_path: Path, target: Path) -> None:
    """Write the LoRA as ComfyUI reads it: strength 1.0 is what was trained, whatever alpha, rank and their scaling."""
    layers, facts = read_lora(lora_path)
    tensors = {}
    for module, layer in layers.items():
        if layer.magnitude is not None:
            raise UsageError(f"{lora_path}: ComfyUI's layout cannot hold DoRA; use --export merged")
        name = COMFYUI_PREFIX + comfyui_module(module)
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.alpha"] = torch.tensor(layer.scaling * layer.down.shape[0])
    sizes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({"training": json.dumps(facts, sort_keys=True)} if facts else {})
    temporary = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        write_tensors(temporary, sizes, tensors.__getitem__, metadata)
        rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def comfyui_module(module: str) -> str:
    """ComfyUI's name for a module that diffusers calls `module`."""
    for theirs, ours in COMFYUI_MODULES:
        module = module.replace(theirs, ours)
    return module


# ---------------------------------------------------------------- merge


def merge_lora(lora_path: Path, base_dir: Path, target: Path, variant: str | None = None) -> None:
    """Write the folder `target`: the model of `base_dir` with the LoRA added, every weight in the dtype it is stored in.

    Sums are made in fp32 of the stored weights and rounded once. Written beside and renamed.
    """
    layers, facts = read_lora(lora_path)
    temporary = target.with_name(f".{os.getpid()}-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        merge_files(layers, base_dir, temporary, variant, dropped_weights(facts))
        write_config(base_dir, temporary, facts)
        shutil.rmtree(target, ignore_errors=True)
        rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def merge_files(
    layers: dict[str, LoraWeights], base_dir: Path, target: Path, variant: str | None, dropped: set[str]
) -> None:
    """The weight files, named and divided as the base's are, and the index of several."""
    missing, weight_map, total = set(layers), {}, 0
    for source in base_files(base_dir, variant):
        name = source.name.replace(f".{variant}", "") if variant else source.name
        with safe_open(source, framework="pt") as base:
            names = sorted(set(base.keys()) - dropped)
            sizes = {key: (DTYPES[base.get_slice(key).get_dtype()], base.get_slice(key).get_shape()) for key in names}

            def tensor_of(key: str, base=base) -> torch.Tensor:
                weight, layer = base.get_tensor(key), layers.get(key.removesuffix(".weight"))
                return weight if layer is None else merged_weight(weight.float(), layer).to(weight.dtype)

            write_tensors(target / name, sizes, tensor_of, {"format": "pt"})
        missing -= {key.removesuffix(".weight") for key in names}
        weight_map |= dict.fromkeys(names, name)
        total += sum(math.prod(shape) * dtype.itemsize for dtype, shape in sizes.values())
    if missing:
        raise RuntimeError(f"{base_dir}: holds no weight for {sorted(missing)[0]}, which the LoRA changes")
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(target / f"{BASE_NAME}.safetensors.index.json", index)


def merged_weight(weight: torch.Tensor, layer: LoraWeights) -> torch.Tensor:
    """The fp32 weight that does what `weight` and the adapter do together."""
    change = layer.scaling * (layer.up.flatten(1) @ layer.down.flatten(1))
    weight = weight + change.view_as(weight)
    if layer.magnitude is None:
        return weight
    norm = torch.linalg.norm(weight.flatten(1), dim=1)  # [out]
    scale = layer.magnitude.float().flatten() / norm
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))


def base_files(base_dir: Path, variant: str | None) -> list[Path]:
    """The weight files of a diffusers model, of `variant` where one is named."""
    suffix = f".{variant}" if variant else ""
    index = base_dir / f"{BASE_NAME}.safetensors.index{suffix}.json"
    if not index.exists():
        return [base_dir / f"{BASE_NAME}{suffix}.safetensors"]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [base_dir / name for name in sorted(set(names))]


def dropped_weights(facts: dict) -> set[str]:
    """Weights of the base that the trained model does without."""
    return {"patch_embed.pos_embedding"} if facts.get("drop_learned_positions") else set()


def write_config(base_dir: Path, target: Path, facts: dict) -> None:
    """The base's config.json without the place that it was loaded from, and what inference must know beside it."""
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    if facts.get("drop_learned_positions"):
        config["use_learned_positional_embeddings"] = False
    write_json(target / "config.json", config)
    if facts:
        write_json(target / "training.json", facts)


# ---------------------------------------------------------------- safetensors, a tensor at a time


def write_tensors(
    path: Path,
    sizes: dict[str, tuple[torch.dtype, Iterable[int]]],
    tensor_of: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
) -> None:
    """A safetensors file of tensors of these dtypes and shapes, asked for one by one; equal content, equal bytes.

    The format: length of the header, header in JSON padded to 8 bytes, tensors without a gap.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in sizes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sizes:
            file.write(tensor_of(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        flush_descriptor(file.fileno())
