"""Adapters in, adapters out: low-rank adaptation (arXiv 2106.09685) by peft, in files that diffusers loads."""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F

from draws import draw_seed
from durable import flush_descriptor, rename
from errors import UsageError
from hashes import sampled_hash


TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights(folder) looks for
ADAPTER = "default"  # peft's name for the trained adapter
COPIED_AT_ONCE = 2**20  # bytes
PREFIX = "transformer."  # diffusers' name for the adapted part of the pipeline
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps peft's configuration, as JSON
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")  # of an adapted layer; the last is DoRA's


class ComputeDtypeLinear(nn.Linear):
    """A linear layer whose fp32 weight is cast to the input's dtype: the arithmetic that inference does.

    peft would cast the input up instead: for a bf16 model 4 fp32 copies of the hidden states a block.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype))


class ComputeDtypeDora(DoraLinearLayer):
    """DoRA's part of an adapted layer (arXiv 2402.09353), its fp32 magnitudes cast to the input's dtype too.

    Both sides of magnitude / norm are then rounded alike: without an update the quotient is 1, whatever the dtype.
    """

    def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="default"):
        weight = dequantize_module_weight(base_layer).to(x.dtype)
        with torch.no_grad():  # section 4.3 of the paper: the norm counts as a constant
            identity = torch.eye(weight.shape[1], device=x.device, dtype=x.dtype)
            norm = self.get_weight_norm(weight, lora_B(lora_A(identity)).T, scaling)
        scale = (self.weight.to(x.dtype) / norm).view(1, -1)
        if base_result is None:
            base_result = F.linear(x, weight)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (scale - 1) * base_result + scale * lora_B(lora_A(x)) * scaling


def add_lora(
    transformer: nn.Module,
    rank: int,
    alpha: float,
    seed: int,
    target_modules: list[str] | tuple[str, ...] = TARGET_MODULES,
    init: str = "default",
    use_dora: bool = False,
    use_rslora: bool = False,
) -> list[nn.Parameter]:
    """Add a trainable fp32 adapter on the linear layers whose names end so; returns its weights in a fixed order.

    Drawn on the CPU from (seed, "lora_init"). The model is unchanged before the first update: B is zero, or with
    `init` "orthogonal" B A is, up to rounding.
    """
    check_target_modules(transformer, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(target_modules),
        init_lora_weights=True if init == "default" else init,
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(seed, "lora_init"))
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for layer in lora_layers(transformer).values():
        layer.cast_input_dtype_enabled = False
        layer.lora_A[ADAPTER].__class__ = layer.lora_B[ADAPTER].__class__ = ComputeDtypeLinear
        if use_dora:
            layer.lora_magnitude_vector[ADAPTER].__class__ = ComputeDtypeDora
    params = [param for param in transformer.parameters() if param.requires_grad]
    for param in params:
        param.data = param.data.float()
    return params


def lora_layers(transformer: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def project(states: torch.Tensor, layers: Sequence[nn.Module], linears: Callable) -> list[torch.Tensor]:
    """What each of `layers` makes of the same `states` [B, S, D]: with plain adapters on all of them in few products.

    `linears(states, layers)` gives the same of layers without adapters. Equal to peft's own path up to rounding.
    """
    if all(is_plain(layer) for layer in layers):
        bases, deltas = project_apart(states, layers, linears)
        return [base + delta for base, delta in zip(bases, deltas, strict=True)]
    if any(isinstance(layer, LoraLayer) for layer in layers):
        return [layer(states) for layer in layers]
    return linears(states, layers)


def project_apart(states: torch.Tensor, layers: Sequence[nn.Module], linears: Callable):
    """([what `linears` makes of the base layers], [each adapter's output]) of layers that are all plain."""
    down = torch.cat([layer.lora_A[ADAPTER].weight for layer in layers]).to(states.dtype)  # [layers x rank, D]
    narrow = F.linear(states, down).chunk(len(layers), dim=-1)
    # The scale goes into B, which is small; peft scales the product, as large as the states
    ups = [(layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]).to(states.dtype) for layer in layers]
    bases = linears(states, [layer.base_layer for layer in layers])
    return bases, [F.linear(low, up) for low, up in zip(narrow, ups, strict=True)]


def is_plain(layer: nn.Module) -> bool:
    """True for a layer with the trained adapter alone, switched on and neither merged nor DoRA."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return False
    return layer.active_adapters == [ADAPTER] and not layer.use_dora[ADAPTER]


def check_target_modules(transformer: nn.Module, names: list[str] | tuple[str, ...]) -> None:
    """Each name must be the end of linear layers' names, and of no other layer's."""
    modules = dict(transformer.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for wanted in names:
        found = [name for name in modules if f".{name}".endswith(f".{wanted}")]
        others = [name for name in found if name not in linear]
        if others or not found:
            what = f"{others[0]} is a {type(modules[others[0]]).__name__}" if others else "no layer is called so"
            choices = ", ".join(dict.fromkeys(name_in_block(name) for name in linear))
            raise UsageError(f"--lora_target_modules {wanted}: {what}; the linear layers are {choices}")


def name_in_block(name: str) -> str:
    """A layer's name without the number of its block, so that it means that layer of every block."""
    return re.sub(r"^\w+\.\d+\.", "", name)


def save_lora(transformer: nn.Module, directory: Path, pipeline_class, facts: dict | None = None) -> Path:
    """Write the adapter with alpha and rank in its metadata, so that `load_lora_weights(directory)` alone restores it.

    `facts`, what else inference must know, goes into the metadata's "training" entry, which diffusers leaves alone.

    Never `.alpha` tensors beside metadata: diffusers refuses both. Equal runs write equal bytes. Written beside
    and renamed: a reader sees the old file or the new one.
    """
    metadata = {key: plain(value) for key, value in transformer.peft_config[ADAPTER].to_dict().items()}
    temporary_name = f".tmp-{os.getpid()}-{WEIGHTS_NAME}"
    pipeline_class.save_lora_weights(
        save_directory=directory,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
        transformer_lora_adapter_metadata=metadata,
        weight_name=temporary_name,
    )
    temporary = Path(directory, temporary_name)
    finish_header(temporary, {"training": json.dumps(facts, sort_keys=True)} if facts else {})
    return rename(temporary, Path(directory, WEIGHTS_NAME))


def plain(value):
    """JSON for a value of peft's configuration; sets in order, since their own order changes with PYTHONHASHSEED."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if hasattr(value, "value") else value


def finish_header(path: Path, more_metadata: dict[str, str]) -> None:
    """Add to a safetensors file's metadata and sort the keys of its header: the library writes them in random order.

    In place: 1 GiB of a LoRA, rank 256 of 5b, needs no second GiB of disk or memory.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] |= more_metadata
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        text = text.ljust(max(size, len(text) + -len(text) % 8))  # tensors start at a multiple of 8 bytes
        move_towards_end(file, 8 + size, len(text) - size)
        file.seek(0)
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        flush_descriptor(file.fileno())
    give_usual_mode(path)


