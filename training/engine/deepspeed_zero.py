"""DeepSpeed ZeRO (arXiv 1910.02054): optimizer states and gradients sharded over the ranks, or offloaded to the host.

DeepSpeed gets only the trained weights, never the model: its placement, dtype and calls are the same as without
DeepSpeed. The accelerate config turns it on and says what is offloaded; everything else comes from the flags. Stages 1
and 2 only: stage 3 also shards the trained weights themselves, which for a LoRA saves almost nothing.
"""

import contextlib
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
from base.memory_levels import HOST_LEVELS
from engine.optimizers import ADAMS, adam_settings_from_args


MIN_VERSION = "0.19"  # earlier ones count a backward pass without DeepSpeed's own forward as the first micro-step
SUPPORTED_STAGES = (1, 2)
ADAM_STATES = ("exp_avg", "exp_avg_sq")  # Adam's states; no other optimizer is supported here
BUCKET = 5 * 10**7  # gradients averaged at once, in a buffer on the GPU; DeepSpeed's 5e8 take 2 GB in fp32


class ZeroMasters:
    """fp32 masters of the model's `model_weights`, held by DeepSpeed as flat shards.

    `params` (fp32, on the host) is a full copy for files: filled by `complete`, and written back by `write_to_model`.
    """

    def __init__(self, model_weights: list[nn.Parameter], device: torch.device, dtype: torch.dtype):
        self.model_weights = model_weights
        # The checkpoint's values, before they are rounded to `dtype`
        self.params = [param.detach().to("cpu", torch.float32) for param in model_weights]
        for param in model_weights:
            param.data = param.data.to(device, dtype)

    @torch.no_grad()
    def complete(self) -> None:
        """All-gather the shards to `params`. All ranks must call it."""
        for param, piece in zip(self.params, self.model_weights, strict=True):
            param.copy_(gather_full(piece))

    @torch.no_grad()
    def write_to_model(self) -> None:
        """Copy `params` to DeepSpeed's masters and, rounded, to the model."""
        for param, piece in zip(self.params, self.model_weights, strict=True):
            scatter_full(piece, param)
            piece.copy_(param)

    @torch.no_grad()
    def read_from_model(self) -> None:
        """Copy the model's weights, just loaded from a file, to `params` and DeepSpeed's masters."""
        for param, piece in zip(self.params, self.model_weights, strict=True):
            param.copy_(piece)
            scatter_full(piece, param)


class ZeroOptimizer(torch.optim.Optimizer):
    """DeepSpeed's engine behind torch's optimizer interface; learning rates are read and set as usual."""

    def __init__(self, engine, weights: list[nn.Parameter]):
        # No super().__init__: it would make param groups of the full weights
        self.engine, self.weights, self.gathered = engine, weights, {}

    @property
    def param_groups(self) -> list[dict]:
        return self.engine.optimizer.optimizer.param_groups

    def backward(self, loss: torch.Tensor, last_micro_step: bool) -> None:
        """Accumulate gradients; `loss` is already divided by the number of micro-steps."""
        self.engine.set_gradient_accumulation_boundary(last_micro_step)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, closure=None) -> float:
        """Average over the ranks, clip and apply. Returns the norm before clipping, infinite for a skipped step."""
        self.engine.step()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: DeepSpeed zeroes them in `step`."""

    def complete(self) -> None:
        """All-gather what `state_dict` returns. All ranks must call it."""
        steps = [entry["step"] for entry in self.engine.optimizer.optimizer.state.values() if "step" in entry]
        state = {}
        if steps:  # empty if every update so far was skipped
            state = {
                index: {"step": float(steps[0])} | {name: gather_full(weight, name).clone() for name in ADAM_STATES}
                for index, weight in enumerate(self.weights)
            }
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        self.gathered = {"state": state, "param_groups": groups}

    def state_dict(self) -> dict:
        """In torch's format, as of the last `complete`."""
        return self.gathered

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load into an optimizer that has not stepped yet."""
        if state_dict["state"]:
            self.load_adam_states(state_dict["state"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)

    def load_adam_states(self, state: dict[int, dict]) -> None:
        """Load Adam's states from torch's format, keyed by the index of the weight."""
        step, zero = state[0]["step"], self.engine.optimizer
        is_torchs = isinstance(zero.optimizer, tuple(ADAMS.values()))
        for group in self.param_groups:
            for piece in group["params"]:
                entry = {name: torch.zeros_like(piece) for name in ADAM_STATES}
                # DeepSpeedCPUAdam keeps the step as an int, torch's Adam as a tensor
                entry["step"] = torch.tensor(float(step)) if is_torchs else int(step)
                zero.optimizer.state[piece] = entry
        zero._lazy_init_hp_params_optimizer_state()  # what DeepSpeed does after its first step
        for index, weight in enumerate(self.weights):
            for name in ADAM_STATES:
                scatter_full(weight, state[index][name], name)


def gather_full(weight: nn.Parameter, name: str | None = None) -> torch.Tensor:
    """The full fp32 master of `weight`, or its Adam state `name`, on the host. All ranks must call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return (safe_get_full_optimizer_state(weight, name) if name else safe_get_full_fp32_param(weight)).cpu()


