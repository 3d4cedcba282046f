#!/usr/bin/env python
"""Pretrain the small model from scratch on clips of its world, in three phases, on one GPU.

    python tiny_model/pretrain.py vae --minutes 6
    python tiny_model/pretrain.py t2v --minutes 9
    python tiny_model/pretrain.py i2v --minutes 4

Writes tiny-cogvideox/, tiny-cogvideox-i2v/, a state file per phase and log.jsonl to --out. The same command resumes a
stopped phase. The learning rate decays over --minutes (or --steps), counted over all calls.

Axes: B batch, F' pixel frames, F latent frames, C latent channels, H/W latent size, S text tokens.
"""

import argparse
import copy
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from base import console


if __name__ == "__main__":
    console.set_up()  # before the libraries are imported

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, T5EncoderModel

from base.draws import draw_seed
from cogvideox.config import VaeConfig, load_scheduler, load_vae_config
from cogvideox.encoding import IMAGE_NOISE_MEAN, IMAGE_NOISE_STD, encode_videos
from cogvideox.inputs import condition_on_first_frame, rotary_embeddings, sample_image_latents, sample_latents
from engine.objective import add_noise, v_prediction_loss
from judge import accuracy, judge
from measure import captions_of, measure_image_to_video, measure_vae, sample
from networks import (
    IMAGE_TO_VIDEO,
    LONG_TEXT_LENGTH,
    TEXT_LENGTH,
    TEXT_TO_VIDEO,
    image_to_video_from,
    new_text_encoder,
    new_transformer,
    new_vae,
    num_parameters,
    write_image_to_video,
    write_index,
    write_part,
    write_text_encoder,
    write_vocabulary,
)
from world import CONCEPTS, MEASURED, NUM_WORDINGS, all_contents, caption, draw_clips, test_contents, training_contents


class Recipe(NamedTuple):
    """A phase's defaults."""

    batch_size: int
    learning_rate: float
    average: float  # decay of the weights' moving average, which is what is saved


RECIPES = {"vae": Recipe(32, 1e-3, 0.998), "t2v": Recipe(256, 1e-3, 0.9995), "i2v": Recipe(256, 5e-4, 0.999)}
MAX_GRAD_NORM, MIN_RATE = 1.0, 0.02  # the second relative to the learning rate
KL_WEIGHT = 3e-3
GUIDANCES = (2.0, 6.0)  # guidance scales used in reports
TEXT_DROPOUT, IMAGE_DROPOUT = 0.1, 0.05
LONG_TEXT_EVERY = 4  # every fourth step pads captions to 226 tokens, as the pipelines do; the others to 32


# ---------------------------------------------------------------- the state of a phase


class Learner:
    """Modules in training with their optimizer and moving average; saved to one file."""

    def __init__(self, modules: dict[str, nn.Module], recipe: Recipe, device: str):
        self.modules = nn.ModuleDict(modules).to(device).train()
        self.averages = copy.deepcopy(self.modules).requires_grad_(False).eval()
        self.params = dict(self.modules.named_parameters())
        self.averaged = dict(self.averages.named_parameters())
        self.recipe, self.step, self.seconds = recipe, 0, 0.0
        self.optimizer = torch.optim.AdamW(
            self.params.values(), betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda"
        )

    def update(self, loss: torch.Tensor, rate: float) -> None:
        """One optimizer step at `rate` times the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.params.values()), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(self.recipe.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.values()), list(self.params.values()), 1 - decay)

    def save(self, path: Path) -> None:
        tensors = {f"param.{name}": param.detach() for name, param in self.params.items()}
        tensors |= {f"average.{name}": param for name, param in self.averaged.items()}
        for name, param in self.params.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if param in self.optimizer.state:  # the text half of the last block never gets a gradient
                    tensors[f"{key}.{name}"] = self.optimizer.state[param][key]
        facts = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".tmp"), facts)
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt", device=str(next(iter(self.params.values())).device)) as file, torch.no_grad():
            facts, names = file.metadata(), set(file.keys())
            self.step, self.seconds = int(facts["step"]), float(facts["seconds"])
            for name, param in self.params.items():
                param.copy_(file.get_tensor(f"param.{name}"))
                self.averaged[name].copy_(file.get_tensor(f"average.{name}"))
                if f"exp_avg.{name}" in names:
                    moments = {key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                    # Fused AdamW keeps the step count on the device, others on the CPU
                    step = torch.tensor(float(self.step), device=param.device if param.is_cuda else "cpu")
                    self.optimizer.state[param] = {"step": step, **moments}


# ---------------------------------------------------------------- losses: one function per phase


def vae_loss(vae, batch_size: int, seed: int, device: str, step: int) -> torch.Tensor:
    """Reconstruction loss on clips of the whole world, concepts included: fine-tuning needs the VAE to know them."""
    generator = torch.Generator().manual_seed(draw_seed(seed, "vae", step))
    rows = VAE_CONTENTS[torch.randint(len(VAE_CONTENTS), (batch_size,), generator=generator)]
    clips = draw_clips(rows, draw_seed(seed, "vae clips"), step, device=device)
    pixels = (2 * clips - 1).permute(0, 2, 1, 3, 4)  # [B, 3, F', h, w]
    posterior = vae.encode(pixels).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    noise = torch.randn(mean.shape, generator=generator).to(device)
    rebuilt = vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels) + KL_WEIGHT * kl


VAE_CONTENTS = torch.tensor([row for concept in (None, *CONCEPTS) for row in all_contents(concept)])


class EncodedClips(NamedTuple):
    """Encoded clips from which the transformers' batches are drawn; N clips, T captions."""

    moments: torch.Tensor  # [N, 2C, F, H, W] fp16
    image_moments: torch.Tensor | None  # [N, 2C, 1, H, W], of noised first frames
    rows: torch.Tensor  # [N], index into `tokens`
    tokens: torch.Tensor  # [T, wordings, S]
    empty: torch.Tensor  # [S], the empty caption
    vae_config: VaeConfig
    alphas_cumprod: torch.Tensor