def move_towards_end(file: BinaryIO, start: int, distance: int) -> None:
    """Move what a file holds from byte `start` on by `distance` bytes, the last first."""
    if distance:
        for place in reversed(range(start, file.seek(0, os.SEEK_END), COPIED_AT_ONCE)):
            file.seek(place)
            content = file.read(COPIED_AT_ONCE)
            file.seek(place + distance)
            file.write(content)


def give_usual_mode(path: Path) -> None:
    """The permissions of any new file there: the library makes files that only their owner can read."""
    new = path.with_name(f"{path.name}.new")
    new.touch()
    with contextlib.suppress(OSError):  # a file system may have none
        path.chmod(new.stat().st_mode & 0o777)
    new.unlink()


def load_lora(transformer: nn.Module, directory: Path) -> None:
    """Load a saved adapter into the trained one, bit for bit; any missing, unexpected or misshapen key is an error."""
    path = Path(directory, WEIGHTS_NAME)
    insert_lora(transformer, read_lora(path)[0], path)


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by their keys in the transformer, what peft's configuration says in the metadata, empty without)."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            config = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"{path}: not readable as a LoRA file ({error})") from error
    return tensors, {key.removeprefix(PREFIX): value for key, value in config.items()}


def insert_lora(transformer: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    current = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    differing = sorted(current.keys() ^ tensors.keys())
    differing += [key for key in current if key in tensors and tensors[key].shape != current[key].shape]
    if differing:
        raise UsageError(
            f"{path}: does not fit this model and rank, {len(differing)} keys differ, e.g. {differing[0]}"
        )
    set_peft_model_state_dict(transformer, tensors, adapter_name=ADAPTER)


def check_saved_lora(transformer: nn.Module, directory: Path) -> None:
    """Load the file as diffusers does, as a second adapter of the same transformer, and compare it with the trained one.

    Never a second model in memory. An inequality is a defect of the toolkit, not of the user's input.
    """
    check = "saved"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second adapter
        transformer.load_lora_adapter(directory, weight_name=WEIGHTS_NAME, adapter_name=check, prefix="transformer")
    try:
        for name, layer in lora_layers(transformer).items():
            for part in (getattr(layer, part) for part in PARTS):
                if (check in part) != (ADAPTER in part):
                    raise RuntimeError(f"{directory}: {name} has other parts after saving")
                if check in part and not torch.equal(part[check].weight, part[ADAPTER].weight.to(part[check].weight)):
                    raise RuntimeError(f"{directory}: {name} differs after saving")
            if layer.scaling[check] != layer.scaling[ADAPTER]:
                raise RuntimeError(f"{directory}: {name} is scaled differently after saving")
    finally:
        transformer.set_adapter(ADAPTER)
        transformer.delete_adapters(check)


# ---------------------------------------------------------------- starting from a trained LoRA


def start_from_lora(transformer: nn.Module, path: Path) -> None:
    """Give the fresh adapter the weights of a LoRA file in diffusers' format, or of the one in a run's folder.

    The flags must be those that it was trained with: what differs is refused in one line that says what to give.
    """
    path = lora_path(path)
    tensors, config = read_lora(path)
    if config.get("rank_pattern") or config.get("alpha_pattern") or len(ranks_in(tensors)) != 1:
        raise UsageError(f"{path}: --init_lora needs a LoRA file with one rank and one alpha for all layers")
    theirs, ours = flags_of_file(tensors, config), flags_of_adapter(transformer)
    advice = [flag_advice(flag, theirs[flag], ours[flag]) for flag in theirs if theirs[flag] != ours[flag]]
    if layers_in(tensors) != set(lora_layers(transformer)):
        names = config.get("target_modules") or {name_in_block(name) for name in layers_in(tensors)}
        advice.append(f"give --lora_target_modules {' '.join(sorted(names))}")
    if advice:
        raise UsageError(f"{path}: --init_lora goes on with a LoRA of other flags; {', '.join(advice)}")
    insert_lora(transformer, tensors, path)


def lora_path(path: Path) -> Path:
    """The file that --init_lora names by itself or by the folder of a run."""
    return path / WEIGHTS_NAME if path.is_dir() else path


def hash_lora(start: str | None) -> dict[str, str | None]:
    """{"init_lora": hash of its tensors, None without one}; empty where it is gone, which stops no run that goes on."""
    path = lora_path(Path(start)) if start else None
    if path and not path.is_file():
        return {}
    return {"init_lora": path and sampled_hash(path)}


def flags_of_file(tensors: dict[str, torch.Tensor], config: dict) -> dict:
    """Without metadata alpha is the rank, as diffusers has it."""
    (rank,) = ranks_in(tensors)
    return {
        "rank": rank,
        "lora_alpha": config.get("lora_alpha", rank),
        "use_dora": any("lora_magnitude_vector" in key for key in tensors),
        "use_rslora": config.get("use_rslora", False),
    }


def flags_of_adapter(transformer: nn.Module) -> dict:
    config = transformer.peft_config[ADAPTER]
    return {
        "rank": config.r,
        "lora_alpha": config.lora_alpha,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def flag_advice(flag: str, theirs, ours) -> str:
    if isinstance(theirs, bool):
        return f"{'give' if theirs else 'leave out'} --{flag}"
    return f"give --{flag} {theirs} (not {ours})"


def ranks_in(tensors: dict[str, torch.Tensor]) -> set[int]:
    return {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(".lora_A.weight")}


def layers_in(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
