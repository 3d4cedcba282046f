"""ZeRO (arXiv 1910.02054) by DeepSpeed: optimizer states and gradients shared out over the ranks, or kept on the host.

DeepSpeed is handed the trained weights alone, never the model: where that lies, what it computes in and how it is
called stay as they are without. The accelerate config turns it on and says what is offloaded; all else comes from the
flags. Stages 1 and 2: what stage 3 shares out besides, frozen weights, is a third of nothing for a LoRA.
"""

import copy
import importlib.metadata
import math
import os

import torch
import torch.distributed
from packaging.version import Version
from torch import nn

from base.console import capture_prints
from base.errors import UsageError
from base.levels import HOST_LEVELS
from engine.optimizers import ADAMS, adam_settings_from_args


OLDEST = "0.19"  # before it a backward pass without DeepSpeed's own forward counts as the first micro-step
SUPPORTED_STAGES = (1, 2)
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, the one optimizer that is run here


class ZeroMasters:
    """fp32 masters that DeepSpeed holds, cut into flat pieces, of the model's `copies`.

    `params` [fp32, on the host] is where they are filled in for files, by `gather`, and taken from, by `write_copies`.
    """

    def __init__(self, copies: list[nn.Parameter], device: torch.device, dtype: torch.dtype):
        self.copies = copies
        # What the checkpoint says, not its rounding to `dtype`
        self.params = [param.detach().to("cpu", torch.float32) for param in copies]
        for param in copies:
            param.data = param.data.to(device, dtype)

    @torch.no_grad()
    def gather(self) -> None:
        """Fill `params`. All ranks must call it."""
        for param, piece in zip(self.params, self.copies, strict=True):
            param.copy_(full(piece))

    @torch.no_grad()
    def write_copies(self) -> None:
        """Hand `params` to DeepSpeed and, rounded, to the model."""
        for param, piece in zip(self.params, self.copies, strict=True):
            set_full(piece, param)
            piece.copy_(param)

    @torch.no_grad()
    def read_copies(self) -> None:
        """Take the weights that were loaded into the model."""
        for param, piece in zip(self.params, self.copies, strict=True):
            param.copy_(piece)
            set_full(piece, param)


class ZeroOptimizer(torch.optim.Optimizer):
    """DeepSpeed's engine where an optimizer is expected: learning rates are read from it and set in it as usual."""

    def __init__(self, engine, weights: list[nn.Parameter]):
        # Not Optimizer's own: it would make groups of the whole weights
        self.engine, self.weights, self.gathered = engine, weights, {}

    @property
    def param_groups(self) -> list[dict]:
        return self.engine.optimizer.optimizer.param_groups

    def backward(self, loss: torch.Tensor, last_micro_step: bool) -> None:
        """Add to the gradients; `loss` is already divided by the number of micro-steps."""
        self.engine.set_gradient_accumulation_boundary(last_micro_step)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, closure=None) -> float:
        """Average over the ranks, clip and apply; returns the norm before clipping, infinite where nothing was applied."""
        self.engine.step()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """DeepSpeed has done it."""

    def gather(self) -> None:
        """Fetch what `state_dict` returns. All ranks must call it."""
        steps = [entry["step"] for entry in self.engine.optimizer.optimizer.state.values() if "step" in entry]
        state = {}
        if steps:  # none while every update so far was skipped
            state = {
                index: {"step": float(steps[0])} | {name: full(weight, name).clone() for name in MOMENTS}
                for index, weight in enumerate(self.weights)
            }
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        self.gathered = {"state": state, "param_groups": groups}

    def state_dict(self) -> dict:
        """As torch's, of the last `gather`."""
        return self.gathered

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Into an optimizer that has made no step yet."""
        if state_dict["state"]:
            self.load_moments(state_dict["state"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)

    def load_moments(self, state: dict[int, dict]) -> None:
        """Adam's, as torch keeps them by the number of the weight."""
        step, zero = state[0]["step"], self.engine.optimizer
        is_torchs = isinstance(zero.optimizer, tuple(ADAMS.values()))
        for group in self.param_groups:
            for piece in group["params"]:
                entry = {name: torch.zeros_like(piece) for name in MOMENTS}
                # DeepSpeedCPUAdam counts in a number, torch's Adam in a tensor
                entry["step"] = torch.tensor(float(step)) if is_torchs else int(step)
                zero.optimizer.state[piece] = entry
        zero._lazy_init_hp_params_optimizer_state()  # what DeepSpeed does after its first step
        for index, weight in enumerate(self.weights):
            for name in MOMENTS:
                set_full(weight, state[index][name], name)


