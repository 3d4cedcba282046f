"""Checks of flags that need nothing but the flags: values, ranges, combinations."""

import argparse
import difflib
import math
from collections.abc import Callable
from urllib.parse import urlsplit

from base.flag_parser import NO_MEANING, FlagParser
from base.memory_levels import HOST_LEVELS, LEVELS, obstacle_to_splitting_from_args


SIZES = [256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536]
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
RESHAPE_MODES = ("center", "random", "none")
LORA_INITS = ("default", "gaussian", "orthogonal")
CHANGES_BASE = "it changes the base weights too, and diffusers would load the LoRA onto the unchanged ones"
NEEDS_PASS = "it needs the layers' inputs on the data, and there is no pass for that here"
REFUSED_INITS = {
    "pissa": CHANGES_BASE,
    "olora": CHANGES_BASE,
    "corda": CHANGES_BASE,
    "loftq": CHANGES_BASE,
    "lora_ga": CHANGES_BASE,
    "eva": NEEDS_PASS,
    "mica": "it trains only half of the LoRA",
}
MEMORY_LEVELS = (*LEVELS, "auto", "plan")
BASE_PRECISIONS = ("bf16", "fp8", "int8", "nf4")
TRACKERS = ("wandb", "tensorboard", "trackio", "all", "none")
# Flags that do nothing without another one: (what they need, is it there, flags). Only a warning, because the original's
# wrappers always pass them.
IDLE_WITHOUT = (
    (
        "--validation_prompt",
        lambda args: args.validation_prompt is not None,
        (
            "validation_images", "validation_prompt_separator", "num_validation_videos", "guidance_scale",
            "use_dynamic_cfg", "enable_model_cpu_offload", "num_inference_steps", "validation_attention",
        ),
    ),
    (
        "--validation_prompt or --validation_data_root",
        lambda args: args.validation_prompt is not None or args.validation_data_root is not None,
        ("validation_epochs", "validation_steps", "no_first_validation"),
    ),
    ("--validation_data_root", lambda args: args.validation_data_root is not None, ("validation_num_clips",)),
    ("--report_to", lambda args: args.report_to not in (None, "none"), ("tracker_name", "logging_dir")),
    ("--push_to_hub", lambda args: args.push_to_hub, ("hub_model_id", "hub_public", "hub_token")),
    ("--ema", lambda args: args.ema, ("ema_decay",)),
    ("--use_cpu_offload_optimizer", lambda args: args.use_cpu_offload_optimizer, ("offload_gradients",)),
    (
        "--memory auto, offload or stream, or --use_cpu_offload_optimizer",
        lambda args: args.memory in ("auto", "plan", *HOST_LEVELS) or args.use_cpu_offload_optimizer,
        ("states_on_gpu",),
    ),
    (
        "--optimizer prodigy",
        lambda args: args.optimizer == "prodigy",
        ("prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"),
    ),
    ("--optimizer prodigy or came", lambda args: args.optimizer in ("prodigy", "came"), ("beta3",)),
)  # fmt: skip
# What these set was fixed when the data was prepared. Not id_token: the dataset checks it against the manifest.
RAW_VIDEOS_ONLY = (
    "dataset_file",
    "random_flip",
    "video_reshape_mode",
    "fps",
    "skip_frames_start",
    "skip_frames_end",
    "video_backend",
    "windows",
)


# ---------------------------------------------------------------- numbers, each a `type=` of argparse


