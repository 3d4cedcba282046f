"""One optimizer update: backward, agreement of all ranks, clipping, step, schedule."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed


REDUCE_BYTES = 256 * 2**20  # gradients are averaged in pieces of this size: few calls, little memory


@dataclass
class TrainingState:
    """What an update changes; also what a checkpoint must hold."""

    params: list[torch.nn.Parameter]  # fp32
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None = None  # fp16 only
    copies: list[torch.nn.Parameter] | None = None  # of params, in the compute dtype, where the model holds those


class Update(NamedTuple):
    """`stepped`: an update is complete; `skipped`: it was not applied, its gradients were not finite.

    `searching`: the gradient scaler of fp16 had room to lower its scale, which is how it finds it: nothing is wrong.
    """

    stepped: bool
    skipped: bool = False
    searching: bool = False
    grad_norm: float = math.nan  # before clipping
    lr: float = math.nan  # that this update was made with


def make_scaler(dtype: torch.dtype) -> torch.amp.GradScaler | None:
    """A gradient scaler where the compute dtype needs one: fp16 gradients underflow without."""
    return torch.amp.GradScaler("cuda") if dtype == torch.float16 else None


def update(loss: torch.Tensor, state: TrainingState, last_micro_step: bool, max_grad_norm: float) -> Update:
    """Accumulate the gradient of `loss` and, at the last micro-step, apply it: the only norm is the clipping's.

    `loss` is already divided by the number of micro-steps. Ranks talk once per update, never between micro-steps.
    """
    (state.scaler.scale(loss) if state.scaler else loss).backward()
    if not last_micro_step:
        return Update(stepped=False)

    average_gradients(state.params)
    if state.scaler:
        state.scaler.unscale_(state.optimizer)
    # After averaging, a non-finite gradient of one rank is non-finite on all: they agree without another message
    grad_norm = float(torch.nn.utils.clip_grad_norm_(state.params, max_grad_norm))
    skipped = not math.isfinite(grad_norm)
    searching = skipped and state.scaler is not None and state.scaler.get_scale() > 1
    if state.scaler:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    elif not skipped:
        state.optimizer.step()
    if state.copies:
        copy_weights(state.params, state.copies)
    lr = state.optimizer.param_groups[0]["lr"]
    state.lr_scheduler.step()  # also after a skipped update: the learning rate is a function of the step alone
    state.optimizer.zero_grad(set_to_none=True)
    return Update(stepped=True, skipped=skipped, searching=searching, grad_norm=grad_norm, lr=lr)


@torch.no_grad()
def copy_weights(params: list[torch.nn.Parameter], copies: list[torch.nn.Parameter]) -> None:
    """Round the fp32 weights to the model's copies."""
    torch._foreach_copy_(copies, params)


def average_gradients(params: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks. Some parameters never get one, the same on every rank."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return
    grads = [param.grad for param in params if param.grad is not None]
    for group in group_by_bytes(grads, REDUCE_BYTES):
        flat = torch.cat([grad.flatten() for grad in group])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for grad, mean in zip(group, flat.split([grad.numel() for grad in group]), strict=True):
            grad.copy_(mean.view_as(grad))


def group_by_bytes(tensors: list[torch.Tensor], limit: int) -> list[list[torch.Tensor]]:
    groups, size = [[]], 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return [group for group in groups if group]
