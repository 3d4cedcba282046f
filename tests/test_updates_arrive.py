"""Small updates arrive: in bf16 runs the trained weights are fp32, where a step of 1e-5 is not rounded away."""

import importlib

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from args import parse_training_args
from random_dataset import write_dataset


LEARNING_RATE, STEPS = 1e-5, 100
SCRIPTS = {"t2v_lora": "cogvideox_text_to_video_lora", "t2v_sft": "cogvideox_text_to_video_sft"}


class Watch:
    """Every trained weight as it was before the first update, and where its gradient was ever non-zero."""

    def __init__(self):
        self.start, self.touched = {}, {}

    def __call__(self, optimizer, args, kwargs):
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            if param not in self.start:
                self.start[param] = param.detach().clone()
                self.touched[param] = torch.zeros_like(param, dtype=torch.bool)
            if param.grad is not None:
                self.touched[param] |= param.grad != 0

    def moved(self):
        """Share of the weights with a gradient that are no longer what they were."""
        touched = sum(mask.sum().item() for mask in self.touched.values())
        moved = sum(((param != self.start[param]) & mask).sum().item() for param, mask in self.touched.items())
        return moved / touched

    def moved_in_bf16(self):
        """The same share for bf16 weights under as many steps of the learning rate in one direction, Adam's largest.

        Without weights that start at 0, a LoRA's B: near 0 bf16 is fine enough.
        """
        weights = torch.cat([start[self.touched[param]] for param, start in self.start.items()])
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
    assert {param.dtype for param in watch.start} == {torch.float32}
    assert watch.moved() >= 0.99
    assert watch.moved_in_bf16() < 0.5
