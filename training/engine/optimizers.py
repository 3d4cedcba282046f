"""Optimizers and learning-rate schedules, and their states as plain tensors and JSON."""

import importlib
import logging
from collections.abc import Iterable, Iterator

import torch
from diffusers.optimization import get_scheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from base.errors import UsageError
from engine import block_states
from memory.quantization import FP8_CAPABILITY


logger = logging.getLogger(__name__)

CAME_BETA3 = 0.9999  # from the paper, arXiv 2307.02047
CAME_EPSILONS = (1e-30, 1e-16)  # likewise: for the squared gradient and the instability
PRODIGY_SMALL_LR = 0.1  # prodigy's learning rate multiplies its own estimate: it should be about 1
ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
# Per weight; came factors everything but the first moment
STATE_BYTES = {"adam": 8, "adamw": 8, "prodigy": 16, "came": 4}


# ---------------------------------------------------------------- optimizers


def make_optimizer_from_args(args, params: Iterable[torch.nn.Parameter], learning_rate: float):
    """The optimizer that the flags name, on `params` (fp32, all on one device)."""
    params = list(params)
    if args.use_8bit or args.use_4bit or args.use_fp8:
        return make_low_bit_adam(args, params, learning_rate)
    if args.optimizer == "prodigy":
        return make_prodigy(args, params, learning_rate)
    if args.optimizer == "came":
        beta3 = CAME_BETA3 if args.beta3 is None else args.beta3
        return optional_module("came_pytorch", "--optimizer came", "came-pytorch").CAME(
            params,
            lr=learning_rate,
            eps=CAME_EPSILONS,
            betas=(args.beta1, args.beta2, beta3),
            weight_decay=args.weight_decay,
        )
    # fused: one kernel, without temporaries as large as the weights; also on the CPU, for masters in host memory
    return ADAMS[args.optimizer](params, **adam_settings_from_args(args, learning_rate), fused=True)


def state_bytes_from_args(args) -> int:
    """Bytes of optimizer state per weight."""
    if args.use_8bit or args.use_fp8:
        return 2
    return 1 if args.use_4bit else STATE_BYTES[args.optimizer]


def adam_settings_from_args(args, learning_rate: float) -> dict:
    return {
        "lr": learning_rate,
        "betas": (args.beta1, args.beta2),
        "eps": args.epsilon,
        "weight_decay": args.weight_decay,
    }


def make_prodigy(args, params: list[torch.nn.Parameter], learning_rate: float):
    """Prodigy (arXiv 2306.06101). Its step size estimate is one number for all weights, kept in param_groups."""
    if learning_rate < PRODIGY_SMALL_LR:
        logger.warning(
            "--learning_rate %g scales prodigy's own step size down as much: give 1 unless that is meant",
            learning_rate,
        )
    return optional_module("prodigyopt", "--optimizer prodigy", "prodigyopt").Prodigy(
        params,
        **adam_settings_from_args(args, learning_rate),
        beta3=args.beta3,  # None: sqrt(beta2)
        decouple=args.prodigy_decouple,
        use_bias_correction=args.prodigy_use_bias_correction,
        safeguard_warmup=args.prodigy_safeguard_warmup,
    )


def make_low_bit_adam(args, params: list[torch.nn.Parameter], learning_rate: float):
    """Adam or AdamW with 8-bit or 4-bit states; tensors below 4,096 elements keep fp32 states."""
    settings = adam_settings_from_args(args, learning_rate)
    if args.use_8bit and not args.use_torchao:
        return make_bitsandbytes_adam(params, args.optimizer == "adamw", settings)
    device = params[0].device
    if args.use_fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise UsageError(
            f"--use_fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or newer, this one has {capability}; "
            "use --use_8bit"
        )
    torchao = optional_module("torchao.optim", "--use_4bit, --use_fp8 and --use_torchao", "torchao")
    adams = (
        (args.use_8bit, torchao.Adam8bit, torchao.AdamW8bit),
        (args.use_4bit, torchao.Adam4bit, torchao.AdamW4bit),
        (args.use_fp8, torchao.AdamFp8, torchao.AdamWFp8),
    )
    adam, adamw = next(classes for asked_for, *classes in adams if asked_for)
    logger.info("torchao compiles its step at the first update: once per shape of weight, some seconds each")
    return (adamw if args.optimizer == "adamw" else adam)(params, **settings)


def make_bitsandbytes_adam(params: list[torch.nn.Parameter], is_adamw: bool, settings: dict):
    """bitsandbytes' AdamW, or Adam with L2 decay added by a hook: its own Adam decouples the decay, like AdamW."""
    optim = optional_module("bitsandbytes", "--use_8bit", "bitsandbytes").optim
    least = block_states.MIN_8BIT
    if is_adamw:
        return optim.AdamW8bit(params, min_8bit_size=least, **settings)
    optimizer = optim.Adam8bit(params, min_8bit_size=least, **settings | {"weight_decay": 0.0})
    if settings["weight_decay"]:
        optimizer.register_step_pre_hook(lambda *_: add_decay(params, settings["weight_decay"]))
    return optimizer