def number(kind: type, description: str, is_legal: Callable) -> Callable[[str], int | float]:
    """A `type=` that accepts only legal numbers. NaN never is one: all its comparisons are False."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_legal(value):
            raise argparse.ArgumentTypeError(f"{text or repr(text)}: must be {description}")
        return value

    return parse


def at_least(smallest: int) -> Callable[[str], int]:
    return number(int, f"an integer of {smallest} or more", lambda value: value >= smallest)


def number_or_all(text: str) -> int | str:
    """A `type=` that accepts an integer of 1 or more, or "all"."""
    return text if text == "all" else number(int, "an integer of 1 or more, or all", lambda value: value >= 1)(text)


positive = number(float, "a number above 0", lambda value: 0 < value < math.inf)
not_negative = number(float, "a number of 0 or more", lambda value: 0 <= value < math.inf)
share = number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
probability = number(float, "a probability from 0 to 1", lambda value: 0 <= value <= 1)
below_one = number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)


# ---------------------------------------------------------------- combinations


def refuse_meaningless(parser: FlagParser, args: argparse.Namespace, script: str):
    """Refuses flags that this script has no use for."""
    for dest, reason in NO_MEANING[script].items():
        if parser.is_used(args, dest):
            parser.error(f"--{dest} has no meaning in {parser.prog}: {reason}; leave it out")


def warn_of_idle(parser: FlagParser, args: argparse.Namespace):
    """One warning for the flags that have no effect because another one is missing."""
    for needed, is_there, dests in IDLE_WITHOUT:
        idle = [f"--{dest}" for dest in dests if parser.is_used(args, dest)]
        if idle and not is_there(args):
            parser.say("warning", f"{', '.join(idle)}: no effect without {needed}")


def check_lora(parser: FlagParser, args: argparse.Namespace):
    """Refuses initializations that diffusers cannot load back, and two at once."""
    if args.lora_init not in LORA_INITS:
        name = "pissa" if args.lora_init.startswith("pissa") else args.lora_init
        reason = f"{REFUSED_INITS[name]}; give" if name in REFUSED_INITS else "must be"
        parser.error(f"--lora_init {args.lora_init}: {reason} one of {', '.join(LORA_INITS)}")
    if args.lora_init == "orthogonal" and args.rank % 2:
        parser.error(f"--lora_init orthogonal --rank {args.rank}: needs an even rank")
    if args.init_lora is not None and parser.is_used(args, "lora_init"):
        parser.error("--lora_init and --init_lora: the LoRA starts in one way; give one of them")


def check_optimizer(parser: FlagParser, args: argparse.Namespace):
    """Refuses combinations of the optimizer's flags that do not exist, or would not do what they say."""
    bits = [f"--{dest}" for dest in ("use_8bit", "use_4bit", "use_fp8") if getattr(args, dest)]
    if len(bits) > 1:
        parser.error(f"{' and '.join(bits)}: the optimizer's states have one precision; give one of them")
    if bits and args.optimizer not in ("adam", "adamw"):
        parser.error(f"{bits[0]} --optimizer {args.optimizer}: low-bit states exist for adam and adamw only")
    # In full fine-tuning, 8-bit states are updated on the GPU wherever they lie
    if (
        bits
        and args.use_cpu_offload_optimizer
        and not (parser.script.endswith("sft") and not obstacle_to_splitting_from_args(args))
    ):
        parser.error(
            f"{bits[0]} --use_cpu_offload_optimizer: states in host memory take no GPU memory, and low-bit ones are "
            "computed on the GPU; give one of them"
        )
    if args.optimizer == "came" and parser.is_used(args, "epsilon"):
        parser.say("warning", "--epsilon: no effect with --optimizer came, which has two of its own")
    if args.use_torchao and not bits:
        parser.error("--use_torchao chooses the library for low-bit states: add --use_8bit, --use_4bit or --use_fp8")


def check_memory(parser: FlagParser, args: argparse.Namespace, script: str):
    """Refuses flags that contradict each other, and levels and precisions that the task cannot use."""
    if args.memory and args.gradient_checkpointing:
        parser.error(
            f"--memory {args.memory} --gradient_checkpointing: the level says what is recomputed; leave the second "
            "one out"
        )
    if args.compile_blocks and args.no_compile_blocks:
        parser.error("--compile_blocks and --no_compile_blocks: give one of them")
    if script.endswith("sft"):
        check_sft_level(parser, args)
    if args.base_precision != "bf16" and args.use_dora:
        parser.error(f"--use_dora --base_precision {args.base_precision}: DoRA needs the norms of exact weights")


def check_sft_level(parser: FlagParser, args: argparse.Namespace):
    """Refuses levels that full fine-tuning does not have, or not with these flags."""
    obstacle = obstacle_to_splitting_from_args(args) if args.memory in HOST_LEVELS else None
    if obstacle:
        flag, instead = obstacle
        parser.error(
            f"--memory {args.memory} {flag}: full fine-tuning has that level in bf16, with fp32 or 8-bit states of adam "
            f"or adamw; use {instead}"
        )


def check_export(parser: FlagParser, args: argparse.Namespace):
    """Refuses formats that cannot hold what is trained."""
    if args.use_dora and "comfyui" in args.export:
        parser.error(
            "--use_dora --export comfyui: ComfyUI divides by the norm of the base's rows, DoRA by that of the sum's, "
            "so the file would not be what was trained; use --export merged"
        )
    if args.use_dora and "kohya" in args.export:
        parser.error("--use_dora --export kohya: its readers leave DoRA's magnitudes out; use --export merged")


def check_validation(parser: FlagParser, args: argparse.Namespace):
    """Refuses two schedules at once, sizes that no video can have, and an empty separator."""
    if {"validation_steps", "validation_epochs"} <= set(args.given):
        parser.error("--validation_steps and --validation_epochs: give one of them")
    if not args.validation_prompt_separator:
        parser.error("--validation_prompt_separator: is empty; give a text that no prompt holds")
    for dest in ("height", "width"):
        if getattr(args, dest) % 16:
            parser.error(f"--{dest} {getattr(args, dest)}: must be a multiple of 16")


