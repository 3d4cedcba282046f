"""Small updates arrive: in bf16 runs the trained weights are fp32, where a step of 1e-5 is not rounded away."""

import importlib

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from args import parse_training_args
from engine.ring_adam import RingAdam
from random_dataset import write_dataset


LEARNING_RATE, STEPS = 1e-5, 100
SCRIPTS = {"t2v_lora": "cogvideox_text_to_video_lora", "t2v_sft": "cogvideox_text_to_video_sft"}


def trained(optimizer):
    """(key, fp32 weight, gradient) of each trained weight before a step; full fine-tuning has them in halves."""
    if isinstance(optimizer, RingAdam):
        states = optimizer.states
        states.complete()
        gradients = {index: gradient for block in states.blocks for index, gradient in block.gradients.items()}
        return [(index, states.get_master(index), gradients.get(index)) for index in range(len(states.params))]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [(index, param.detach(), param.grad) for index, param in enumerate(params)]


class Watch:
    """Every trained weight as it was before the first update, and where its gradient was ever non-zero."""

    def __init__(self):
        self.start, self.touched, self.optimizer = {}, {}, None

    def __call__(self, optimizer, args, kwargs):
        self.optimizer = optimizer
        for key, weight, gradient in trained(optimizer):
            if key not in self.start:
                self.start[key] = weight.clone()
                self.touched[key] = torch.zeros_like(weight, dtype=torch.bool)
            if gradient is not None:
                self.touched[key] |= gradient != 0

    def moved(self):
        """Share of the weights with a gradient that are no longer what they were."""
        touched = sum(mask.sum().item() for mask in self.touched.values())
        now = {key: weight for key, weight, _ in trained(self.optimizer)}
        moved = sum(((now[key] != self.start[key]) & mask).sum().item() for key, mask in self.touched.items())
        return moved / touched

    def moved_in_bf16(self):
        """The same share for bf16 weights under as many steps of the learning rate in one direction, Adam's largest.

        Without weights that start at 0, a LoRA's B: near 0 bf16 is fine enough.
        """
        weights = torch.cat([start[self.touched[key]] for key, start in self.start.items()])
        weights = weights[weights != 0].bfloat16()
        stepped = weights.clone()
        for _ in range(STEPS):
            stepped -= LEARNING_RATE
        return (stepped != weights).double().mean().item()


@pytest.mark.parametrize("script", SCRIPTS)
def test_updates_of_a_bf16_run_arrive(script, tiny, tmp_path):
    write_dataset(tmp_path / "data", num_clips=4, frames=9, height=32, width=48, text_shape=(16, 32))
    argv = ["--pretrained_model_name_or_path", tiny("5b"), "--data_root", tmp_path / "data", "--load_tensors"]
    argv += ["--output_dir", tmp_path / "out", "--mixed_precision", "bf16", "--optimizer", "adamw", "--seed", 0]
    argv += [
        "--learning_rate",
        LEARNING_RATE,
        "--weight_decay",
        0,
        "--max_train_steps",
        STEPS,
        "--train_batch_size",
        1,
    ]
    watch = Watch()
    hook = register_optimizer_step_pre_hook(watch)
    try:
        importlib.import_module(SCRIPTS[script]).main(parse_training_args(script, list(map(str, argv))))
    finally:
        hook.remove()
    assert {weight.dtype for weight in watch.start.values()} == {torch.float32}
    assert watch.moved() >= 0.99
    assert watch.moved_in_bf16() < 0.5