@torch.no_grad()
def add_decay(params: list[torch.nn.Parameter], weight_decay: float) -> None:
    """Adam's weight decay: added to the gradient, after clipping."""
    for param in params:
        if param.grad is not None:
            param.grad.add_(param, alpha=weight_decay)


def optional_module(name: str, asked_for_by: str, package: str):
    """Import an optional dependency; if it is missing, UsageError with the pip command."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{asked_for_by}: needs {package} ({error}); pip install {package}") from error


# ---------------------------------------------------------------- schedules


def make_lr_scheduler_from_args(args, optimizer: torch.optim.Optimizer, num_steps: int):
    """diffusers' schedule over `num_steps` optimizer updates, stepped once per update."""
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        # + 1: the polynomial schedule divides by the number of steps after the warm-up
        num_training_steps=max(num_steps, args.lr_warmup_steps + 1),
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    # torchao's learning rate is a tensor, which its compiled step reads and torch's schedules fill. The base rates are
    # kept as floats, so that a resumed run multiplies in the same precision.
    lr_scheduler.base_lrs = [float(lr) for lr in lr_scheduler.base_lrs]
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["initial_lr"])
    return lr_scheduler


def schedule_state(lr_scheduler) -> dict:
    """The schedule's state_dict as JSON."""
    state = lr_scheduler.state_dict()
    return state | {name: [float(lr) for lr in state[name]] for name in ("base_lrs", "_last_lr")}


# ---------------------------------------------------------------- states in files


def split_tensors(optimizer_state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """Split an optimizer's state_dict into (tensors by "<index>.<name>", the rest as JSON).

    A low-bit state becomes its inner tensors, "<index>.<name>.<part>", and what is needed to wrap them again. Nothing is
    copied: some tensors may share memory, as bitsandbytes' maps do.
    """
    tensors, values, wrapped, groups = {}, {}, {}, []  # values: step counts and other plain numbers
    for index, entry in optimizer_state["state"].items():
        for name, value in state_items(entry):
            key = f"{index}.{name}"
            if not isinstance(value, torch.Tensor):
                values[key] = value
            elif is_traceable_wrapper_subclass(value):
                parts, context = value.__tensor_flatten__()
                tensors |= {f"{key}.{part}": getattr(value, part) for part in parts}
                wrapped[key] = {"class": type(value).__name__, "parts": parts, "context": to_json(context)}
            else:
                tensors[key] = value
    for number, group in enumerate(optimizer_state["param_groups"]):
        # torchao keeps the learning rate as a tensor in the group
        in_group = {name: value for name, value in group.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"group{number}.{name}": value for name, value in in_group.items()}
        groups.append({name: value for name, value in group.items() if name not in in_group})
    return tensors, {"values": values, "wrapped": wrapped, "param_groups": groups}


def state_items(entry: dict) -> Iterator[tuple[str, object]]:
    """Items of one weight's state, flattened: bitsandbytes nests tensors in another dict, but loads them without."""
    for name, value in entry.items():
        yield from value.items() if isinstance(value, dict) else [(name, value)]


def join_tensors(tensors: dict[str, torch.Tensor], rest: dict) -> dict:
    """The inverse of `split_tensors`."""
    found = {**tensors, **rest["values"]}
    for key, entry in rest["wrapped"].items():
        parts = {part: found.pop(f"{key}.{part}") for part in entry["parts"]}
        found[key] = low_bit_class(entry["class"]).__tensor_unflatten__(parts, from_json(entry["context"]))
    groups = [dict(group) for group in rest["param_groups"]]
    state: dict[int, dict] = {}
    for key, value in found.items():
        index, name = key.split(".", 1)
        if index.startswith("group"):
            groups[int(index.removeprefix("group"))][name] = value
        else:
            state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def load_states(optimizer, pairs: Iterator[tuple[str, torch.Tensor]], rest: dict, device: torch.device) -> None:
    """Load what `split_tensors` returned, its tensors read one by one; each moves to the weights' `device` at once."""

    def moved(pair: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        name, tensor = pair
        return name, tensor.to(device) if tensor.ndim else tensor  # the optimizer knows where it wants numbers

    if hasattr(optimizer, "load_tensors"):
        optimizer.load_tensors(pairs, rest)
    else:
        optimizer.load_state_dict(join_tensors(dict(map(moved, pairs)), rest))


def low_bit_class(name: str) -> type:
    """torchao's class of that name; only these three names from a file can become a class."""
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    return {known.__name__: known for known in (OptimState4bit, OptimState8bit, OptimStateFp8)}[name]


def to_json(context: list) -> list:
    """The context of a low-bit state (signedness, shape, and the dtype it represents, always fp32 here) as JSON."""
    return [str(value) if isinstance(value, torch.dtype) else value for value in context]


def from_json(context: list) -> list:
    plain = [torch.float32 if value == str(torch.float32) else value for value in context]
    return [tuple(value) if isinstance(value, list) else value for value in plain]
