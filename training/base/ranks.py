"""Communication between the ranks of a run, outside of training steps."""

import time
from collections.abc import Callable

import torch
import torch.distributed

from base.errors import UserError


EXCHANGE_TIMEOUT = 24 * 3600  # timeout for barriers outside of collectives


def on_main_process(accelerator, function: Callable):
    """Call `function()` on the main process and broadcast its result. A UserError is raised on all ranks.

    Otherwise the others would wait for a process that is gone, and report a different error.
    """
    outcome = [None]
    if accelerator.is_main_process:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def has_several_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def exchange_on_host(name: str, message: str = "") -> list[str]:
    """Barrier `name` (unique per run) through the process group's store; returns each rank's message, in rank order.

    Through the process group's store, not a collective: that would wait for the GPU, and end the run if a rank takes
    longer than --nccl_timeout. A gloo group would not, but while it waits the first Ctrl-C is not heard, and a process
    that leaves does not end before the others come.
    """
    if not has_several_ranks():
        return [message]
    store = group_store()
    keys = [f"{name}/{rank}" for rank in range(torch.distributed.get_world_size())]
    store.set(keys[torch.distributed.get_rank()], message)
    deadline, pause = time.monotonic() + EXCHANGE_TIMEOUT, 0.001
    while not store.check(keys):
        if time.monotonic() > deadline:
            raise UserError(f"{name}: another process did not come within {EXCHANGE_TIMEOUT // 3600} hours")
        time.sleep(pause)  # short, so that Ctrl-C is handled
        pause = min(1.2 * pause, 0.1)
    return [message.decode() for message in store.multi_get(keys)]


def group_store() -> torch.distributed.Store:
    """The key-value store that the ranks share: on the host, whatever the backend."""
    return torch.distributed.group.WORLD.get_group_store()


def all_gather_objects(value) -> list:
    """All-gather: `value` of every rank, in rank order."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def min_over_ranks(*numbers: float) -> list[float]:
    """Elementwise minimum over all ranks, so that they make the same choice."""
    return [min(values) for values in zip(*all_gather_objects(numbers), strict=True)]
