"""What a run trains, in one of two ways: a LoRA on a frozen transformer, or every weight of it.

Both share an interface: `params` (fp32, for the optimizer), `weights` (`params` by name), `masters` (`params` and the
model's low-precision copies of them, if these differ), `ema` (moving average of `params`, if enabled), `save` and
`check` (the result), `save_state` and `load_state` (for checkpoints), `inference`.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from engine.lora import check_saved_lora, load_lora, save_lora, save_unscaled
from engine.master_weights import Masters
from engine.ring_adam import WeightsByName
from engine.sft import (
    MASTERS_NAME,
    by_name,
    check_saved_transformer,
    load_average,
    load_weights,
    save_average,
    save_transformer,
    save_weights,
    setter,
    swapped,
)
from engine.state_ring import StateRing, averaged


@dataclass
class Engine:
    transformer: nn.Module
    params: list[nn.Parameter]
    inference_notes: dict  # what inference must do as training did, beyond a plain load; written beside the result
    level: str | None  # of memory

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """`params` by the model's names. A value may be made when asked for: ask for each once, one by one."""
        return by_name(self.transformer, self.params)

    def complete(self) -> None:
        """Before weights or optimizer states are read: finish updates, all-gather shards. All ranks must call it."""
        if self.masters:
            self.masters.complete()

    @contextlib.contextmanager
    def inference(self):
        """The transformer in eval mode without gradients; back in training mode on exit."""
        self.transformer.eval()
        try:
            with torch.no_grad():
                yield self.transformer
        finally:
            self.transformer.train()


@dataclass
class LoraEngine(Engine):
    """A frozen transformer in the compute dtype with a trainable fp32 adapter."""

    pipeline_class: type
    masters: Masters | None = None
    ema = None

    def save(self, directory: Path) -> Path:
        return save_lora(self.transformer, directory, self.pipeline_class, self.inference_notes)

    def check(self, directory: Path) -> None:
        check_saved_lora(self.transformer, directory)

    def save_state(self, directory: Path) -> None:
        self.save(directory)
        save_unscaled(self.transformer, directory)

    def load_state(self, directory: Path) -> None:
        load_lora(self.transformer, directory)
        if self.masters:
            self.masters.read_from_model()


@dataclass
class SftEngine(Engine):
    """A transformer in the compute dtype with all weights trained, on fp32 masters."""

    save_dtype: torch.dtype
    masters: Masters | None = None
    ema: EMAModel | None = None

    @property
    def average(self) -> Mapping[str, torch.Tensor]:
        """The moving average by the model's names."""
        return by_name(self.transformer, self.ema.shadow_params)

    @property
    def result(self) -> Mapping[str, torch.Tensor]:
        """The weights that are saved and validated: the moving average if there is one."""
        return self.average if self.ema else self.weights

    def save(self, directory: Path) -> Path:
        return save_transformer(self.transformer, self.result, self.save_dtype, directory, self.inference_notes)

    def check(self, directory: Path) -> None:
        check_saved_transformer(self.transformer, self.result, self.save_dtype, directory)

    def save_state(self, directory: Path) -> None:
        self.save(directory)
        save_weights(self.transformer, self.weights, directory / MASTERS_NAME)
        if self.ema:
            save_average(self.transformer, self.average, self.ema.optimization_step, directory)

    def load_state(self, directory: Path) -> None:
        load_weights(self.transformer, self.set_weight(), directory / MASTERS_NAME)
        if self.ema:
            self.ema.optimization_step = load_average(self.transformer, setter(self.average), directory)
        if self.masters:
            self.masters.write_to_model()

    def set_weight(self) -> Callable[[str, torch.Tensor], None]:
        return setter(self.weights)

    @contextlib.contextmanager
    def inference(self):
        with self.averaged_weights(), super().inference() as transformer:
            yield transformer

    @contextlib.contextmanager
    def averaged_weights(self):
        """Swap the moving average into the model; on exit the trained weights are restored bit for bit."""
        if self.ema is None:
            yield
        elif self.masters is None:
            with swapped(self.params, self.ema.shadow_params):
                yield
        else:
            self.masters.write_to_model(self.ema.shadow_params)
            try:
                yield
            finally:
                self.masters.write_to_model()


@dataclass
class SplitSftEngine(SftEngine):
    """The same on split masters: fp32 values are made while they are read, one at a time."""

    masters: StateRing

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        return WeightsByName(self.masters, self.masters.get_master)

    @property
    def average(self) -> Mapping[str, torch.Tensor]:
        return WeightsByName(self.masters, self.masters.get_average)

    def set_weight(self) -> Callable[[str, torch.Tensor], None]:
        return lambda name, value: self.masters.set_master(self.masters.names[name], value)

    @contextlib.contextmanager
    def averaged_weights(self):
        # Whoever renders may move the weights, and needs memory
        with self.masters.at_rest(), averaged(self.masters) if self.ema else contextlib.nullcontext():
            yield