def full(weight: nn.Parameter, name: str | None = None) -> torch.Tensor:
    """The whole fp32 master of `weight`, or the Adam state `name` of it, on the host. All ranks must call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return (safe_get_full_optimizer_state(weight, name) if name else safe_get_full_fp32_param(weight)).cpu()


def set_full(weight: nn.Parameter, value: torch.Tensor, name: str | None = None) -> None:
    """Give each rank its piece of `value` as the fp32 master of `weight`, or as the Adam state `name` of it."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.float()
    if name:
        safe_set_full_optimizer_state(weight, value, name)
    else:
        safe_set_full_fp32_param(weight, value)


# ---------------------------------------------------------------- start


def uses_deepspeed() -> bool:
    """True where the launcher says so; it is how accelerate knows too."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def start_deepspeed_from_args(args, config: dict, masters: ZeroMasters, num_ranks: int, learning_rate: float):
    """DeepSpeed on the masters' weights, with the flags' Adam; `config` is what the accelerate config says."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    config = deepspeed_config_from_args(args, config, masters.copies[0].dtype, num_ranks)
    settings = adam_settings_from_args(args, learning_rate)
    if config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        with capture_prints():  # how long it took to build, and with what
            optimizer = DeepSpeedCPUAdam(masters.copies, **settings, adamw_mode=args.optimizer == "adamw")
    else:
        optimizer = ADAMS[args.optimizer](masters.copies, **settings)
    weights = nn.ParameterList(masters.copies)
    with capture_prints():
        engine = deepspeed.initialize(model=weights, optimizer=optimizer, config=config)[0]
    # It looks in fp16 alone, and in fp32 has no setting for it: one bad sample would make every weight NaN
    engine.optimizer.check_grad_overflow = True
    masters.write_copies()
    return ZeroOptimizer(engine, masters.copies)


def deepspeed_config_from_args(args, config: dict, dtype: torch.dtype, num_ranks: int) -> dict:
    """The accelerate config's settings, what it leaves open filled in by the flags; UsageError where they disagree."""
    config = copy.deepcopy(config)
    wanted = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
        "train_micro_batch_size_per_gpu": args.train_batch_size,
        "train_batch_size": args.train_batch_size * args.gradient_accumulation_steps * num_ranks,
    }
    for name, value in wanted.items():
        if config.get(name, "auto") not in ("auto", value):
            raise UsageError(f"DeepSpeed's {name}: {config[name]} disagrees with the flags, which say {value}")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise UsageError(f"DeepSpeed's config holds a block {name!r}, and the flags choose it; remove the block")
    zero = config["zero_optimization"]
    if zero["stage"] not in SUPPORTED_STAGES:
        raise UsageError(f"DeepSpeed's zero_stage: {zero['stage']} is not supported; use 2 (or 1)")
    zero.pop("offload_param", None)  # of stage 3
    config["zero_optimization"] = {name: value for name, value in zero.items() if value != "auto"}
    config |= wanted
    config["fp16"] = {"enabled": False}
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    config["zero_allow_untested_optimizer"] = True
    return config


def installed_version() -> str | None:
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_deepspeed_from_args(args) -> None:
    """Refuse what does not work together with DeepSpeed, which brings an optimizer of its own."""
    if not uses_deepspeed():
        return
    version = installed_version()
    if version is None or Version(version) < Version(OLDEST):
        state = "not installed" if version is None else f"{version}, which accumulates gradients wrongly here"
        raise UsageError(
            f'DeepSpeed, which the accelerate config asks for, is {state}; pip install "deepspeed>={OLDEST},<1"'
        )
    bits = [f"--{name}" for name in ("use_8bit", "use_4bit", "use_fp8") if getattr(args, name)]
    refused = [
        (bits, "DeepSpeed keeps Adam's states in fp32", "leave it out"),
        (
            ["--use_cpu_offload_optimizer"] if args.use_cpu_offload_optimizer else [],
            "DeepSpeed offloads by itself",
            "set offload_optimizer_device: cpu in the accelerate config instead",
        ),
        (
            [f"--optimizer {args.optimizer}"] if args.optimizer not in ("adam", "adamw") else [],
            "DeepSpeed runs adam and adamw",
            "give one of them",
        ),
        (
            [f"--memory {args.memory}"] if args.memory in HOST_LEVELS else [],
            "DeepSpeed runs backward passes that weights and activations in host memory cannot follow",
            "use --memory balanced",
        ),
        (["--ema"] if args.ema else [], "the weights to average are shared out", "leave it out"),
        (
            ["fp16"] if "fp16" in (args.mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION")) else [],
            "fp32 adapters would get no loss scaling",
            "use bf16",
        ),
    ]
    for flags, reason, advice in refused:
        if flags:
            raise UsageError(f"{flags[0]} under DeepSpeed: {reason}; {advice}")
