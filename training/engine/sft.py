"""Full weights in, full weights out: the files of supervised fine-tuning, where every weight is trained in fp32."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from base.errors import UsageError
from base.files import rename


SUBFOLDER = "transformer"
MASTERS_NAME = "masters.safetensors"
EMA_NAME = "ema.safetensors"
EMA_STEPS = "optimization_step"  # what EMAModel calls the number of updates that it has averaged


@contextlib.contextmanager
def exchanged(params: list[nn.Parameter], others: list[torch.Tensor]):
    """`params` hold the numbers of `others`, and those theirs; no memory, and the old ones come back bit for bit."""
    exchange(params, others)
    try:
        yield
    finally:
        exchange(params, others)


def exchange(params: list[nn.Parameter], others: list[torch.Tensor]) -> None:
    for param, other in zip(params, others, strict=True):
        param.data, other.data = other.data, param.data


@contextlib.contextmanager
def weights_in(model: nn.Module, params: list[nn.Parameter], dtype: torch.dtype):
    """The model's weights on the CPU as `params` (fp32) rounded to `dtype`: for saving. The model is as before after."""
    kept = [copy.data for copy in model.parameters()]
    try:
        for copy, param in zip(model.parameters(), params, strict=True):
            copy.data = param.detach().to("cpu", dtype)
        yield model
    finally:
        for copy, data in zip(model.parameters(), kept, strict=True):
            copy.data = data


# ---------------------------------------------------------------- files


def save_transformer(
    model: nn.Module, params: list[nn.Parameter], dtype: torch.dtype, directory: Path, facts: dict
) -> Path:
    """Write `<directory>/transformer/` in `dtype`, as from_pretrained(directory, subfolder="transformer") reads it.

    `facts`, what else inference must know, go into `training.json` there. Written beside and renamed; an earlier
    one is removed only then.
    """
    target = Path(directory, SUBFOLDER)
    temporary = target.with_name(f".tmp-{os.getpid()}-{SUBFOLDER}")
    shutil.rmtree(temporary, ignore_errors=True)
    with weights_in(model, params, dtype):
        model.save_pretrained(temporary)
    forget_source(temporary / "config.json")
    if facts:
        (temporary / "training.json").write_text(json.dumps(facts, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    return rename(temporary, target)


def forget_source(config_path: Path) -> None:
    """Take out the folder that the base was loaded from: it tells of the machine, and results are shared."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_saved_transformer(model: nn.Module, params: list[nn.Parameter], dtype: torch.dtype, directory: Path) -> None:
    """Compare the saved files with the trained weights, tensor by tensor: no second model in memory."""
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
    """fp32 weights that a run goes on from, by the model's names of them."""
    names = (name for name, _ in model.named_parameters())
    tensors = {name: weight.detach().cpu() for name, weight in zip(names, weights, strict=True)}
    save_file(tensors, path, metadata)


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
    """The moving average of the weights (diffusers' EMAModel), and how many updates are in it."""
    save_weights(model, ema.shadow_params, directory / EMA_NAME, {EMA_STEPS: str(ema.optimization_step)})


def load_average(model: nn.Module, ema, directory: Path) -> None:
    ema.optimization_step = int(load_weights(model, ema.shadow_params, directory / EMA_NAME)[EMA_STEPS])
