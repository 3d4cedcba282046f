"""Loss on clips that are not trained on: it shows whether a run generalizes, and when it begins to memorize.

Every clip is evaluated at ten timesteps. Its noise and latents depend on its path and never change, so two
validations, or two runs with the same seed, differ by the weights alone.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from base.draws import draw_seed
from data.buckets import Bucket
from data.dataset import build_dataset_from_args
from data.loader import collate
from engine.objective import draw_normal
from memory.host import to_device


DRAW_RULE = "source, window, repeat"
NUM_BINS = 10  # of timesteps; the loss is evaluated at the centre of each


@dataclass
class HeldOutClips:
    """The first clips of --validation_data_root; empty without the flag."""

    dataset: Dataset | None
    clip_buckets: list[Bucket]
    prompts: list[str]


@dataclass
class HeldOut:
    """What this rank evaluates: its clips, encoded once, since their draws are fixed too."""

    clips: dict[str, list[torch.Tensor]]  # draw key -> inputs of `losses_of`, on the CPU, latents first
    num_clips: int  # over all ranks
    losses_of: Callable
    seed: int
    num_timesteps: int  # of the noise schedule
    device: torch.device


def read_clips(args, model, seed: int) -> HeldOutClips:
    """Read them like the training data, but never flipped, dropped or cropped at random."""
    if args.validation_data_root is None:
        return HeldOutClips(None, [], [])
    table = args.dataset_file and str(Path(args.validation_data_root, Path(args.dataset_file).name))
    changes = {
        "data_root": args.validation_data_root,
        "dataset_file": table,
        "random_flip": None,
        "text_dropout": 0.0,
        "video_reshape_mode": "none" if args.video_reshape_mode == "none" else "center",
    }
    flags = argparse.Namespace(**vars(args) | changes)
    dataset = build_dataset_from_args(flags, model, seed, as_listed=True)
    count = args.validation_num_clips
    return HeldOutClips(dataset, dataset.clip_buckets[:count], dataset.prompts[:count])


def draw_rule(dataset: Dataset, held_out: HeldOutClips) -> str | None:
    """The rule by which a run draws about clips; None if it draws nothing."""
    return DRAW_RULE if held_out.prompts or dataset.is_random() else None


def encode_clips(run, clips: HeldOutClips, encode: Callable, losses_of: Callable, num_timesteps: int) -> HeldOut:
    """Encode this rank's clips. `encode(batch, seed, sample_ids)` returns `inputs` for `losses_of(*inputs, noise,
    timesteps) -> [B]`, latents first.
    """
    own_seed, device = draw_seed(run.seed, "held_out"), run.device
    encoded = {}
    for index in range(run.rank, len(clips.prompts), run.num_ranks):
        batch, key = to_device(collate([clips.dataset[index]]), device), clips.dataset.draw_keys[index]
        encoded[key] = [tensor.cpu() for tensor in encode(batch, own_seed, [key])]
    return HeldOut(encoded, len(clips.prompts), losses_of, own_seed, num_timesteps, device)


def sum_losses(held_out: HeldOut) -> torch.Tensor:
    """Sum [NUM_BINS] of the losses over this rank's clips. Call it within the engine's inference()."""
    sums = torch.zeros(NUM_BINS, dtype=torch.float64, device=held_out.device)
    width = held_out.num_timesteps / NUM_BINS
    for key, inputs in held_out.clips.items():
        inputs = [tensor.to(held_out.device) for tensor in inputs]
        for number in range(NUM_BINS):
            noise = draw_normal(held_out.seed, f"noise/{number}", [key], inputs[0].shape[1:]).to(held_out.device)
            timesteps = torch.tensor([int((number + 0.5) * width)], device=held_out.device)
            sums[number] += held_out.losses_of(*inputs, noise, timesteps)[0]
    return sums


def mean_losses(accelerator, held_out: HeldOut, sums: torch.Tensor) -> dict:
    """{"loss": mean, "bins": {"0-99": mean, ...}} over the clips of all ranks."""
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    means = (sums / held_out.num_clips).tolist()
    edges = [held_out.num_timesteps * number // NUM_BINS for number in range(NUM_BINS + 1)]
    bins = {f"{first}-{last - 1}": mean for first, last, mean in zip(edges, edges[1:], means, strict=False)}
    return {"loss": sum(means) / NUM_BINS, "bins": bins}
