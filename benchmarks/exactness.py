#!/usr/bin/env python3
"""Measure how memory levels, attention kernels and base precisions change losses and LoRA gradients, compared with the
stock block under full checkpointing.

    python benchmarks/random_dataset.py data/random --num_clips 8
    python benchmarks/exactness.py models/5b --data data/random --label 5b --csv benchmarks/exactness.csv \\
        --rows balanced@fa4 speed balanced+fp8

A row is LEVEL[@ATTENTION][+PRECISION], values of --memory, --attention and --base_precision; "checkpointing" stands
for --gradient_checkpointing. Clip, latent, noise and timestep of each sample are the same in every row; timesteps are
evenly spaced. First the gradients of the mean loss are compared, then the losses of --steps updates, cycling through
the samples. B of the LoRA is random: with the usual zero, the gradient of A would be zero too. Losses and gradients
depend on the weights: to quote precision figures, use a released model, not a random one.
"""

import argparse
import csv
import shlex
import statistics
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console


if __name__ == "__main__":
    console.set_up()  # before the libraries are imported

import torch

import cogvideox_image_to_video_lora
import cogvideox_text_to_video_lora
from args import parse_training_args
from base.errors import UserError
from base.flag_checks import BASE_PRECISIONS, MEMORY_LEVELS
from cogvideox.config import WeightFiles, load_vae_config, read_config
from cogvideox.folder import resolve_model_dir, transformer_folder
from cogvideox.loading import load_transformer
from cogvideox.models import Model
from data.latents import LatentDataset
from data.loader import collate
from engine.compose import build_lora_engine_from_args
from engine.lora import add_lora
from engine.objective import draw_generator, draw_normal
from memory.quantization import check_base_precision, num_bytes
from step_time import package_versions


GIB = 2**30
REFERENCE = "reference"
LEVELS = ("checkpointing", *(level for level in MEMORY_LEVELS if level not in ("auto", "plan")))
DTYPE, LEARNING_RATE = torch.bfloat16, 1e-4
SEED = 0
LORA_B_STD = 0.01  # with peft's initialization of A, the adapter changes a layer's output by about 4 %
FIELDS = ["label", "row", "samples", "loss", "loss_change", "largest_loss_change", "cosine_min", "cosine_median"]
FIELDS += ["norm_ratio", "steps", "largest_step_change", "weights_gib", "card", *package_versions(), "command"]


class Task:
    """A model with its training script's functions for inputs and losses, and the noise schedule."""

    def __init__(self, model_dir, device):
        folder = resolve_model_dir(model_dir, ["transformer", "scheduler", "vae/config.json"])
        weights = WeightFiles(transformer_folder(folder), None)
        self.model = Model(folder, read_config(folder, "transformer"), load_vae_config(folder), weights)
        self.key = "i2v_lora" if self.model.image_to_video else "t2v_lora"
        self.device, self.alphas_cumprod = device, self.model.load_scheduler().alphas_cumprod.to(device)

    def encode(self, *batch):
        """(latents, prompt_embeds, and of image-to-video image_latents) of (batch, seed, positions)."""
        given = self.model, None, {}, *batch
        if self.model.image_to_video:
            return cogvideox_image_to_video_lora.encode_batch(
                argparse.Namespace(image_latent_scale="pipeline"), *given
            )
        return cogvideox_text_to_video_lora.encode_batch(*given)

    def losses_of(self, transformer, *sample):
        script = cogvideox_image_to_video_lora if self.model.image_to_video else cogvideox_text_to_video_lora
        return script.compute_losses(transformer, self.alphas_cumprod, DTYPE, *sample)

    def samples(self, data_root, count):
        """The arguments of `losses_of` after the transformer, for each sample."""
        dataset, num_timesteps, samples = LatentDataset(data_root, seed=SEED), len(self.alphas_cumprod), []
        for place in range(count):
            batch = collate([dataset[place % len(dataset)]])
            inputs = self.encode(batch, SEED, [place])
            noise = draw_normal(SEED, "noise", [place], inputs[0].shape[1:])
            timesteps = torch.tensor([int((place + 0.5) * num_timesteps / count)])
            samples.append([tensor.to(self.device) for tensor in (*inputs, noise, timesteps)])
        self.shape = self.model.attention_shape(dataset.clip_buckets, batch_size=1)
        return samples


def parse_row(row):
    """(level, attention, precision) of LEVEL[@ATTENTION][+PRECISION]."""
    rest, _, precision = row.partition("+")
    level, _, attention = rest.partition("@")
    if level not in LEVELS or precision not in ("", *BASE_PRECISIONS):
        raise argparse.ArgumentTypeError(
            f"{row}: is not LEVEL[@ATTENTION][+PRECISION] with a level of {', '.join(LEVELS)} and a precision of "
            f"{', '.join(BASE_PRECISIONS)}"
        )
    return level, attention or "auto", precision or "bf16"


