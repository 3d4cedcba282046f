"""Files of full fine-tuning (SFT), where every weight is trained in fp32.

`weights` are those by the model's names, in fp32. Their mapping may make them when asked, so each is asked for once;
the one before may still be on its way to the disk. Dtypes and shapes come from the model, names from the mapping's keys.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from base.errors import UsageError
from base.files import replaced_folder, write_json
from base.tensor_file import INDEX_NAME, WEIGHTS_NAME, open_header, read_tensors, write_as_library
from engine.split import rounded


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
    model: nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, directory: Path, inference_notes: dict
) -> Path:
    """Write `<directory>/transformer/` in `dtype`, for from_pretrained(directory, subfolder="transformer").

    `inference_notes`, what else inference must know, go into `training.json` there. An earlier folder is replaced once
    this one is complete.
    """
    target = Path(directory, SUBFOLDER)
    with replaced_folder(target) as folder:
        model.save_config(folder)
        forget_source(folder / "config.json")
        save_shards(model, weights, dtype, folder)
        if inference_notes:
            (folder / "training.json").write_text(json.dumps(inference_notes, sort_keys=True) + "\n", encoding="utf-8")
    return target


def save_shards(model: nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Write the weight files of diffusers' `save_pretrained`, without a second model in memory."""
    trained, tensors = set(weights), model.state_dict()  # includes buffers, which keep their dtype
    sizes = {name: (dtype if name in trained else tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    meta_tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in sizes.items()}
    pattern = WEIGHTS_NAME.replace(".", "{suffix}.")
    plan = split_torch_state_dict_into_shards(meta_tensors, filename_pattern=pattern, max_shard_size=SHARD_SIZE)

    def tensor_of(name: str) -> torch.Tensor:
        return in_result(weights[name], dtype) if name in trained else tensors[name]

    for file, names in plan.filename_to_tensors.items():
        write_as_library(folder / file, {name: sizes[name] for name in names}, tensor_of, {"format": "pt"})
    if plan.is_sharded:
        write_json(folder / INDEX_NAME, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def in_result(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A trained weight as the result has it."""
    return rounded(weight.detach(), dtype)


def forget_source(config_path: Path) -> None:
    """Remove the path that the base was loaded from: it reveals the machine, and results are shared."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_saved_transformer(
    model: nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, directory: Path
) -> None:
    """Compare the saved files with the trained weights, one tensor at a time: no second model in memory."""
    trained = set(weights)
    missing = trained.copy()
    for path in sorted(Path(directory, SUBFOLDER).glob("*.safetensors")):
        for name, tensor in read_tensors(path):
            if name in trained:
                expected = in_result(weights[name], dtype)
                if not torch.equal(tensor.to(expected.device), expected):
                    raise RuntimeError(f"{path}: {name} differs after saving")
                del expected
            del tensor  # before the next is read
            missing.discard(name)
    if missing:
        raise RuntimeError(f"{directory}: {len(missing)} weights were not saved, e.g. {sorted(missing)[0]}")


def save_weights(
    model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, metadata: dict | None = None
) -> None:
    """Save the fp32 weights that a run resumes from, by the model's names."""
    sizes = {name: (torch.float32, param.shape) for name, param in model.named_parameters()}
    write_as_library(path, sizes, weights.__getitem__, metadata)


def load_weights(model: nn.Module, set_weight: Callable[[str, torch.Tensor], None], path: Path) -> dict:
    """Give them to `set_weight(name, tensor)` one by one, bit for bit; returns the file's metadata."""
    try:
        sizes, metadata = open_header(path)
        if sizes != {name: (torch.float32, list(param.shape)) for name, param in model.named_parameters()}:
            raise UsageError(f"{path}: holds other weights than this model; name another checkpoint")
        for name, tensor in read_tensors(path):
            set_weight(name, tensor)
            del tensor  # before the next is read
    except OSError as error:
        raise UsageError(f"{path}: not readable ({error}); name an older checkpoint") from error
    return metadata


def setter(weights: Mapping[str, torch.Tensor]) -> Callable[[str, torch.Tensor], None]:
    """The `set_weight` that copies into tensors that exist."""

    @torch.no_grad()
    def set_weight(name: str, tensor: torch.Tensor) -> None:
        weights[name].copy_(tensor)

    return set_weight


def by_name(model: nn.Module, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor per trained weight of the model, in its order."""
    names = (name for name, param in model.named_parameters() if param.requires_grad)
    return dict(zip(names, tensors, strict=True))


def save_average(model: nn.Module, average: Mapping[str, torch.Tensor], num_updates: int, directory: Path) -> None:
    """Save the weights' moving average and the number of updates in it."""
    save_weights(model, average, directory / EMA_NAME, {EMA_STEPS: str(num_updates)})


def load_average(model: nn.Module, set_weight: Callable[[str, torch.Tensor], None], directory: Path) -> int:
    """Restore it; returns the number of updates in it."""
    return int(load_weights(model, set_weight, directory / EMA_NAME)[EMA_STEPS])