@torch.no_grad()
def make_bank(
    folder: Path, size: int, seed: int, device: str, with_images: bool, contents: torch.Tensor
) -> EncodedClips:
    """`size` clips of `contents`, drawn and encoded; a function of the seed, so they need not be saved."""
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae", dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    generator = torch.Generator().manual_seed(draw_seed(seed, "bank"))
    rows = torch.arange(size) % len(contents)  # each equally often; batches are drawn at random
    moments, image_moments = [], []
    for place, piece in enumerate(rows.split(256)):
        pixels = 2 * draw_clips(contents[piece], draw_seed(seed, "bank clips"), place, device=device) - 1
        moments.append(encode_videos(vae, pixels).half())
        if with_images:
            sigma = (IMAGE_NOISE_MEAN + IMAGE_NOISE_STD * torch.randn(len(piece), generator=generator)).exp()
            noise = torch.randn(pixels[:, :1].shape, generator=generator) * sigma.view(-1, 1, 1, 1, 1)
            image_moments.append(encode_videos(vae, pixels[:, :1] + noise.to(device)).half())
    texts = [caption(row, wording) for row in contents.tolist() for wording in range(NUM_WORDINGS)]
    padded = {"padding": "max_length", "max_length": TEXT_LENGTH, "return_tensors": "pt"}
    tokens = tokenizer([*texts, ""], **padded).input_ids.to(device)
    return EncodedClips(
        torch.cat(moments), torch.cat(image_moments) if with_images else None, rows.to(device),
        tokens[:-1].view(len(contents), NUM_WORDINGS, TEXT_LENGTH), tokens[-1], load_vae_config(folder),
        load_scheduler(folder).alphas_cumprod.to(device),
    )  # fmt: skip


