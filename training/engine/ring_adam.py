"""torch's fused Adam and AdamW on the states of a StateRing, and its fp32 masters by name."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping

import torch

from engine.block_states import MOMENTS
from engine.state_ring import StateRing


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
    """torch's fused `kind` (Adam or AdamW), bit for bit, on the states of a StateRing; state dicts are in its format."""

    RULES = {torch.optim.Adam: torch._fused_adam_, torch.optim.AdamW: torch._fused_adamw_}

    def __init__(self, states: StateRing, kind: type, settings: dict):
        self.states, self.kernel = states, self.RULES[kind]
        super().__init__(states.params, kind(states.params, **settings, fused=True).defaults)
        self.stepped: set[int] = set()  # indices of weights that have moments

    @torch.no_grad()
    def step(self, max_norm: float = math.inf) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient norm before clipping, whether the update was skipped because of it), both [] on the device."""
        self.stepped |= set(self.states.norms)
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        rule = functools.partial(self.kernel, **settings, beta1=beta1, beta2=beta2)
        return self.states.start_step(rule, max_norm)

    def state_dict(self) -> dict:
        """Views, without a copy; call `states.complete()` first."""
        state = {}
        for index in sorted(self.stepped):
            state[index] = {kind: self.place(index, kind) for kind in ("step", *MOMENTS)}
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
        for name, tensor in tensors:
            index, kind = name.split(".")
            self.place(int(index), kind).copy_(tensor)
            self.stepped.add(int(index))
        for index in set(self.states.block_of) - self.stepped:
            for kind in ("step", *MOMENTS):
                self.place(index, kind).zero_()
        super().load_state_dict({"state": {}, "param_groups": rest["param_groups"]})

    def place(self, index: int, kind: str) -> torch.Tensor:
        """The state `kind`, by torch's name, of a weight."""
        return self.states.num_updates[index] if kind == "step" else self.states.block_of[index].view(kind, index)
