"""fp32 master weights (arXiv 1710.03740) for the optimizer, while the model computes with low-precision copies.

In bf16, an update of 1e-5 is rounded away for every weight above 0.004; on an fp32 master it is not. Masters are whole
here, on the device or in host memory. In host memory, the CPU steps the optimizer and keeps its states there; the GPU
then holds only the copies, and the gradients unless they are offloaded too. Split masters, which the GPU updates
wherever their states are, have engine/state_ring.py.
"""

import contextlib
from collections import deque
from collections.abc import Iterator

import torch
from torch import nn

from base.memory_levels import FP32, HOST, HOST_LEVELS, RING, SPLIT, obstacle_to_splitting_from_args
from base.ranks import is_distributed
from engine.split import rounded


SLAB_BYTES = 2**30  # torch rounds pinned allocations up to powers of two: pinned one by one, tensors could take double
MAX_IN_FLIGHT = 8  # gradients being copied to the host; each is kept on the device until its copy is done


def choose_masters_from_args(args, level: str | None, dtype: torch.dtype, num_ranks: int) -> str:
    """FP32, SPLIT, RING or HOST: what full fine-tuning without DeepSpeed uses at `level`, computing in `dtype`.

    The optimizer steps on the GPU, with HOST on the CPU.
    """
    splits = dtype == torch.bfloat16 and obstacle_to_splitting_from_args(args) is None
    if splits and num_ranks == 1 and (level in HOST_LEVELS or args.use_cpu_offload_optimizer):
        return RING
    if args.use_cpu_offload_optimizer:
        return HOST
    return SPLIT if splits else FP32


class Masters:
    """fp32 masters of `model_weights` on `device`. Hooks move each gradient to `master.grad` once backward computed it.

    So low-precision gradients never all exist at once, and accumulation is in fp32. `dtype`: what the model's weights
    are rounded to, if they are not yet.
    """

    def __init__(self, model_weights: list[nn.Parameter], device: torch.device, dtype: torch.dtype | None = None):
        self.model_weights = model_weights
        self.params = [nn.Parameter(copy.detach().to(device, torch.float32, copy=True)) for copy in model_weights]
        for copy, master in zip(model_weights, self.params, strict=True):
            if dtype is not None:
                copy.data = rounded(copy.data, dtype)
            copy.register_post_accumulate_grad_hook(lambda copy, master=master: move_gradient(copy, master))

    def gradients(self) -> list[torch.Tensor]:
        """The accumulated gradients, on whatever device they are, to be averaged over the ranks in place."""
        return [master.grad for master in self.params if master.grad is not None]

    def deliver_gradients(self) -> None:
        """Move the accumulated gradients to `master.grad`."""

    def complete(self) -> None:
        """Nothing to do: every rank has all masters."""

    @torch.no_grad()
    def write_to_model(self, weights: list[torch.Tensor] | None = None) -> None:
        """Copy `weights`, by default the masters, to the model, rounded to its dtype."""
        for copy, weight in zip(self.model_weights, self.params if weights is None else weights, strict=True):
            copy.copy_(rounded(weight, copy.dtype))

    @torch.no_grad()
    def read_from_model(self) -> None:
        """Copy the model's weights, just loaded from a file, to the masters."""
        torch._foreach_copy_(self.params, self.model_weights)


def move_gradient(copy: nn.Parameter, master: nn.Parameter) -> None:
    grad, copy.grad = copy.grad, None
    if master.grad is None:
        master.grad = grad.float()
    else:
        master.grad += grad


