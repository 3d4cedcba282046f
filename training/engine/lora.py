"""LoRA adapters (arXiv 2106.09685) with peft: add, compute, save and load, in files that diffusers loads."""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn import functional as F

from base.draws import draw_seed
from base.errors import UsageError
from base.hashes import sampled_hash
from engine.lora_file import (
    WEIGHTS_NAME,
    LoraFile,
    find_file,
    layers_in,
    lora_metadata,
    rank_and_alpha,
    read_lora,
    scaled,
    scaling_of,
    write_tensors,
)


TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
UNSCALED_NAME = "lora_unscaled.safetensors"  # in checkpoints, see save_unscaled
ADAPTER = "default"  # peft's name for the trained adapter
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")  # of an adapted layer; the last is DoRA's


class ComputeDtypeLinear(nn.Linear):
    """A linear layer that casts its fp32 weight to the input's dtype, so training computes what inference does.

    peft would cast the input up instead: 4 fp32 copies of the hidden states per block of a bf16 model.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype))


class ComputeDtypeDora(DoraLinearLayer):
    """DoRA's part of an adapted layer (arXiv 2402.09353), with the fp32 magnitudes cast to the input's dtype.

    Magnitude and norm are then rounded the same way: before the first update their quotient is exactly 1 in any dtype.
    """

    def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="default"):
        weight = dequantize_module_weight(base_layer).to(x.dtype)
        with torch.no_grad():  # section 4.3 of the paper: the norm is treated as a constant
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
    """Add a trainable fp32 adapter to all linear layers whose names end in `target_modules`; returns its parameters.

    Initialized on the CPU from (seed, "lora_init"), parameters in a fixed order. The model's output is unchanged
    before the first update: B is zero; with `init` "orthogonal", B A is zero up to rounding.
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
    with torch.random.fork_rng(devices=[]):  # peft draws from the global CPU generator
        torch.manual_seed(draw_seed(seed, "lora_init"))
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for layer in lora_layers(transformer).values():
        layer.cast_input_dtype_enabled = False  # peft would cast inputs to fp32, see ComputeDtypeLinear
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
    """One output per layer for the same `states` [B, S, D]; fused into few matmuls if all layers have plain adapters.

    `linears(states, layers)` does the same for layers without adapters. Equal to peft's own path up to rounding.
    """
    if all(is_plain(layer) for layer in layers):
        bases, deltas = project_apart(states, layers, linears)
        return [base + delta for base, delta in zip(bases, deltas, strict=True)]
    if any(isinstance(layer, LoraLayer) for layer in layers):
        return [layer(states) for layer in layers]
    return linears(states, layers)


def project_apart(states: torch.Tensor, layers: Sequence[nn.Module], linears: Callable):
    """(`linears` of the base layers, [each adapter's output]); all layers must be plain, see `is_plain`."""
    down = torch.cat([layer.lora_A[ADAPTER].weight for layer in layers]).to(states.dtype)  # [layers x rank, D]
    narrow = F.linear(states, down).chunk(len(layers), dim=-1)  # each [B, S, rank]
    # Scale B, which is small; peft scales the output, which is as large as the states
    ups = [(layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]).to(states.dtype) for layer in layers]
    bases = linears(states, [layer.base_layer for layer in layers])
    return bases, [F.linear(low, up) for low, up in zip(narrow, ups, strict=True)]


def is_plain(layer: nn.Module) -> bool:
    """True for a layer with only the trained adapter, enabled, not merged, and not DoRA."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return False
    return layer.active_adapters == [ADAPTER] and not layer.use_dora[ADAPTER]


def check_target_modules(transformer: nn.Module, names: list[str] | tuple[str, ...]) -> None:
    """UsageError unless each name is the end of at least one linear layer's name, and of no other layer's."""
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
    """A layer's name without the block index: matches that layer in every block."""
    return re.sub(r"^\w+\.\d+\.", "", name)


