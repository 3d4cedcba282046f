"""One optimizer update: backward, all-reduce, clipping, step, learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed

from base.ranks import is_distributed
from engine.deepspeed_zero import ZeroOptimizer
from engine.engines import Engine
from engine.master_weights import HostMasters, group_by_bytes
from engine.ring_adam import RingAdam


REDUCE_BYTES = 256 * 2**20  # gradients are averaged in pieces of this size: few calls, little memory


FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # torch.amp.GradScaler's; powers of two, so that scaling rounds nothing


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16, whose small gradients underflow: scales the loss up and the fp32 gradients down.

    Not torch.amp.GradScaler: it copies its scale from the GPU asynchronously, so gradients in host memory could be
    multiplied before the scale has arrived.
    """

    scale: float = FIRST_SCALE
    growth_tracker: int = 0  # finite updates in a row

    def unscale(self, params: list[torch.nn.Parameter]) -> None:
        torch._foreach_mul_([param.grad for param in params if param.grad is not None], 1 / self.scale)

    def adapt(self, finite: bool) -> None:
        """Halve the scale after a bad update, double it after many good ones."""
        self.growth_tracker = self.growth_tracker + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.growth_tracker == GROWTH_INTERVAL:
            self.scale, self.growth_tracker = self.scale * 2, 0

    def state_dict(self) -> dict:
        return vars(self).copy()

    def load_state_dict(self, saved: dict) -> None:
        self.scale, self.growth_tracker = saved["scale"], saved["growth_tracker"]


@dataclass
class TrainingState:
    """Everything that an update changes, and therefore what a checkpoint must hold."""

    engine: Engine  # the weights
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: LossScaler | None = None  # fp16 only

    def complete(self) -> None:
        """Before a checkpoint is written: finish updates, all-gather what is sharded. All ranks must call it."""
        self.engine.complete()
        if isinstance(self.optimizer, ZeroOptimizer):
            self.optimizer.complete()


class Update(NamedTuple):
    """`stepped`: an update is complete; `skipped`: it was not applied because its gradients were not finite.

    `searching`: skipped, but only because fp16's loss scale is still being lowered to a working value, which is
    normal. `skipped` and `grad_norm` are tensors [] while only the device knows their values.
    """

    stepped: bool
    skipped: bool | torch.Tensor = False
    searching: bool = False
    grad_norm: float | torch.Tensor = math.nan  # before clipping
    lr: float = math.nan  # that this update was made with


def make_scaler(dtype: torch.dtype) -> LossScaler | None:
    """A loss scaler for fp16, else None."""
    return LossScaler() if dtype == torch.float16 else None


def update(loss: torch.Tensor, state: TrainingState, last_micro_step: bool, max_grad_norm: float) -> Update:
    """Accumulate the gradient of `loss` and, at the last micro-step, apply it: a StateRing in its next forward pass.

    `loss` is already divided by the number of micro-steps. Ranks communicate once per update, not per micro-step. The
    host waits for the device only if `skips_on_device` is False. The gradient norm is computed once, for clipping.
    """
    # Multiplies by 1, or by NaN if the loss is not finite, so that every gradient becomes non-finite too
    loss = loss * (1 + 0 * loss.detach())
    if isinstance(state.optimizer, ZeroOptimizer):
        return zero_update(loss, state, last_micro_step)
    (loss * state.scaler.scale if state.scaler else loss).backward()
    if not last_micro_step:
        return Update(stepped=False)
    if isinstance(state.optimizer, RingAdam):
        return ring_update(state, max_grad_norm)

    masters = state.engine.masters
    average_gradients(masters.gradients() if masters else [p.grad for p in state.engine.params if p.grad is not None])
    # After averaging, one rank's non-finite gradient is non-finite on all: they agree without further communication
    if isinstance(masters, HostMasters):
        grad_norm = clip_in_transit(state, masters, max_grad_norm)
    else:
        if state.scaler:
            state.scaler.unscale(state.engine.params)
        grad_norm = torch.nn.utils.clip_grad_norm_(state.engine.params, max_grad_norm)
    lr = float(state.optimizer.param_groups[0]["lr"])
    if skips_on_device(state):
        result = Update(stepped=True, skipped=step_if_finite(state, grad_norm), grad_norm=grad_norm, lr=lr)
    else:
        result = Update(stepped=True, **decide_on_host(state, float(grad_norm)), lr=lr)
    state.lr_scheduler.step()  # also after a skipped update: the learning rate is a function of the step alone
    state.optimizer.zero_grad(set_to_none=True)
    return result


