#!/usr/bin/env python3
"""What --base_precision costs: loss and LoRA gradient with frozen weights of each precision against those with bf16.

    python benchmarks/random_dataset.py data/random --num_clips 8
    python benchmarks/precision_price.py models/5b --data data/random --label 5b --csv benchmarks/precision.csv

Clip, latent, noise and timestep of each sample are the same for every precision; timesteps are spread evenly. The
gradient is that of the mean loss. B of the LoRA is drawn at random: where training starts it is zero, and with it the
gradient of A. Losses and gradients depend on the weights: take a released model, not a random one, for figures to quote.
"""

import argparse
import csv
import functools
import shlex
import statistics
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import cogvideox_image_to_video_lora
import cogvideox_text_to_video_lora
from cogvideox import load_scheduler, load_transformer, load_vae_config, read_config, takes_image
from dataset import LatentDataset, collate
from errors import UserError
from lora import add_lora
from memory import compile_blocks
from objective import draw_generator, draw_normal
from quantization import check_base_precision, num_bytes, quantize_base
from step_time import package_versions


GIB = 2**30
PRECISIONS = ("bf16", "fp8", "int8", "nf4")
SEED = 0
LORA_B_STD = 0.01  # with A's as peft draws it, the adapter changes a layer's output by about 4 %
FIELDS = ["label", "precision", "samples", "loss", "loss_change", "largest_loss_change"]
FIELDS += ["cosine_min", "cosine_median", "norm_ratio", "weights_gib", "card", *package_versions(), "command"]


class Task:
    """How a model's own script makes inputs and losses, and the noise schedule."""

    def __init__(self, model_dir, device):
        self.model_dir, self.device = Path(model_dir), device
        config = read_config(self.model_dir, "transformer")
        scheduler, vae_config = load_scheduler(self.model_dir), load_vae_config(self.model_dir)
        script = cogvideox_image_to_video_lora if takes_image(config) else cogvideox_text_to_video_lora
        more = {"image_latent_scale": "pipeline"} if takes_image(config) else {}
        given = {"vae": None, "embeds": {}, "vae_config": vae_config, "patch_size_t": config.get("patch_size_t")}
        self.encode = functools.partial(script.encode_batch, **given, **more)
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)
        self.losses_of = functools.partial(
            script.compute_losses, alphas_cumprod=self.alphas_cumprod, dtype=torch.bfloat16
        )

    def samples(self, data_root, count):
        """What `losses_of` takes after the transformer, for each sample."""
        dataset, num_timesteps, samples = LatentDataset(data_root, seed=SEED), len(self.alphas_cumprod), []
        for place in range(count):
            batch = collate([dataset[place % len(dataset)]])
            inputs = self.encode(batch, SEED, [place])
            noise = draw_normal(SEED, "noise", [place], inputs[0].shape[1:])
            timesteps = torch.tensor([int((place + 0.5) * num_timesteps / count)])
            samples.append([tensor.to(self.device) for tensor in (*inputs, noise, timesteps)])
        return samples


def make_transformer(task, precision, rank, compiled):
    """(transformer with an adapter over frozen weights of `precision`, the adapter's weights by name)."""
    transformer = load_transformer(task.model_dir, torch.bfloat16)
    add_lora(transformer, rank, rank, SEED)
    trained = {name: param for name, param in transformer.named_parameters() if param.requires_grad}
    generator = draw_generator(SEED, "lora_b")
    for name, param in trained.items():
        if "lora_B" in name:
            param.data = LORA_B_STD * torch.randn(param.shape, generator=generator)
    if precision != "bf16":
        quantize_base(transformer, precision, task.device)
    transformer.enable_gradient_checkpointing()
    if compiled:
        compile_blocks(transformer.transformer_blocks)
    return transformer.to(task.device).train(), trained


def measure(task, precision, samples, rank, compiled):
    """(losses, gradients by name on the CPU, bytes of frozen weights)."""
    check_base_precision(precision, torch.bfloat16, task.device)
    torch.compiler.reset()
    transformer, trained = make_transformer(task, precision, rank, compiled)
    losses = []
    for sample in samples:
        loss = task.losses_of(transformer, *sample).mean()
        (loss / len(samples)).backward()
        losses.append(loss.item())
    return losses, {name: param.grad.cpu() for name, param in trained.items()}, num_bytes(transformer)


def compare(measured, reference):
    """The figures of a row."""
    (losses, grads, size), (true_losses, true_grads, _) = measured, reference
    pairs = [(grads[name].flatten(), true.flatten()) for name, true in true_grads.items()]
    cosines = [torch.cosine_similarity(ours, true, dim=0).item() for ours, true in pairs]
    norm, true_norm = (torch.cat(flat).norm().item() for flat in zip(*pairs, strict=True))
    mean, true_mean = statistics.fmean(losses), statistics.fmean(true_losses)
    changes = [abs(ours / true - 1) for ours, true in zip(losses, true_losses, strict=True)]
    return {
        "loss": round(mean, 6),
        "loss_change": round(mean / true_mean - 1, 6),
        "largest_loss_change": round(max(changes), 6),
        "cosine_min": round(min(cosines), 6),
        "cosine_median": round(statistics.median(cosines), 6),
        "norm_ratio": round(norm / true_norm, 5),
        "weights_gib": round(size / GIB, 5),
    }


def rows_of(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = Task(args.model, device)
    samples = task.samples(args.data, args.num_samples)
    about = {"label": args.label, "samples": args.num_samples, **package_versions()}
    about["card"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about["command"] = shlex.join(["python", "benchmarks/precision_price.py", *args.argv])
    reference = None
    for precision in ["bf16", *(name for name in args.precisions if name != "bf16")]:
        measured = measure(task, precision, samples, args.rank, args.compile_blocks)
        reference = reference or measured
        row = about | {"precision": precision} | compare(measured, reference)
        yield {field: row[field] for field in FIELDS}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline, released or random")
    parser.add_argument("--data", required=True, help="prepared folder; its clips are taken in turn")
    parser.add_argument("--num_samples", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA on attention (default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="bf16 always is there")
    parser.add_argument("--compile_blocks", action="store_true", help="compile blocks, as training on a GPU does")
    parser.add_argument("--label", default="", help="name of the rows")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args(argv, argparse.Namespace(argv=argv))
    if args.csv and args.csv.exists() and args.csv.read_text().partition("\n")[0] != ",".join(FIELDS):
        sys.exit(f"{args.csv}: has other columns than this script writes; name another file")
    shown = ("precision", "loss_change", "largest_loss_change", "cosine_min", "cosine_median", "weights_gib")
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
