"""Export the trained LoRA to other formats, from its file: no model is loaded, one weight at a time is in memory.

ComfyUI's layout, as its own code reads it (Comfy-Org/ComfyUI): comfy/lora.py maps `diffusion_model.<module>` to every
weight of a model; comfy/weight_adapter/lora.py takes `.lora_up.weight` [out, rank], `.lora_down.weight` [rank, in] and
`.alpha` from there and adds strength * alpha / rank * up @ down; comfy/ldm/cogvideo/model.py names the modules.

kohya's layout, as merge_lora of VideoX-Fun (videox_fun/utils/lora_utils.py) and of kijai's ComfyUI-CogVideoXWrapper
(lora_utils.py) read it: the same three tensors under `lora_unet__<module>`, with underscores for dots. Readers join
the pieces until they name a module of diffusers' model, and add in fp32 with the same formula.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from base.dtypes import FILE_DTYPES
from base.errors import UsageError
from base.files import replaced_folder, write_json
from base.tensor_file import INDEX_NAME, weight_files
from engine.lora_file import (
    COMFYUI_PREFIX,
    WEIGHTS_NAME,
    comfyui_module,
    kohya_module,
    layers_in,
    read_lora,
    scaled,
    scaling_of,
    training_entry,
    write_tensors,
)
from engine.sft import SUBFOLDER


COMFYUI_NAME = "pytorch_lora_weights_comfyui.safetensors"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"


class LoraWeights(NamedTuple):
    """One layer's adapter, which adds up @ down. `magnitude` [out] is DoRA's norm of every weight row."""

    down: torch.Tensor  # A [rank, in]; for a convolution [rank, in, h, w]
    up: torch.Tensor  # B times its scaling [out, rank]; for a convolution [out, rank, 1, 1]
    magnitude: torch.Tensor | None = None


def export_lora(args, base_dir: Path, variant: str | None, only_missing: bool = False) -> None:
    """Write what --export asks for beside the LoRA in output_dir. `base_dir` holds the transformer it changes."""
    output_dir = Path(args.output_dir)
    for form, name, export in (("comfyui", COMFYUI_NAME, export_comfyui), ("kohya", KOHYA_NAME, export_kohya)):
        if form in args.export and not (only_missing and (output_dir / name).exists()):
            export(output_dir / WEIGHTS_NAME, output_dir / name)
    if "merged" in args.export and not (only_missing and (output_dir / SUBFOLDER).exists()):
        merge_lora(output_dir / WEIGHTS_NAME, base_dir, output_dir / SUBFOLDER, variant)


def read_layers(path: Path) -> tuple[dict[str, LoraWeights], dict, dict]:
    """({module: weights}, inference notes, recorded flags) of a LoRA file."""
    file = read_lora(path)
    tensors, scaling, layers = file.tensors, scaling_of(file, path), {}
    for module in sorted(layers_in(file)):
        down, up = (tensors.pop(f"{module}.lora_{part}.weight").float() for part in "AB")
        layers[module] = LoraWeights(down, scaled(up, scaling), tensors.pop(f"{module}.lora_magnitude_vector", None))
    if tensors:
        raise RuntimeError(f"{path}: {len(tensors)} tensors have no place in an export, e.g. {sorted(tensors)[0]}")
    return layers, file.inference_notes, file.recorded


# ---------------------------------------------------------------- ComfyUI, VideoX-Fun


def export_comfyui(lora_path: Path, target: Path) -> None:
    """Write the LoRA as ComfyUI's own CogVideoX reads it."""
    export_up_down(lora_path, target, lambda module: COMFYUI_PREFIX + comfyui_module(module))


def export_kohya(lora_path: Path, target: Path) -> None:
    """Write the LoRA as VideoX-Fun reads it."""
    export_up_down(lora_path, target, kohya_module)


def export_up_down(lora_path: Path, target: Path, name_of: Callable[[str], str]) -> None:
    """Write up, down and alpha per module. alpha is the rank, so strength 1.0 is as trained in every reader."""
    layers, inference_notes, recorded = read_layers(lora_path)
    tensors = {}
    for module, layer in layers.items():
        if layer.magnitude is not None:
            raise UsageError(f"{lora_path}: this layout cannot hold DoRA; use --export merged")
        name = name_of(module)
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.alpha"] = torch.tensor(float(layer.down.shape[0]))
    sizes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(target, sizes, tensors.__getitem__, {"format": "pt"} | training_entry(inference_notes | recorded))


# ---------------------------------------------------------------- merge


def merge_lora(lora_path: Path, base_dir: Path, target: Path, variant: str | None = None) -> None:
    """Write the folder `target`: the model in `base_dir` plus the LoRA, each weight in the dtype it is stored in.

    Sums are computed in fp32 from the stored weights and rounded once.
    """
    layers, inference_notes, _ = read_layers(lora_path)
    with replaced_folder(target) as folder:
        merge_files(layers, base_dir, folder, variant, dropped_weights(inference_notes))
        write_config(base_dir, folder, inference_notes)


def merge_files(
    layers: dict[str, LoraWeights], base_dir: Path, target: Path, variant: str | None, dropped: set[str]
) -> None:
    """Write the weight files, named and sharded as the base's are, and the index if there are several."""
    missing, weight_map, total = set(layers), {}, 0
    for source in weight_files(base_dir, variant):
        name = source.name.replace(f".{variant}", "") if variant else source.name
        with safe_open(source, framework="pt") as base:
            names = sorted(set(base.keys()) - dropped)
            sizes = {
                key: (FILE_DTYPES[base.get_slice(key).get_dtype()], base.get_slice(key).get_shape()) for key in names
            }

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
        write_json(target / INDEX_NAME, index)


def merged_weight(weight: torch.Tensor, layer: LoraWeights) -> torch.Tensor:
    """The fp32 weight equivalent to `weight` plus the adapter."""
    weight = weight + (layer.up.flatten(1) @ layer.down.flatten(1)).view_as(weight)
    if layer.magnitude is None:
        return weight
    norm = torch.linalg.norm(weight.flatten(1), dim=1)  # [out]
    scale = layer.magnitude.float().flatten() / norm
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))


def dropped_weights(inference_notes: dict) -> set[str]:
    """Weights of the base that the trained model does not have."""
    return {"patch_embed.pos_embedding"} if inference_notes.get("drop_learned_positions") else set()


def write_config(base_dir: Path, target: Path, inference_notes: dict) -> None:
    """The base's config.json without the path it was loaded from, and the inference notes beside it."""
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    if inference_notes.get("drop_learned_positions"):
        config["use_learned_positional_embeddings"] = False
    write_json(target / "config.json", config)
    if inference_notes:
        write_json(target / "training.json", inference_notes)