def clip_in_transit(state: TrainingState, masters: HostMasters, max_grad_norm: float) -> torch.Tensor:
    """Deliver the gradients, clipped and unscaled; returns their norm [], on the host.

    Passes over gigabytes of host memory are what such an update takes its time for. torch's fused Adam divides by
    `grad_scale` in its own pass; for others, gradients are multiplied before they leave the device, if they are there.
    """
    scale = state.scaler.scale if state.scaler else 1.0
    grad_norm = (masters.gradient_norm() / scale).cpu()
    coefficient = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
    if getattr(state.optimizer, "_step_supports_amp_scaling", False):
        state.optimizer.grad_scale = scale / coefficient
        masters.deliver_gradients()
    else:
        masters.deliver_gradients(float(coefficient) / scale)
    return grad_norm


def skips_on_device(state: TrainingState) -> bool:
    """True if the optimizer can skip a step by a flag on the device, as fused Adam does for torch.amp.GradScaler.

    Otherwise the host must know, and waits once per update: other optimizers, DeepSpeed, masters in host memory, and
    whatever must not change in a skipped update: the moving average and fp16's loss scale.
    """
    skips = getattr(state.optimizer, "_step_supports_amp_scaling", False)
    return skips and not (state.scaler or state.engine.ema or isinstance(state.engine.masters, HostMasters))


def step_if_finite(state: TrainingState, grad_norm: torch.Tensor) -> torch.Tensor:
    """Step if `grad_norm` [] is finite; returns whether it was skipped, as a bool [] on the device."""
    skipped = ~grad_norm.isfinite()
    state.optimizer.found_inf = skipped.float()
    apply_gradients(state)
    del state.optimizer.found_inf  # without it, a step is unconditional
    return skipped


def decide_on_host(state: TrainingState, grad_norm: float) -> dict:
    """Step if `grad_norm` is finite; returns the fields of Update that describe the outcome."""
    skipped = not math.isfinite(grad_norm)
    searching = skipped and state.scaler is not None and state.scaler.scale > 1
    if not skipped:
        apply_gradients(state)
    if state.scaler:
        state.scaler.adapt(finite=not skipped)
    return {"skipped": skipped, "searching": searching, "grad_norm": grad_norm}


def zero_update(loss: torch.Tensor, state: TrainingState, last_micro_step: bool) -> Update:
    """`update` under DeepSpeed, which averages, clips and skips by itself."""
    state.optimizer.backward(loss, last_micro_step)
    if not last_micro_step:
        return Update(stepped=False)
    lr = float(state.optimizer.param_groups[0]["lr"])
    grad_norm = state.optimizer.step()
    state.lr_scheduler.step()
    return Update(stepped=True, skipped=not math.isfinite(grad_norm), grad_norm=grad_norm, lr=lr)


def ring_update(state: TrainingState, max_grad_norm: float) -> Update:
    """`update` after the backward passes, for states that are updated block by block: the host decides nothing."""
    if is_distributed():
        average_gradients(state.engine.masters.gradients())
        state.engine.masters.measure_norms()
    lr = float(state.optimizer.param_groups[0]["lr"])
    grad_norm, skipped = state.optimizer.step(max_grad_norm)
    state.lr_scheduler.step()
    return Update(stepped=True, skipped=skipped, grad_norm=grad_norm, lr=lr)


def apply_gradients(state: TrainingState) -> None:
    """Step the optimizer, then update what depends on its weights: the model's copies and the moving average."""
    state.optimizer.step()
    if state.engine.masters:
        state.engine.masters.write_to_model()
    if state.engine.ema:
        state.engine.ema.step(state.engine.params)


def average_gradients(grads: list[torch.Tensor]) -> None:
    """Average the gradients over the ranks in place. Some parameters never get one, the same ones on every rank."""
    if not is_distributed():
        return
    for group in group_by_bytes(grads, REDUCE_BYTES):
        device = reduce_device(group[0])
        # One flat tensor per group: one all-reduce instead of hundreds of small ones
        flat = torch.cat([grad.flatten().to(device, non_blocking=True) for grad in group])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        means = flat.split([grad.numel() for grad in group])
        torch._foreach_copy_(group, [mean.view_as(grad) for grad, mean in zip(group, means, strict=True)])


def reduce_device(grad: torch.Tensor) -> torch.device:
    """The device for all-reduce: NCCL needs GPU tensors, so gradients in host memory pass through the GPU."""
    on_gpu = "nccl" in torch.distributed.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else grad.device