def make_transformer(task, row, rank):
    """The stock model with peft's adapter for the reference row, otherwise as the engine builds it."""
    transformer = load_transformer(task.model.weights.folder, DTYPE)
    if row == REFERENCE:
        add_lora(transformer, rank, rank, SEED)
        transformer.enable_gradient_checkpointing()
        return transformer.to(task.device).train()
    level, attention, precision = parse_row(row)
    check_base_precision(precision, DTYPE, task.device)
    flags = ["--pretrained_model_name_or_path", str(task.model.folder), "--data_root", ".", "--load_tensors"]
    flags += ["--gradient_checkpointing"] if level == "checkpointing" else ["--memory", level]
    flags += ["--rank", str(rank), "--lora_alpha", str(rank), "--attention", attention, "--base_precision", precision]
    args, run = parse_training_args(task.key, flags), argparse.Namespace(device=task.device, seed=SEED)
    return build_lora_engine_from_args(
        args, args.memory, transformer, task.model, task.shape, run, resumes=False
    ).transformer


def measure(task, row, samples, rank, num_steps):
    """(losses, {name: gradient} on the CPU, losses of the updates, bytes of frozen weights)."""
    torch.compiler.reset()
    transformer = make_transformer(task, row, rank)
    trained = {name: param for name, param in transformer.named_parameters() if param.requires_grad}
    generator = draw_generator(SEED, "lora_b")
    for name, param in trained.items():
        if "lora_B" in name:
            param.data.copy_(LORA_B_STD * torch.randn(param.shape, generator=generator))
    losses = []
    for sample in samples:
        loss = task.losses_of(transformer, *sample).mean()
        (loss / len(samples)).backward()
        losses.append(loss.item())
    grads = {name: param.grad.cpu() for name, param in trained.items()}
    optimizer, step_losses = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE), []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = task.losses_of(transformer, *samples[step % len(samples)]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        step_losses.append(loss.item())
    return losses, grads, step_losses, num_bytes(transformer)


def compare(measured, reference):
    """A row's figures, relative to the reference."""
    (losses, grads, step_losses, size), (true_losses, true_grads, true_step_losses, _) = measured, reference
    pairs = [(grads[name].flatten(), true.flatten()) for name, true in true_grads.items()]
    cosines = [torch.cosine_similarity(ours, true, dim=0).item() for ours, true in pairs]
    norm, true_norm = (torch.cat(flat).norm().item() for flat in zip(*pairs, strict=True))
    mean, true_mean = statistics.fmean(losses), statistics.fmean(true_losses)
    return {
        "loss": round(mean, 6),
        "loss_change": round(mean / true_mean - 1, 6),
        "largest_loss_change": largest_change(losses, true_losses),
        "steps": len(step_losses),
        "largest_step_change": largest_change(step_losses, true_step_losses),
        "cosine_min": round(min(cosines), 6),
        "cosine_median": round(statistics.median(cosines), 6),
        "norm_ratio": round(norm / true_norm, 5),
        "weights_gib": round(size / GIB, 5),
    }


def largest_change(losses, true_losses):
    changes = [abs(ours / true - 1) for ours, true in zip(losses, true_losses, strict=True)]
    return round(max(changes, default=0.0), 6)


def rows_of(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = Task(args.model, device)
    samples = task.samples(args.data, args.num_samples)
    about = {"label": args.label, "samples": args.num_samples, **package_versions()}
    about["card"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about["command"] = shlex.join(["python", "benchmarks/exactness.py", *args.argv])
    reference = None
    for name in [REFERENCE, *args.rows]:
        measured = measure(task, name, samples, args.rank, args.steps)
        reference = reference or measured
        row = about | {"row": name} | compare(measured, reference)
        yield {field: row[field] for field in FIELDS}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = console.Parser(description=__doc__)
    parser.add_argument("model", help="folder of a pipeline, released or random")
    parser.add_argument("--data", required=True, help="prepared folder; its clips are taken in turn")
    parser.add_argument("--num_samples", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA on attention (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=["balanced"], help="LEVEL[@ATTENTION][+PRECISION]")
    parser.add_argument("--steps", type=int, default=50, help="updates (default: %(default)s)")
    parser.add_argument("--label", default="", help="name of the rows")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args(argv, argparse.Namespace(argv=argv))
    for row in args.rows:
        try:
            parse_row(row)
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
    if args.csv and args.csv.exists() and args.csv.read_text().partition("\n")[0] != ",".join(FIELDS):
        sys.exit(f"{args.csv}: has other columns than this script writes; name another file")
    shown = ("row", "largest_loss_change", "cosine_min", "cosine_median", "largest_step_change", "weights_gib")
    print(" ".join(f"{field:>19}" for field in shown))
    try:
        for row in rows_of(args):
            print(" ".join(f"{row[field]:>19}" for field in shown), flush=True)
            if args.csv:
                is_new = not args.csv.exists()
                with open(args.csv, "a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                    writer.writerows([dict(zip(FIELDS, FIELDS, strict=True)), row] if is_new else [row])
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
