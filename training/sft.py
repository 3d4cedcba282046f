"""Full weights in, full weights out: supervised fine-tuning of every weight, with fp32 masters (arXiv 1710.03740).

In bf16 an update of 1e-5 is rounded away for every weight above 0.004; on an fp32 master it arrives.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from errors import UsageError


SUBFOLDER = "transformer"
MASTERS_NAME = "masters.safetensors"


def add_masters(model: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """fp32 masters on `device` of all the model's weights, in order. Gradients reach `master.grad` in fp32 as backward makes them.

    Each gradient is moved at once, so that those in the model's dtype never all exist, and accumulation is in fp32.
    """
    model.requires_grad_(True)
    masters = []
    for param in model.parameters():
        master = nn.Parameter(param.detach().to(device, torch.float32, copy=True))
        param.register_post_accumulate_grad_hook(lambda param, master=master: move_gradient(param, master))
        masters.append(master)
    return masters


def move_gradient(param: nn.Parameter, master: nn.Parameter) -> None:
    grad, param.grad = param.grad, None
    if master.grad is None:
        master.grad = grad.float()
    else:
        master.grad += grad


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
    temporary = target.with_name(f".{os.getpid()}-{SUBFOLDER}")
    shutil.rmtree(temporary, ignore_errors=True)
    with weights_in(model, params, dtype):
        model.save_pretrained(temporary)
    forget_source(temporary / "config.json")
    if facts:
        (temporary / "training.json").write_text(json.dumps(facts, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    return temporary.rename(target)


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


def save_masters(model: nn.Module, params: list[nn.Parameter], directory: Path) -> None:
    """The fp32 weights that a run goes on from."""
    names = (name for name, _ in model.named_parameters())
    save_file(
        {name: param.detach().cpu() for name, param in zip(names, params, strict=True)}, directory / MASTERS_NAME
    )


def load_masters(model: nn.Module, params: list[nn.Parameter], directory: Path) -> None:
    """Restore them bit for bit into `params` and, rounded, into the model."""
    path = Path(directory, MASTERS_NAME)
    names = [name for name, _ in model.named_parameters()]
    try:
        with safe_open(path, framework="pt") as saved, torch.no_grad():
            if set(saved.keys()) != set(names):
                raise UsageError(f"{path}: holds other weights than this model; name another checkpoint")
            for name, copy, param in zip(names, model.parameters(), params, strict=True):
                param.copy_(saved.get_tensor(name))
                copy.copy_(param)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: not readable ({error}); name an older checkpoint") from error
