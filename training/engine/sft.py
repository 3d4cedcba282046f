"""Files of full fine-tuning (SFT), where every weight is trained in fp32."""

import contextlib
import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import nn

from base.errors import UsageError
from base.files import replaced_folder, write_json
from base.tensor_file import INDEX_NAME, WEIGHTS_NAME, save_tensors, sizes_of, write_as_library


SUBFOLDER = "transformer"
MASTERS_NAME = "masters.safetensors"
EMA_NAME = "ema.safetensors"
SHARD_SIZE = "10GB"  # per file, as diffusers shards a model
EMA_STEPS = "optimization_step"  # EMAModel's name for the number of averaged updates


@contextlib.contextmanager
def swapped(params: list[nn.Parameter], others: list[torch.Tensor]):
    """Swap the values of `params` and `others` within the context: takes no memory, restored bit for bit."""
    swap(params, others)
    try:
        yield
    finally:
        swap(params, others)


def swap(params: list[nn.Parameter], others: list[torch.Tensor]) -> None:
    for param, other in zip(params, others, strict=True):
        param.data, other.data = other.data, param.data


# ---------------------------------------------------------------- files


def save_transformer(
    model: nn.Module, params: list[nn.Parameter], dtype: torch.dtype, directory: Path, inference_notes: dict
) -> Path:
    """Write `<directory>/transformer/` in `dtype`, for from_pretrained(directory, subfolder="transformer").

    `inference_notes`, what else inference must know, go into `training.json` there. An earlier folder is replaced once
    this one is complete.
    """
    target = Path(directory, SUBFOLDER)
    with replaced_folder(target) as folder:
        model.save_config(folder)
        forget_source(folder / "config.json")
        save_shards(model, params, dtype, folder)
        if inference_notes:
            (folder / "training.json").write_text(json.dumps(inference_notes, sort_keys=True) + "\n", encoding="utf-8")
    return target


def save_shards(model: nn.Module, params: list[nn.Parameter], dtype: torch.dtype, folder: Path) -> None:
    """Write the weight files of diffusers' `save_pretrained`, without a second model in memory."""
    tensors = model.state_dict()  # includes buffers, which keep their dtype
    trained = dict(zip((name for name, _ in model.named_parameters()), params, strict=True))
    sizes = sizes_of(tensors) | sizes_of(trained, dtype)
    meta_tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in sizes.items()}
    pattern = WEIGHTS_NAME.replace(".", "{suffix}.")
    plan = split_torch_state_dict_into_shards(meta_tensors, filename_pattern=pattern, max_shard_size=SHARD_SIZE)

    def tensor_of(name: str) -> torch.Tensor:
        return trained[name].detach().to("cpu", dtype) if name in trained else tensors[name]

    for file, names in plan.filename_to_tensors.items():
        write_as_library(folder / file, {name: sizes[name] for name in names}, tensor_of, {"format": "pt"})
    if plan.is_sharded:
        write_json(folder / INDEX_NAME, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def forget_source(config_path: Path) -> None:
    """Remove the path that the base was loaded from: it reveals the machine, and results are shared."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_saved_transformer(model: nn.Module, params: list[nn.Parameter], dtype: torch.dtype, directory: Path) -> None:
    """Compare the saved files with the trained weights, one tensor at a time: no second model in memory."""
    trained = dict(zip((name for name, _ in model.named_parameters()), params, strict=True))
    missing = set(trained)
    for path in sorted(Path(directory, SUBFOLDER).glob("*.safetensors")):
        with safe_open(path, framework="pt") as saved:
            for name in set(saved.keys()) & set(trained):
                if not torch.equal(saved.get_tensor(name), trained[name].detach().to("cpu", dtype)):
                    raise RuntimeError(f"{path}: {name} differs after saving")
                missing.discard(name)
    if missing:
        raise RuntimeError(f"{directory}: {len(missing)} weights were not saved, e.g. {sorted(missing)[0]}")


def save_weights(model: nn.Module, weights: list[torch.Tensor], path: Path, metadata: dict | None = None) -> None:
    """Save the fp32 weights that a run resumes from, by the model's names."""
    names = (name for name, _ in model.named_parameters())
    save_tensors(path, dict(zip(names, weights, strict=True)), metadata)


def load_weights(model: nn.Module, weights: list[torch.Tensor], path: Path) -> dict:
    """Restore them bit for bit into `weights`; returns the file's metadata."""
    names = [name for name, _ in model.named_parameters()]
    try:
        with safe_open(path, framework="pt") as saved, torch.no_grad():
            if set(saved.keys()) != set(names):
                raise UsageError(f"{path}: holds other weights than this model; name another checkpoint")
            for name, weight in zip(names, weights, strict=True):
                weight.copy_(saved.get_tensor(name))
            return saved.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: not readable ({error}); name an older checkpoint") from error


def save_average(model: nn.Module, ema, directory: Path) -> None:
    """Save the weights' moving average (diffusers' EMAModel) and the number of updates in it."""
    save_weights(model, ema.shadow_params, directory / EMA_NAME, {EMA_STEPS: str(ema.optimization_step)})


def load_average(model: nn.Module, ema, directory: Path) -> None:
    ema.optimization_step = int(load_weights(model, ema.shadow_params, directory / EMA_NAME)[EMA_STEPS])