class HostMasters(Masters):
    """fp32 masters in pinned host memory; `model_weights` move to `device` in `dtype`, one by one to keep peak memory low.

    Gradients accumulate in fp32 on the device and are copied to the host once per update. With `offload_gradients`
    each is copied as soon as backward has computed it, overlapping with the rest of backward; further micro-steps add
    on the device to the value fetched from the host, so the sums are the same. Their norm is taken on the device, as
    they leave: on the host it takes longer than the forward pass.
    """

    def __init__(
        self,
        model_weights: list[nn.Parameter],
        device: torch.device,
        dtype: torch.dtype,
        offload_gradients: bool = False,
    ):
        self.model_weights, self.device, self.offload_gradients = model_weights, device, offload_gradients
        self.params = []
        for copy, memory in zip(model_weights, host_memory(model_weights, device), strict=True):
            memory.copy_(copy.detach())
            copy.data = rounded(copy.data.to(device), dtype)
            self.params.append(nn.Parameter(memory))
        self.host_grads = list(host_memory(model_weights, device))  # pinned, allocated once
        self.device_grads: dict[int, torch.Tensor] = {}  # fp32 sums, without `offload_gradients`
        self.arrived: set[int] = set()  # indices of host_grads that hold a gradient
        self.norms = torch.zeros(len(model_weights), device=device).unbind()  # of the gradients, valid where they are
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_flight: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()  # (copy done, gradient kept alive)
        for index, copy in enumerate(model_weights):
            copy.register_post_accumulate_grad_hook(lambda copy, index=index: self.take_gradient(index, copy))

    def take_gradient(self, index: int, copy: nn.Parameter) -> None:
        grad, copy.grad = copy.grad, None
        if self.offload_gradients:
            self.send_gradient(index, grad)
        elif index in self.device_grads:
            self.device_grads[index] += grad
        else:
            self.device_grads[index] = grad.float()

    def send_gradient(self, index: int, grad: torch.Tensor) -> None:
        """Add `grad` to the gradient in host memory, on a side stream."""
        if self.stream:  # backward has queued the kernels that compute `grad`, not finished them
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            total = grad.float()
            if index in self.arrived:
                total = total + self.host_grads[index].to(self.device, non_blocking=True)
            self.take_norm(index, total)
            self.host_grads[index].copy_(total, non_blocking=True)
        self.arrived.add(index)
        if self.stream:
            self.in_flight.append((self.stream.record_event(), grad))
            self.wait_for_gradients(MAX_IN_FLIGHT)

    def wait_for_gradients(self, most: int = 0) -> None:
        """Block until at most `most` copies are in flight."""
        while len(self.in_flight) > most:
            self.in_flight.popleft()[0].synchronize()

    def gradients(self) -> list[torch.Tensor]:
        self.wait_for_gradients()
        if self.offload_gradients:
            return [self.host_grads[index] for index in sorted(self.arrived)]
        return [grad for _, grad in sorted(self.device_grads.items())]

    def gradient_norm(self) -> torch.Tensor:
        """The 2-norm [] of the accumulated gradients, on the device."""
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        if is_distributed():  # averaging changed the gradients that had left
            for index in self.arrived:
                self.take_norm(index, self.host_grads[index].to(self.device, non_blocking=True))
        for index, grad in self.device_grads.items():
            self.take_norm(index, grad)
        norms = [self.norms[index] for index in sorted(self.arrived | self.device_grads.keys())]
        return torch.linalg.vector_norm(torch.stack(norms))

    def take_norm(self, index: int, grad: torch.Tensor) -> None:
        self.norms[index].copy_(torch.linalg.vector_norm(grad))

    def deliver_gradients(self, factor: float = 1.0) -> None:
        """Move the accumulated gradients, times `factor`, to `master.grad`."""
        if factor != 1:  # on the device if they are still there
            torch._foreach_mul_(self.gradients(), factor)
        self.wait_for_gradients()
        for index, grad in self.device_grads.items():
            self.host_grads[index].copy_(grad, non_blocking=True)
            self.arrived.add(index)
        if self.stream:  # the CPU optimizer reads them next
            torch.cuda.current_stream(self.device).synchronize()
        self.device_grads.clear()
        for index in self.arrived:
            self.params[index].grad = self.host_grads[index]
        self.arrived.clear()

    @torch.no_grad()
    def write_to_model(self, weights: list[torch.Tensor] | None = None) -> None:
        """Rounds on the device: a direct copy would round on the host, far slower.

        Needs no synchronization: the host changes its weights only after the gradients of a later forward arrived.
        """
        for copy, weight in zip(self.model_weights, self.params if weights is None else weights, strict=True):
            copy.copy_(rounded(weight.to(self.device, non_blocking=True), copy.dtype))


def host_memory(like: list[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield fp32 host tensors shaped like `like`, pinned if `device` is a GPU; allocated lazily."""
    shapes = [torch.empty_like(tensor, dtype=torch.float32, device="meta") for tensor in like]
    for group in group_by_bytes(shapes, SLAB_BYTES):
        sizes = [tensor.numel() for tensor in group]
        slab = torch.empty(sum(sizes), pin_memory=device.type == "cuda")
        for piece, tensor in zip(slab.split(sizes), group, strict=True):
            yield piece.view(tensor.shape)


def group_by_bytes(tensors: list[torch.Tensor], limit: int) -> list[list[torch.Tensor]]:
    groups, size = [[]], 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return [group for group in groups if group]