def diffusion_loss(transformer, text_encoder, bank: EncodedClips, batch_size: int, seed: int, device: str, step: int):
    """The project's training objective on a batch of the bank, with image latents if the bank has them."""
    generator = torch.Generator(device).manual_seed(draw_seed(seed, "batch", step))
    random = {"generator": generator, "device": device}
    chosen = torch.randint(len(bank.rows), (batch_size,), **random)
    moments = bank.moments[chosen]
    latent_noise = torch.randn(batch_size, moments.shape[2], moments.shape[1] // 2, *moments.shape[3:], **random)
    latents = sample_latents(moments, latent_noise, bank.vae_config)  # [B, F, C, H, W]
    tokens = bank.tokens[bank.rows[chosen], torch.randint(NUM_WORDINGS, (batch_size,), **random)]  # [B, S]
    dropped = torch.rand(batch_size, 1, **random) < TEXT_DROPOUT
    tokens = torch.where(dropped, bank.empty, tokens)
    if step % LONG_TEXT_EVERY == LONG_TEXT_EVERY - 1:
        tokens = F.pad(tokens, (0, LONG_TEXT_LENGTH - TEXT_LENGTH))  # the pad token's id is 0
    noise = torch.randn(latents.shape, **random)
    # Stratified: each sample from its own interval of the timesteps, as with --stratified_timesteps
    shares = (torch.arange(batch_size, device=device) + torch.rand(batch_size, **random)) / batch_size
    timesteps = (shares * len(bank.alphas_cumprod)).long().clamp(max=len(bank.alphas_cumprod) - 1)
    inputs = add_noise(latents, noise, timesteps, bank.alphas_cumprod)
    if bank.image_moments is not None:
        image_noise = torch.randn(latents[:, :1].shape, **random)
        image_latents = sample_image_latents(bank.image_moments[chosen], image_noise, bank.vae_config)
        kept = torch.rand(batch_size, 1, 1, 1, 1, **random) >= IMAGE_DROPOUT
        inputs = condition_on_first_frame(inputs, image_latents * kept)
    velocity = transformer(
        hidden_states=inputs, encoder_hidden_states=text_encoder(tokens)[0], timestep=timesteps,
        image_rotary_emb=rotary_embeddings(transformer.config, latents), return_dict=False,
    )[0]  # fmt: skip
    return v_prediction_loss(velocity, latents, noise, timesteps, bank.alphas_cumprod).mean()


# ---------------------------------------------------------------- the loop


def learning_rate_share(step: int, progress: float, warmup_steps: int) -> float:
    """Linear warm-up, then cosine decay over the phase."""
    cosine = MIN_RATE + (1 - MIN_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / warmup_steps) * cosine


def train(args, learner: Learner, loss_of, report, started: float) -> None:
    """Train until --minutes or --steps are used up; logs `report(learner)` --num_reports times."""
    device_type = next(iter(learner.params.values())).device.type
    state_path, earlier = args.out / f"state_{args.phase}.safetensors", learner.seconds
    logged, saved, total, count = time.monotonic(), time.monotonic(), 0.0, 0

    def progress() -> float:
        by_time = learner.seconds / (60 * args.minutes) if args.minutes else 0.0
        return max(by_time, learner.step / args.steps if args.steps else 0.0)

    reported = int(progress() * args.num_reports)
    while progress() < 1:
        if args.stop_after and time.monotonic() - started > 60 * args.stop_after:
            break
        with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda" and args.precision == "bf16"):
            loss = loss_of(learner.step)
        learner.update(loss, learning_rate_share(learner.step, progress(), args.warmup_steps))
        total, count = total + loss.detach(), count + 1
        learner.seconds = earlier + time.monotonic() - started
        if time.monotonic() - logged > args.log_seconds:
            mean, rate = float(total) / count, 60 * count / (time.monotonic() - logged)
            log(args, step=learner.step, progress=progress(), loss=mean, steps_a_minute=rate)
            if not math.isfinite(mean):
                raise ArithmeticError(f"the loss is {mean} at step {learner.step}; the last state is {state_path}")
            logged, total, count = time.monotonic(), 0.0, 0
        if int(progress() * args.num_reports) > reported and progress() < 1:
            reported = int(progress() * args.num_reports)
            log(args, step=learner.step, **report(learner))
            logged, total, count = time.monotonic(), 0.0, 0
        if time.monotonic() - saved > 60:
            learner.save(state_path)
            saved = time.monotonic()
    learner.save(state_path)
    log(args, step=learner.step, minutes=learner.seconds / 60, progress=progress(), **report(learner))


def log(args, **values) -> None:
    """Print a line, and append it as JSON to log.jsonl."""
    text = " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
    print(f"{args.phase}: {text}", flush=True)
    with open(args.out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"phase": args.phase, **values}) + "\n")


# ---------------------------------------------------------------- phases


def resume(args, learner: Learner) -> Learner:
    path = args.out / f"state_{args.phase}.safetensors"
    if path.exists():
        learner.load(path)
    sizes = {name: num_parameters(module) for name, module in learner.modules.items()}
    log(args, parameters=sizes, from_step=learner.step)
    return learner


def compile_blocks(transformer, device: str) -> None:
    """One graph per text length, shared by all blocks; otherwise a step launches 1,500 small kernels."""
    if device == "cuda":
        for block in transformer.transformer_blocks:
            block.compile(dynamic=False)


def pretrain_vae(args, recipe: Recipe, device: str, started: float) -> None:
    learner = resume(args, Learner({"vae": new_vae()}, recipe, device))
    contents = test_contents(args.num_clips)

    def report(learner: Learner) -> dict:
        """Also saves the VAE, with the scaling factor that gives its latents unit standard deviation."""
        vae = learner.averages["vae"]
        with torch.no_grad():
            pixels = 2 * draw_clips(torch.tensor(contents), seed=2, device=device) - 1
            moments = torch.cat([encode_videos(vae, piece) for piece in pixels.split(16)])
        raw = sample_latents(
            moments, torch.randn(moments[:, :16].transpose(1, 2).shape, device=device), VaeConfig(1.0, False)
        )
        vae.register_to_config(scaling_factor=round(1 / float(raw.std()), 4))
        write_part(args.out / TEXT_TO_VIDEO, "vae", vae)
        spread = float(moments[:, 16:].mul(0.5).exp().mean() / raw.std())  # posterior std / latents' std
        return {**measure_vae(vae, contents), "scaling_factor": vae.config.scaling_factor, "posterior": spread}

    loss_of = functools.partial(vae_loss, learner.modules["vae"], recipe.batch_size, args.seed, device)
    train(args, learner, loss_of, report, started)