def check_trackers(parser: FlagParser, args: argparse.Namespace):
    """Refuses unknown trackers; several are separated by commas."""
    names = (args.report_to or "none").split(",")
    for name in names:
        if name not in TRACKERS:
            nearest_name = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean {nearest_name[0]}?" if nearest_name else f"give one of {', '.join(TRACKERS)}"
            parser.error(f"--report_to {name}: {hint}")
    if len(names) > 1 and {"all", "none"} & set(names):
        parser.error(f"--report_to {args.report_to}: all and none stand alone")


def check_reshape_mode(parser: FlagParser, args: argparse.Namespace):
    """Refuses any --video_reshape_mode other than center, random and none."""
    if args.video_reshape_mode not in (None, *RESHAPE_MODES):
        parser.error(f"--video_reshape_mode {args.video_reshape_mode}: must be one of {', '.join(RESHAPE_MODES)}")


def check_data_source(parser: FlagParser, args: argparse.Namespace):
    """Refuses a run without data and, with --load_tensors, flags that can no longer have an effect."""
    if args.load_tensors:
        idle = [f"--{dest}" for dest in RAW_VIDEOS_ONLY if parser.is_used(args, dest)]
        if idle:
            verb = "has" if len(idle) == 1 else "have"
            parser.error(
                f"{', '.join(idle)} {verb} no effect with --load_tensors: prepared data is already cut, sized and "
                f"encoded; leave {'it' if len(idle) == 1 else 'them'} out or prepare the data again"
            )
        if args.data_root is None:
            parser.error("--data_root is required with --load_tensors: the folder that prepare_dataset.py wrote")
    if args.data_root is None and args.dataset_file is None:
        parser.error(
            "one of --data_root (a folder of videos and captions) and --dataset_file (a CSV or JSON) is required"
        )


def check_buckets(parser: FlagParser, args: argparse.Namespace):
    """Refuses sizes that the model cannot take; warns of frame counts that it encodes unlike in inference."""
    for dest in ("height_buckets", "width_buckets"):
        for size in getattr(args, dest):
            if size < 1 or size % 16:
                parser.error(f"--{dest} {size}: must be a multiple of 16; nearest: {nearest(size, 16, 0)}")
    for frames in args.frame_buckets:
        if frames < 1 or frames % 4 > 1:
            parser.error(f"--frame_buckets {frames}: must be 4k+1 frames; nearest: {nearest(frames, 4, 1)}")
    uneven = [frames for frames in args.frame_buckets if frames % 4 == 0]
    if uneven:
        instead = "; ".join(f"{frames}: {nearest(frames, 4, 1)}" for frames in uneven)
        parser.say(
            "warning",
            f"--frame_buckets {' '.join(map(str, uneven))}: of 4k frames the VAE's first latent covers 4, not 1, "
            f"unlike in inference; nearest 4k+1 values: {instead}",
        )


def nearest(value: int, step: int, offset: int) -> str:
    """The valid values step * k + offset on both sides of an invalid one, for an error line."""
    below = (value - offset) // step * step + offset
    return " or ".join(str(number) for number in (below, below + step) if number >= 1) or str(offset or step)


def check_max_num_frames(parser: FlagParser, args: argparse.Namespace):
    """Refuses a cap that no bucket fits under; warns of buckets above it."""
    smallest = min(args.frame_buckets)
    if args.max_num_frames < smallest:
        parser.error(
            f"--max_num_frames {args.max_num_frames}: must be at least {smallest}, the smallest of --frame_buckets"
        )
    above = [frames for frames in args.frame_buckets if frames > args.max_num_frames]
    if above:
        parser.say(
            "warning",
            f"--frame_buckets {' '.join(map(str, above))}: never filled, because --max_num_frames is "
            f"{args.max_num_frames}; give --max_num_frames {max(above)} to use every bucket",
        )


def check_captioning(parser: FlagParser, args: argparse.Namespace):
    """Refuses addresses that are none, or hold a secret; the line does not repeat them."""
    try:
        url = urlsplit(args.base_url)
        is_address = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address:
        parser.error("--base_url: must be the address of a server's API, such as http://localhost:8000/v1")
    if url.username or url.password or url.query or url.fragment:
        parser.error(
            "--base_url: holds more than an address; a key is read from the variable that --api_key_env names"
        )
    if args.send == "video" and parser.is_used(args, "num_frames"):
        parser.say("warning", "--num_frames: no effect with --send video, whose frames the server chooses")