def save_lora(transformer: nn.Module, directory: Path, pipeline_class, inference_notes: dict | None = None) -> Path:
    """Write the adapter so that `load_lora_weights(directory)` alone restores it, at its trained strength.

    `inference_notes`, what else inference must know, goes into the metadata's "training" entry, which diffusers ignores.
    Deterministic: equal runs write equal bytes. One tensor is copied to the host at a time.
    """
    config, prefix = transformer.peft_config[ADAPTER], f"{pipeline_class.transformer_name}."
    weights = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    factors = scalings(transformer, weights)

    def tensor_of(name: str) -> torch.Tensor:
        key = name.removeprefix(prefix)
        return scaled(weights[key].detach().cpu(), factors.get(key, 1))

    path = Path(directory, WEIGHTS_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {prefix + key: (weight.dtype, weight.shape) for key, weight in weights.items()}
    write_tensors(path, sizes, tensor_of, lora_metadata(config, inference_notes or {}, prefix))
    return path


def save_unscaled(transformer: nn.Module, directory: Path) -> None:
    """Write the unscaled B matrices to a checkpoint, unless dividing the saved ones restores them bit for bit.

    Division is exact if the scaling is a power of two, except near the ends of fp32's range.
    """
    weights = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    factors = scalings(transformer, weights)
    weights = {key: weights[key].detach() for key in factors}
    if all(
        torch.equal(scaled(scaled(weight, factors[key]), 1 / factors[key]), weight) for key, weight in weights.items()
    ):
        return
    sizes = {key: (weight.dtype, weight.shape) for key, weight in weights.items()}
    write_tensors(Path(directory, UNSCALED_NAME), sizes, lambda key: weights[key].cpu(), {"format": "pt"})


def scalings(transformer: nn.Module, keys: Iterable[str]) -> dict[str, float]:
    """{key of a B matrix: the trained adapter's scaling} for the B matrices among peft's `keys`."""
    layers = lora_layers(transformer)
    suffix = ".lora_B.weight"
    return {key: layers[key.removesuffix(suffix)].scaling[ADAPTER] for key in keys if key.endswith(suffix)}


def load_lora(transformer: nn.Module, directory: Path) -> None:
    """Load what `save_lora` and `save_unscaled` wrote into the trained adapter, bit for bit.

    A missing or unexpected key, or a wrong shape, is an error.
    """
    path, unscaled = Path(directory, WEIGHTS_NAME), Path(directory, UNSCALED_NAME)
    file = read_lora(path)
    insert_lora(transformer, file, path)
    if unscaled.exists():
        set_peft_model_state_dict(transformer, file.tensors | read_lora(unscaled).tensors, adapter_name=ADAPTER)


def insert_lora(transformer: nn.Module, file: LoraFile, path: Path) -> None:
    """Load the file's weights into the adapter; if the scalings differ, B is rescaled so that the effect is equal."""
    current = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    differing = sorted(current.keys() ^ file.tensors.keys())
    differing += [key for key, tensor in file.tensors.items() if key in current and tensor.shape != current[key].shape]
    if differing:
        raise UsageError(
            f"{path}: does not fit this model and rank, {len(differing)} keys differ, e.g. {differing[0]}"
        )
    theirs = scaling_of(file, path)
    for key, ours in scalings(transformer, file.tensors).items():
        file.tensors[key] = scaled(file.tensors[key], theirs / ours)
    set_peft_model_state_dict(transformer, file.tensors, adapter_name=ADAPTER)


def check_saved_lora(transformer: nn.Module, directory: Path) -> None:
    """Load the file as diffusers does, as a second adapter of the same transformer, and compare it with the trained one.

    No second model in memory. A difference is a bug in this toolkit, hence RuntimeError.
    """
    check = "saved"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about a second adapter
        transformer.load_lora_adapter(directory, weight_name=WEIGHTS_NAME, adapter_name=check, prefix="transformer")
    try:
        for name, layer in lora_layers(transformer).items():
            if layer.scaling[check] != 1:  # what loaders that ignore the metadata use
                raise RuntimeError(f"{directory}: {name} is scaled differently after saving")
            for part in PARTS:
                check_part(f"{directory}: {name}", layer, part, check)
    finally:
        transformer.set_adapter(ADAPTER)
        transformer.delete_adapters(check)


def check_part(name: str, layer: LoraLayer, part: str, check: str) -> None:
    """RuntimeError unless the saved part equals the trained one, B multiplied by its scaling."""
    weights = getattr(layer, part)
    if (check in weights) != (ADAPTER in weights):
        raise RuntimeError(f"{name} has other parts after saving")
    if check not in weights:
        return
    saved, trained = weights[check].weight, weights[ADAPTER].weight
    trained = scaled(trained, layer.scaling[ADAPTER] if part == "lora_B" else 1)
    if not torch.equal(saved, trained.to(saved)):
        raise RuntimeError(f"{name} differs after saving")


# ---------------------------------------------------------------- starting from a trained LoRA


def start_from_lora(transformer: nn.Module, path: Path) -> None:
    """Initialize the new adapter from a LoRA file or folder, in diffusers', peft's, kohya's or ComfyUI's keys.

    The flags must match those it was trained with; otherwise one UsageError lists the flags to give.
    """
    path = find_file(path)
    modules = {name for name, _ in transformer.named_modules()}
    file = read_lora(path, modules)
    if unknown := sorted(layers_in(file) - modules):
        raise UsageError(f"{path}: does not fit this model, which has no layer {unknown[0]}")
    theirs, ours = flags_of_file(file, path), flags_of_adapter(transformer)
    advice = [flag_advice(flag, theirs[flag], ours[flag]) for flag in theirs if theirs[flag] != ours[flag]]
    names = {name_in_block(layer) for layer in layers_in(file)}
    if names != {name_in_block(layer) for layer in lora_layers(transformer)}:
        targets = file.config.get("target_modules")  # peft also allows a regex, which the flag does not
        advice.append(
            f"give --lora_target_modules {' '.join(sorted(targets if isinstance(targets, list) else names))}"
        )
    if advice:
        raise UsageError(f"{path}: --init_lora goes on with a LoRA of other flags; {', '.join(advice)}")
    insert_lora(transformer, file, path)


def hash_lora(start: str | None) -> dict[str, str | None]:
    """{"init_lora": hash of its tensors, or None without one}; empty if the file is gone, fine for a resumed run."""
    path = find_file(Path(start)) if start else None
    if path and not path.is_file():
        return {}
    return {"init_lora": path and sampled_hash(path)}


def flags_of_file(file: LoraFile, path: Path) -> dict:
    """The flags it was trained with, as far as the file tells; without a fractional alpha, which no flag can give."""
    rank, alpha = rank_and_alpha(file, path)
    flags = {
        "rank": rank,
        "lora_alpha": alpha,
        "use_dora": any("lora_magnitude_vector" in key for key in file.tensors),
        "use_rslora": bool(file.config.get("use_rslora")) and not file.alphas,
    } | file.recorded
    if flags["lora_alpha"] % 1:
        del flags["lora_alpha"], flags["use_rslora"]
    return flags


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
    return f"give --{flag} {theirs:g} (not {ours})"
