"""What the ranks of a run tell one another."""

import time
from collections.abc import Callable

import torch
import torch.distributed

from base.errors import UserError


MEETING_SECONDS = 24 * 3600  # longest that ranks wait for one another outside of collectives


def on_main_process(accelerator, function: Callable):
    """What `function()` returns on the main process, for all ranks. A UserError there is raised on all of them.

    Else the others would wait for a process that is gone, and say something else in its place.
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


def meet(name: str, message: str = "") -> list[str]:
    """Wait until every rank has come to `name`, a name used once a run; returns their messages, in order.

    Through the process group's store: a collective would wait for the GPU, and end the run where one rank takes longer
    than --nccl_timeout. One of a gloo group of our own would not, but within it the first Ctrl-C is not heard until the
    other ranks have come, and a process that is left while one is under way does not end before they do.
    """
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return [message]
    store = group_store()
    keys = [f"{name}/{rank}" for rank in range(torch.distributed.get_world_size())]
    store.set(keys[torch.distributed.get_rank()], message)
    deadline, pause = time.monotonic() + MEETING_SECONDS, 0.001
    while not store.check(keys):
        if time.monotonic() > deadline:
            raise UserError(f"{name}: another process did not come within {MEETING_SECONDS // 3600} hours")
        time.sleep(pause)  # in slices, so that Ctrl-C is heard
        pause = min(1.2 * pause, 0.1)
    return [message.decode() for message in store.multi_get(keys)]


def group_store() -> torch.distributed.Store:
    """The key-value store that the ranks share: on the host, whatever the backend."""
    return torch.distributed.group.WORLD.get_group_store()


def gather_objects(value) -> list:
    """`value` of every rank, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def smallest_of_all_ranks(*numbers: float) -> list[float]:
    """The smallest of each over all ranks, so that they choose alike."""
    return [min(values) for values in zip(*gather_objects(numbers), strict=True)]