def pretrain_text_to_video(args, recipe: Recipe, device: str, started: float) -> None:
    folder = args.out / TEXT_TO_VIDEO
    tokenizer = write_vocabulary(folder)
    write_index(folder)
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae", dtype=torch.float32).to(device)
    modules = {"transformer": new_transformer(), "text_encoder": new_text_encoder(len(tokenizer))}
    learner = resume(args, Learner(modules, recipe, device))
    bank = make_bank(folder, args.bank, args.seed, device, with_images=False, contents=chosen_contents(args))
    compile_blocks(learner.modules["transformer"], device)
    contents = test_contents(args.num_clips) if args.num_contents is None else chosen_contents(args).tolist()

    def report(learner: Learner) -> dict:
        """Also writes the pipeline."""
        transformer, text_encoder = learner.averages["transformer"], learner.averages["text_encoder"]
        write_part(folder, "transformer", transformer)
        write_text_encoder(folder, text_encoder)
        pipe = CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, load_scheduler(folder))
        scores = {}
        for guidance in GUIDANCES:
            clips = sample(pipe, captions_of(contents), guidance_scale=guidance, max_sequence_length=TEXT_LENGTH)
            found = accuracy(judge(clips), contents)
            scores |= {f"{name}_at_{guidance:g}": found[name] for name in (*MEASURED, "caption")}
        return scores

    models = (learner.modules["transformer"], learner.modules["text_encoder"])
    loss_of = functools.partial(diffusion_loss, *models, bank, recipe.batch_size, args.seed, device)
    train(args, learner, loss_of, report, started)


def chosen_contents(args) -> torch.Tensor:
    """The contents of pretraining; --num_contents of them for a trial."""
    rows = training_contents()
    return rows if args.num_contents is None else rows[:: len(rows) // args.num_contents][: args.num_contents]


def pretrain_image_to_video(args, recipe: Recipe, device: str, started: float) -> None:
    base, folder = args.out / TEXT_TO_VIDEO, args.out / IMAGE_TO_VIDEO
    text_encoder = (
        T5EncoderModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32).to(device).eval()
    )
    text_encoder.requires_grad_(False)
    text_to_video = CogVideoXTransformer3DModel.from_pretrained(base, subfolder="transformer", dtype=torch.float32)
    learner = resume(args, Learner({"transformer": image_to_video_from(text_to_video)}, recipe, device))
    bank = make_bank(base, args.bank, args.seed, device, with_images=True, contents=chosen_contents(args))
    compile_blocks(learner.modules["transformer"], device)
    contents = test_contents(args.num_clips)

    def report(learner: Learner) -> dict:
        """Also writes the pipeline."""
        write_image_to_video(folder, learner.averages["transformer"])
        pipe = CogVideoXImageToVideoPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        return measure_image_to_video(pipe, contents, max_sequence_length=TEXT_LENGTH)

    models = (learner.modules["transformer"], text_encoder)
    loss_of = functools.partial(diffusion_loss, *models, bank, recipe.batch_size, args.seed, device)
    train(args, learner, loss_of, report, started)


PHASES = {"vae": pretrain_vae, "t2v": pretrain_text_to_video, "i2v": pretrain_image_to_video}


def parse_args(argv=None) -> argparse.Namespace:
    parser = console.Parser(description=__doc__)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny-model"))
    parser.add_argument("--minutes", type=float, help="what the phase may take, over all calls")
    parser.add_argument("--steps", type=int, help="updates at most")
    parser.add_argument("--stop_after", type=float, help="minutes after which this call ends, to be continued")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, help="default: the phase's")
    parser.add_argument("--learning_rate", type=float, help="default: the phase's")
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--bank", type=int, default=65536, help="encoded clips to draw from: 12 KB each on the GPU")
    parser.add_argument("--precision", choices=["bf16", "tf32"], default="bf16", help="on a GPU; weights are fp32")
    parser.add_argument("--num_reports", type=int, default=6, help="how often the weights so far are measured")
    parser.add_argument("--num_clips", type=int, default=50, help="of a measurement")
    parser.add_argument("--num_contents", type=int, help="trial: train and measure on so few contents only")
    parser.add_argument("--log_seconds", type=float, default=10.0)
    args = parser.parse_args(argv)
    if not args.minutes and not args.steps:
        parser.error("give --minutes, --steps or both")
    return args


def main(args) -> None:
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.phase]
    recipe = recipe._replace(
        batch_size=args.batch_size or recipe.batch_size, learning_rate=args.learning_rate or recipe.learning_rate
    )
    PHASES[args.phase](args, recipe, device, started)


if __name__ == "__main__":
    main(parse_args())
