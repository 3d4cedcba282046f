"""torch's fused Adam and AdamW, and bitsandbytes' with 8-bit states, on a StateRing; and its fp32 masters by name."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import torch

from engine.block_states import moments
from engine.optimizers import optional_module
from engine.state_ring import StateRing
from memory.recompute import uses_triton


OF_BITSANDBYTES = {"exp_avg": "state1", "exp_avg_sq": "state2"}  # its names of the moments


class WeightsByName(Mapping):
    """fp32 weights, each made by `get(index)` when it is asked for."""

    def __init__(self, states: StateRing, get: Callable[[int], torch.Tensor]):
        self.names, self.get = states.names, get

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.get(self.names[name])

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class RingAdam(torch.optim.Optimizer):
    """torch's fused `kind` (Adam or AdamW), bit for bit, or bitsandbytes' 8-bit one, on the states of a StateRing.

    State dicts are in that optimizer's format. Tensors below 4,096 elements keep fp32 states, as bitsandbytes has it;
    their update is torch's.
    """

    RULES = {torch.optim.Adam: torch._fused_adam_, torch.optim.AdamW: torch._fused_adamw_}

    def __init__(self, states: StateRing, kind: type, settings: dict):
        self.states, self.kind = states, kind
        self.eight_bit = EightBit(states.device) if states.storage.low_bit else None
        super().__init__(states.params, kind(states.params, **settings, fused=True).defaults)
        self.stepped: set[int] = set()  # indices of weights that have moments

    @torch.no_grad()
    def step(self, max_norm: float = math.inf) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient norm before clipping, whether the update was skipped because of it), both [] on the device.

        Blocks are updated right before their next forward pass, by `StateRing.queue_update`, which calls `rule`.
        """
        self.stepped |= set(self.states.norms)
        group = self.param_groups[0]
        return self.states.start_step(functools.partial(self.rule, dict(group)), max_norm)

    def rule(self, group: dict, masters: list, gradients: list, states: dict, counts: list, skipped) -> None:
        """Step flat pieces of weights in place; `states` by name, `counts` of their updates."""
        beta1, beta2 = group["betas"]
        if "absmax1" in states:
            self.eight_bit.step(group, self.kind is torch.optim.AdamW, masters, gradients, states, counts)
            return
        if self.eight_bit:  # counts are on the host
            counts = list(torch.stack(counts).to(skipped.device).unbind())
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps")} | {
            "amsgrad": False,
            "maximize": False,
        }
        moments = states["exp_avg"], states["exp_avg_sq"]
        kernel = self.RULES[self.kind]
        kernel(masters, gradients, *moments, [], counts, **settings, beta1=beta1, beta2=beta2, found_inf=skipped)

    def state_dict(self) -> dict:
        """Views, without a copy; call `states.complete()` first."""
        state = {index: self.state_of(index) for index in sorted(self.stepped)}
        return super().state_dict() | {"state": state}

    def load_state_dict(self, state_dict: dict) -> None:
        entries = ((f"{index}.{name}", value) for index, e in state_dict["state"].items() for name, value in e.items())
        self.load_tensors(entries, state_dict)

    @torch.no_grad()
    def load_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]], rest: dict) -> None:
        """Load a state dict's tensors, named `<index>.<name>`, one by one; `rest` has the param_groups.

        Overwrites everything: what an earlier attempt loaded, too.
        """
        self.stepped = set()
        for name, value in itertools.chain(
            tensors, rest.get("values", {}).items()
        ):  # bitsandbytes counts without tensors
            index, kind = name.split(".")
            if not kind.startswith("qmap"):  # the same for all
                self.state_of(int(index))[kind].copy_(torch.as_tensor(value))
                self.stepped.add(int(index))
        for index in set(self.states.block_of) - self.stepped:
            for state in self.state_of(index).values():
                state.zero_()
        super().load_state_dict({"state": {}, "param_groups": rest["param_groups"]})

    def state_of(self, index: int) -> dict[str, torch.Tensor]:
        """A weight's states, views by the optimizer's names."""
        block = self.states.block_of[index]
        names = OF_BITSANDBYTES if self.states.storage.low_bit else {}
        views = {names.get(kind, kind): block.view(kind, index) for kind in moments(block.buffers)}
        return {"step": self.states.num_updates[index]} | views


class EightBit:
    """bitsandbytes' blockwise update (arXiv 2110.02861), the one of its AdamW8bit and, given L2 decay, Adam8bit.

    By its Triton kernel where Triton compiles; its CUDA kernel is slower beside a forward pass, see `on_default_stream`.
    """

    def __init__(self, device: torch.device):
        functional = optional_module("bitsandbytes.functional", "--use_8bit", "bitsandbytes")
        kernels, self.around = torch.ops.bitsandbytes, on_default_stream
        if uses_triton(device):
            kernels = optional_module("bitsandbytes.backends.triton.ops", "--use_8bit", "bitsandbytes")
            self.around = contextlib.nullcontext
        self.update = kernels.optimizer_update_8bit_blockwise
        self.maps = [functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False)]

    def step(self, group: dict, decouples: bool, masters: list, gradients: list, states: dict, counts: list) -> None:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        if not decouples:
            for master, gradient in zip(masters, gradients, strict=True):
                gradient.add_(master, alpha=decay)
            decay = 0.0
        kinds = zip(*(states[name] for name in ("exp_avg", "exp_avg_sq", "absmax1", "absmax2")), strict=True)
        with self.around(masters[0].device):
            for master, gradient, (*codes, max1, max2), count in zip(masters, gradients, kinds, counts, strict=True):
                self.update(
                    "adam", gradient, master, *codes, beta1, beta2, 0.0, 0.0, group["eps"], int(count), group["lr"],
                    *self.maps, max1, max2, decay, 1.0, False,
                )  # fmt: skip


@contextlib.contextmanager
def on_default_stream(device: torch.device):
    """For bitsandbytes' optimizer kernels (0.50), which run on CUDA's default stream whichever one is current.

    They come after what is queued on the current stream, and what is queued there next comes after them.
    """
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    yield
    current.wait_stream(default)