def scatter_full(weight: nn.Parameter, value: torch.Tensor, name: str | None = None) -> None:
    """Set each rank's shard of the fp32 master of `weight`, or of its Adam state `name`, to `value`."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.float()
    if name:
        safe_set_full_optimizer_state(weight, value, name)
    else:
        safe_set_full_fp32_param(weight, value)


# ---------------------------------------------------------------- start


def uses_deepspeed() -> bool:
    """True if the launcher asks for DeepSpeed; accelerate reads the same variable."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def start_deepspeed_from_args(args, config: dict, masters: ZeroMasters, num_ranks: int, learning_rate: float):
    """Start DeepSpeed on the masters' weights with the Adam of the flags; `config`: from the accelerate config."""
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    config = complete_config(args, config, masters.model_weights[0].dtype, num_ranks)
    settings = adam_settings_from_args(args, learning_rate)
    if config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        with capture_prints():  # it prints how it was built, and how long that took
            optimizer = DeepSpeedCPUAdam(masters.model_weights, **settings, adamw_mode=args.optimizer == "adamw")
    else:
        optimizer = ADAMS[args.optimizer](masters.model_weights, **settings)
    weights = nn.ParameterList(masters.model_weights)
    with capture_prints(), joined_in_host_memory():
        engine = deepspeed.initialize(model=weights, optimizer=optimizer, config=config)[0]
    # By default it only checks in fp16, and fp32 has no setting for it: one bad sample would make every weight NaN
    engine.optimizer.check_grad_overflow = True
    masters.write_to_model()
    return ZeroOptimizer(engine, masters.model_weights)


@contextlib.contextmanager
def joined_in_host_memory():
    """Let DeepSpeed join the trained weights to one flat tensor in host memory, where that takes their size twice.

    Where a GPU has room for it, DeepSpeed would join them there. A start's peak is now the weights and a clone of this
    rank's share of them: with one rank still twice their size.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.available_memory = lambda device_index=None: 0
    try:
        yield
    finally:
        del accelerator.available_memory  # the class's own is there again


def complete_config(args, config: dict, dtype: torch.dtype, num_ranks: int) -> dict:
    """The accelerate config's settings, with "auto" filled in from the flags; UsageError if the two disagree."""
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
    zero.pop("offload_param", None)  # only for stage 3
    given = {name: value for name, value in zero.items() if value != "auto"}
    config["zero_optimization"] = {"reduce_bucket_size": BUCKET} | given
    config |= wanted
    config["fp16"] = {"enabled": False}  # refused by check_deepspeed_from_args
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    config["zero_allow_untested_optimizer"] = True
    return config


def installed_version() -> str | None:
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_deepspeed_from_args(args) -> None:
    """UsageError for flags that do not work with DeepSpeed, which brings its own optimizer."""
    if not uses_deepspeed():
        return
    version = installed_version()
    if version is None or Version(version) < Version(MIN_VERSION):
        state = "not installed" if version is None else f"{version}, which accumulates gradients wrongly here"
        raise UsageError(
            f'DeepSpeed, which the accelerate config asks for, is {state}; pip install "deepspeed>={MIN_VERSION},<1"'
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
        (["--ema"] if args.ema else [], "the weights to average are sharded over the ranks", "leave it out"),
        (
            ["fp16"] if "fp16" in (args.mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION")) else [],
            "fp32 adapters would get no loss scaling",
            "use bf16",
        ),
    ]
    for flags, reason, advice in refused:
        if flags:
            raise UsageError(f"{flags[0]} under DeepSpeed: {reason}; {advice}")
