"""Every flag of the scripts, and the checks that need nothing but the flags.

Standard library only: `--help` and a mistyped flag answer before torch is imported.
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

import console
from errors import StorageError, print_to_pipe


SIZES = [256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536]
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
RESHAPE_MODES = ("center", "random", "none")

SCRIPTS = {
    "t2v_lora": "cogvideox_text_to_video_lora.py",
    "t2v_sft": "cogvideox_text_to_video_sft.py",
    "i2v_lora": "cogvideox_image_to_video_lora.py",
    "i2v_sft": "cogvideox_image_to_video_sft.py",
}
DESCRIPTIONS = {
    "t2v_lora": "Train a LoRA for a CogVideoX text-to-video model.",
    "t2v_sft": "Train every weight of a CogVideoX text-to-video transformer.",
    "i2v_lora": "Train a LoRA for a CogVideoX image-to-video model.",
    "i2v_sft": "Train every weight of a CogVideoX image-to-video transformer.",
    "prepare": "Turn videos and captions into VAE moments and text embeddings, so that training needs neither model.",
}
# script -> the wrapper that calls it
WRAPPERS = {script: name.replace("cogvideox", "train").replace(".py", ".sh") for script, name in SCRIPTS.items()}
WRAPPERS["prepare"] = "prepare_dataset.sh"
# The ten flags that most runs need: --help begins with them.
FIRST_OF_TRAINING = (
    "pretrained_model_name_or_path", "data_root", "load_tensors", "output_dir", "max_train_steps", "train_batch_size",
    "learning_rate", "memory", "validation_prompt",
)  # fmt: skip
FIRST = {
    "t2v_lora": (*FIRST_OF_TRAINING, "rank"),
    "t2v_sft": (*FIRST_OF_TRAINING, "use_cpu_offload_optimizer"),
    "i2v_lora": (*FIRST_OF_TRAINING, "rank"),
    "i2v_sft": (*FIRST_OF_TRAINING, "use_cpu_offload_optimizer"),
    "prepare": (
        "model_id", "data_root", "caption_column", "video_column", "output_dir", "save_latents_and_embeddings",
        "height_buckets", "width_buckets", "frame_buckets", "dtype",
    ),
}  # fmt: skip
PAGES = (
    "assets/flags.md says more of every flag; assets/training.md explains memory, precision and optimizers, "
    "assets/running.md output and validation."
)
EPILOG = (
    "Exit codes: 0 done, 2 usage, 65 bad data, 70 bad numbers, full GPU memory or internal, 74 disk or upload, 75 "
    "interrupted, can be resumed."
)

# Flags that a script has no use for: accepted at their default, refused otherwise.
NO_IMAGE = "a text-to-video model gets no image"
NO_LORA = "full fine-tuning trains the weights themselves, there is no LoRA"
NO_DTYPE = "a LoRA is always saved in fp32"
NO_EMA = "the average is kept of the whole transformer, in full fine-tuning"
IMAGE_FLAGS = ("noised_image_dropout", "validation_images", "image_latent_scale", "drop_learned_positions")
LORA_FLAGS = (
    "rank", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora", "lora_init", "init_lora", "export",
    "base_precision",
)  # fmt: skip
NO_SFT = {"save_dtype": NO_DTYPE, "ema": NO_EMA, "ema_decay": NO_EMA}
NO_MEANING = {
    "t2v_lora": dict.fromkeys(IMAGE_FLAGS, NO_IMAGE) | NO_SFT,
    "t2v_sft": dict.fromkeys(IMAGE_FLAGS, NO_IMAGE) | dict.fromkeys(LORA_FLAGS, NO_LORA),
    "i2v_lora": NO_SFT,
    "i2v_sft": dict.fromkeys(LORA_FLAGS, NO_LORA),
}

LORA_INITS = ("default", "gaussian", "orthogonal")
CHANGES_BASE = "it changes the base weights too, and diffusers would load the LoRA onto the unchanged ones"
NEEDS_PASS = "it needs the layers' inputs on the data, for which there is no pass here"
REFUSED_INITS = {
    "pissa": CHANGES_BASE,
    "olora": CHANGES_BASE,
    "corda": CHANGES_BASE,
    "loftq": CHANGES_BASE,
    "lora_ga": CHANGES_BASE,
    "eva": NEEDS_PASS,
    "mica": "it trains only half of the LoRA",
}

MEMORY_LEVELS = ("speed", "balanced", "offload", "stream", "auto", "plan")
LORA_LEVELS = ("offload", "stream")  # they rely on weights that do not change
BASE_PRECISIONS = ("bf16", "fp8", "int8", "nf4")

TRACKERS = ("wandb", "tensorboard", "trackio", "all", "none")

# Flags that do nothing without another one: (what they need, is it there, flags). Said in one warning, because the
# wrappers of the original pass them always.
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
        "--optimizer prodigy",
        lambda args: args.optimizer == "prodigy",
        ("prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"),
    ),
    ("--optimizer prodigy or came", lambda args: args.optimizer in ("prodigy", "came"), ("beta3",)),
)  # fmt: skip

# What these set was fixed when the data was prepared. Not id_token: the dataset compares it with the manifest.
RAW_VIDEOS_ONLY = (
    "dataset_file",
    "random_flip",
    "video_reshape_mode",
    "fps",
    "skip_frames_start",
    "skip_frames_end",
    "video_backend",
)

# Legal values: dest -> (what they are called in the error, test). Unset (None) is always legal.
AT_LEAST_1 = ("an integer of 1 or more", lambda value: value >= 1)
AT_LEAST_0 = ("an integer of 0 or more", lambda value: value >= 0)
POSITIVE = ("a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = ("a number of 0 or more", lambda value: 0 <= value < math.inf)
PROBABILITY = ("a probability from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_1 = ("a number from 0 to below 1", lambda value: 0 <= value < 1)
TRAINING_RANGES = {
    "random_flip": PROBABILITY,
    "text_dropout": PROBABILITY,
    "noised_image_dropout": PROBABILITY,
    "dataloader_num_workers": AT_LEAST_0,
    "seed": AT_LEAST_0,
    "fps": AT_LEAST_1,
    "max_num_frames": AT_LEAST_1,
    "skip_frames_start": AT_LEAST_0,
    "skip_frames_end": AT_LEAST_0,
    "rank": AT_LEAST_1,
    "lora_alpha": AT_LEAST_1,
    "ema_decay": BELOW_1,
    "beta3": BELOW_1,
    "height": AT_LEAST_1,
    "width": AT_LEAST_1,
    "num_validation_videos": AT_LEAST_1,
    "validation_epochs": AT_LEAST_1,
    "validation_steps": AT_LEAST_1,
    "validation_num_clips": AT_LEAST_1,
    "num_inference_steps": AT_LEAST_1,
    "guidance_scale": NOT_NEGATIVE,
    "train_batch_size": AT_LEAST_1,
    "num_train_epochs": AT_LEAST_1,
    "max_train_steps": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "checkpointing_steps": AT_LEAST_1,
    "checkpoints_total_limit": AT_LEAST_1,
    "learning_rate": POSITIVE,
    "lr_warmup_steps": AT_LEAST_0,
    "lr_num_cycles": AT_LEAST_1,
    "lr_power": POSITIVE,
    "beta1": BELOW_1,
    "beta2": BELOW_1,
    "weight_decay": NOT_NEGATIVE,
    "epsilon": POSITIVE,
    "max_grad_norm": POSITIVE,
    "max_bad_steps": AT_LEAST_1,
    "log_every": AT_LEAST_1,
    "nccl_timeout": AT_LEAST_1,
}
PREPARE_RANGES = {
    "random_flip": PROBABILITY,
    "dataloader_num_workers": AT_LEAST_0,
    "seed": AT_LEAST_0,
    "target_fps": AT_LEAST_1,
    "max_num_frames": AT_LEAST_1,
    "max_sequence_length": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "num_decode_threads": AT_LEAST_0,
    "num_artifact_workers": AT_LEAST_1,
    "num_image_variants": AT_LEAST_1,
}


class FlagParser(argparse.ArgumentParser):
    """A parser that ends every mistake with one line on stderr and exit code 2."""

    def __init__(self, prog: str, script: str):
        description = f"{DESCRIPTIONS[script]} {WRAPPERS[script]} calls it with settings for most runs."
        super().__init__(
            prog=prog, usage=f"{prog} [flags]", description=description, epilog=EPILOG, allow_abbrev=False
        )
        self.script = script  # key of FIRST, and of SCRIPTS where it trains
        self.argv: list[str] = []

    def error(self, message: str):
        """Leaves with exit code 2."""
        from status import REFUSED, note_refusal  # only here: --help is quick

        self.say("error", message)
        output_dir = named_value(self.argv, "--output_dir")
        if output_dir:
            with contextlib.suppress(OSError, StorageError):  # the line above is what matters
                note_refusal(Path(output_dir), message)
        self.exit(REFUSED)

    def format_help(self) -> str:
        """An example and the flags that most runs need, the others by group, and the names of those without a use."""
        width = min(max(shutil.get_terminal_size().columns, 60), 100) - 2  # longer lines are hard to read
        first, hidden = FIRST[self.script], NO_MEANING.get(self.script, {})
        flags = {action.dest: action for action in self._actions}
        parts = [f"usage: {self.usage}\n{textwrap.fill(self.description, width)}"]
        parts.append(f"{EXAMPLE_HEAD}\n  {example_of(self.script)}")
        parts.append(
            help_of_group("most runs need (in brackets: the default)", [flags[dest] for dest in first], width)
        )
        for group in self._action_groups:
            actions = [action for action in group._group_actions if action.dest not in ("help", *first, *hidden)]
            parts += [help_of_group(group.title, actions, width)] if actions else []
        names = " ".join(f"--{dest}" for dest in flags if dest in hidden)
        last = [f"Without a use in this script, accepted at their defaults: {names}"] if names else []
        parts.append("\n".join(textwrap.fill(text, width, break_on_hyphens=False) for text in (*last, PAGES, EPILOG)))
        return "\n\n".join(parts) + "\n"

    def print_help(self, file=None):
        print_to_pipe(self.format_help().rstrip("\n"))

    def say(self, kind: str, message: str):
        """One line on stderr, from one process of each machine: all of them parse the same flags."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.prog}: {kind}: {' '.join(message.splitlines())}", file=sys.stderr)

    def parse_flags(self, argv: list[str] | None) -> argparse.Namespace:
        """The flags' values, and in `given` the sorted names of those on the command line."""
        argv = sys.argv[1:] if argv is None else list(argv)
        self.argv = argv
        self.refuse_unknown(argv)
        argv = self.with_config(argv)
        args = self.parse_args(argv)
        # argparse fills in defaults only where the namespace has no value: what is still unset was not given.
        unset = object()
        marked = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
        args.given = sorted(dest for dest, value in vars(marked).items() if value is not unset)
        return args

    def with_config(self, argv: list[str]) -> list[str]:
        """The flags of the run that --config names, then those on the command line, which win."""
        path = named_value(argv, "--config")
        return argv if path is None else self.recorded_argv(path) + argv

    def recorded_argv(self, path: str) -> list[str]:
        """The command line of the run whose args.json this is, with the seed that it drew."""
        try:
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
            flags, given, seed = record["flags"], record["given"], record["seed"]
            flags = {dest: flags[dest] for dest in given if dest not in NOT_RECORDED} | {"seed": seed}
        except OSError as error:
            self.error(f"--config {path}: {error.strerror}; give the args.json of a run")
        except (ValueError, KeyError, TypeError):
            self.error(f"--config {path}: not the args.json of a run")
        known = {action.dest for action in self._actions}
        if unknown := sorted(flags.keys() - known):
            self.error(f"--config {path}: holds unknown flags ({', '.join(unknown)}); it is of another version")
        argv = []
        for dest, value in flags.items():
            if isinstance(value, list):
                argv += [f"--{dest}", *map(str, value)]
            elif value is not False:  # True is a flag without a value
                argv.append(f"--{dest}" if value is True else f"--{dest}={value}")
        return argv

    def refuse_unknown(self, argv: list[str]):
        """Before argparse looks: it would complain of a missing required flag where one is only misspelt."""
        for token in argv:
            if token == "--":
                return
            flag = token.split("=")[0]
            if looks_like_flag(token) and flag not in self._option_string_actions:
                nearest = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else "--help lists all flags"
                self.error(f"unknown flag {flag}; {hint}")

    def is_used(self, args: argparse.Namespace, dest: str) -> bool:
        """Whether a flag differs from its default."""
        return getattr(args, dest) != self.get_default(dest)


# ---------------------------------------------------------------- help

HELP_COLUMN = 28
EXAMPLE_HEAD = "Example, on the small model and the clips in this repository (no GPU needed):"


def help_of_group(title: str, actions: list[argparse.Action], width: int) -> str:
    return "\n".join([f"{title}:", *(line for action in actions for line in help_of_flag(action, width))])


def help_of_flag(action: argparse.Action, width: int) -> list[str]:
    """The flag on the left; what it means beside it, or where both are too long for that, below."""
    left = f"  {action.option_strings[0]} {values_of_flag(action)}".rstrip()
    meaning, _, default = parts_of_help(action)
    text = f"{meaning} [{default}]" if default else meaning
    beside = f"{left.ljust(HELP_COLUMN - 2)}  {text}"
    if len(beside) <= width:
        return [beside]
    right = textwrap.wrap(text, width - HELP_COLUMN, break_on_hyphens=False, break_long_words=False)
    lines = [" " * HELP_COLUMN + line for line in right]
    return [left, *lines] if len(left) > HELP_COLUMN - 2 else [left + lines[0][len(left) :], *lines[1:]]


def values_of_flag(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    value = action.metavar or (f"{{{','.join(action.choices)}}}" if action.choices else action.dest.upper())
    return f"{value} ..." if action.nargs == "+" else value


def parts_of_help(action: argparse.Action) -> tuple[str, str, str]:
    """What a flag means, in short, the rest of it, and what holds where it is left out, "" for nothing."""
    short, _, more = action.help.partition("\n")
    stated = re.fullmatch(r"(.*) \(default: (.*)\)", short)
    if stated:
        return stated[1], more, stated[2]
    is_unset = action.required or action.default is None or action.default is False or action.default == []
    values = action.default if isinstance(action.default, list) else [action.default]
    return short, more, "" if is_unset else " ".join(map(str, values))


# ---------------------------------------------------------------- command line


def named_value(argv: list[str], flag: str) -> str | None:
    """The value of one flag, whatever the others are; None also for a flag without a value, of which argparse speaks."""
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(flag, dest="value")
    try:
        return parser.parse_known_args(argv)[0].value
    except argparse.ArgumentError:
        return None


# A token is written nowhere, --config only stands for the flags of another run, --verbose changes nothing in one
NOT_RECORDED = ("hub_token", "config", "given", "verbose")


def recorded_flags(args: argparse.Namespace) -> dict:
    """The flags' values as files and trackers may hold them."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in NOT_RECORDED}


def looks_like_flag(token: str) -> bool:
    """argparse's own rule: a leading dash, no space, and no negative number."""
    if len(token) < 2 or token[0] != "-" or " " in token:
        return False
    try:
        float(token)
    except ValueError:
        return True
    return False


# ---------------------------------------------------------------- entry points


def parse_training_args(script: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of training script `script` (a key of SCRIPTS), checked; a mistake exits with code 2."""
    parser = make_training_parser(script)
    args = parser.parse_flags(argv)
    if argv is None:
        hide_token(sys.argv)
        hide_token(sys.orig_argv)
        console.set_up(args.verbose)
    refuse_meaningless(parser, args, script)
    check_ranges(parser, args, TRAINING_RANGES)
    if args.lr_scheduler not in LR_SCHEDULERS:
        parser.error(f"--lr_scheduler {args.lr_scheduler}: must be one of {', '.join(LR_SCHEDULERS)}")
    check_reshape_mode(parser, args)
    check_lora(parser, args)
    check_optimizer(parser, args)
    check_memory(parser, args, script)
    check_export(parser, args)
    check_validation(parser, args)
    check_trackers(parser, args)
    check_data_source(parser, args)
    check_buckets(parser, args)
    # Prepared clips carry their own frame count.
    if not args.load_tensors:
        check_max_num_frames(parser, args)
    warn_of_idle(parser, args)
    if args.hub_token is not None:
        parser.say(
            "warning",
            "--hub_token can be read by every user of this machine while the run lasts; it is written nowhere. "
            "Set HF_TOKEN or run `hf auth login` instead",
        )
    return args


def hide_token(words: list[str]):
    """Overwrite the value of --hub_token in a command line: trackers write down the one that started the process."""
    for index, word in enumerate(words):
        if word == "--hub_token" and index + 1 < len(words):
            words[index + 1] = "hidden"
        elif word.startswith("--hub_token="):
            words[index] = "--hub_token=hidden"


def parse_prepare_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of prepare_dataset.py, checked; a mistake exits with code 2."""
    parser = make_prepare_parser()
    args = parser.parse_flags(argv)
    if argv is None:
        console.set_up(args.verbose)
    check_ranges(parser, args, PREPARE_RANGES)
    check_reshape_mode(parser, args)
    check_buckets(parser, args)
    check_max_num_frames(parser, args)
    if args.save_image_latents and not args.save_latents_and_embeddings:
        parser.error("--save_image_latents needs --save_latents_and_embeddings: give both or neither")
    if parser.is_used(args, "num_image_variants") and not args.save_image_latents:
        parser.error("--num_image_variants needs --save_image_latents: give both or neither")
    return args


# ---------------------------------------------------------------- checks


def refuse_meaningless(parser: FlagParser, args: argparse.Namespace, script: str):
    """Refuses what this script has no use for."""
    for dest, reason in NO_MEANING[script].items():
        if parser.is_used(args, dest):
            parser.error(f"--{dest} has no meaning in {parser.prog}: {reason}; leave it out")


def warn_of_idle(parser: FlagParser, args: argparse.Namespace):
    """One line for the flags that change nothing because another one is missing."""
    for needed, is_there, dests in IDLE_WITHOUT:
        idle = [f"--{dest}" for dest in dests if parser.is_used(args, dest)]
        if idle and not is_there(args):
            parser.say("warning", f"{', '.join(idle)}: no effect without {needed}")


def check_lora(parser: FlagParser, args: argparse.Namespace):
    """Refuses ways to start a LoRA that diffusers cannot load back, and two of them at once."""
    if args.lora_init not in LORA_INITS:
        name = "pissa" if args.lora_init.startswith("pissa") else args.lora_init
        reason = f"{REFUSED_INITS[name]}; give" if name in REFUSED_INITS else "must be"
        parser.error(f"--lora_init {args.lora_init}: {reason} one of {', '.join(LORA_INITS)}")
    if args.lora_init == "orthogonal" and args.rank % 2:
        parser.error(f"--lora_init orthogonal --rank {args.rank}: needs an even rank")
    if args.init_lora is not None and parser.is_used(args, "lora_init"):
        parser.error("--lora_init and --init_lora: the LoRA starts in one way; give one of them")


def check_optimizer(parser: FlagParser, args: argparse.Namespace):
    """Refuses combinations of the optimizer's flags that exist nowhere, or would not do what they say."""
    bits = [f"--{dest}" for dest in ("use_8bit", "use_4bit", "use_fp8") if getattr(args, dest)]
    if len(bits) > 1:
        parser.error(f"{' and '.join(bits)}: the optimizer's states have one precision; give one of them")
    if bits and args.optimizer not in ("adam", "adamw"):
        parser.error(f"{bits[0]} --optimizer {args.optimizer}: low-bit states exist for adam and adamw only")
    if bits and args.use_cpu_offload_optimizer:
        parser.error(
            f"{bits[0]} --use_cpu_offload_optimizer: states in host memory take no GPU memory, and low-bit ones are "
            "computed on the GPU; give one of them"
        )
    if args.optimizer == "came" and parser.is_used(args, "epsilon"):
        parser.say("warning", "--epsilon: no effect with --optimizer came, which has two of its own")
    if args.use_torchao and not bits:
        parser.error("--use_torchao chooses who makes low-bit states: add --use_8bit, --use_4bit or --use_fp8")


def check_memory(parser: FlagParser, args: argparse.Namespace, script: str):
    """Refuses two answers to one question, and levels and precisions that the task cannot have."""
    if args.memory and args.gradient_checkpointing:
        parser.error(
            f"--memory {args.memory} --gradient_checkpointing: the level says what is computed again; leave the second "
            "one out"
        )
    if args.compile_blocks and args.no_compile_blocks:
        parser.error("--compile_blocks and --no_compile_blocks: give one of them")
    if args.memory in LORA_LEVELS and script.endswith("sft"):
        parser.error(
            f"--memory {args.memory}: moves frozen weights, and full fine-tuning has none; use --memory balanced with "
            "--use_cpu_offload_optimizer --offload_gradients"
        )
    if args.base_precision != "bf16" and args.use_dora:
        parser.error(f"--use_dora --base_precision {args.base_precision}: DoRA needs the norms of exact weights")


def check_export(parser: FlagParser, args: argparse.Namespace):
    """Refuses a form that could not hold what is trained."""
    if args.use_dora and "comfyui" in args.export:
        parser.error(
            "--use_dora --export comfyui: ComfyUI divides by the norm of the base's rows, DoRA by that of the sum's, "
            "so that the file would not be what was trained; use --export merged"
        )
    if args.use_dora and "kohya" in args.export:
        parser.error("--use_dora --export kohya: its readers leave DoRA's magnitudes out; use --export merged")


def check_validation(parser: FlagParser, args: argparse.Namespace):
    """Refuses two schedules at once, sizes that no video can have, and splitting at nothing."""
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


def check_ranges(parser: FlagParser, args: argparse.Namespace, ranges: dict):
    """Refuses numbers outside of their range; NaN is outside of each."""
    for dest, (description, is_legal) in ranges.items():
        value = getattr(args, dest)
        if value is not None and not is_legal(value):
            parser.error(f"--{dest} {value}: must be {description}")


def check_reshape_mode(parser: FlagParser, args: argparse.Namespace):
    """Refuses any other --video_reshape_mode than center, random and none."""
    if args.video_reshape_mode not in (None, *RESHAPE_MODES):
        parser.error(f"--video_reshape_mode {args.video_reshape_mode}: must be one of {', '.join(RESHAPE_MODES)}")


def check_data_source(parser: FlagParser, args: argparse.Namespace):
    """Refuses a run without data, and with --load_tensors the flags that could no longer change anything."""
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
        parser.error("one of --data_root (a folder of videos and captions) and --dataset_file (a CSV) is required")


def check_buckets(parser: FlagParser, args: argparse.Namespace):
    """Refuses sizes that the model cannot take; warns of frame counts that it takes unlike in inference."""
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
    """The positive numbers step * k + offset on both sides of a value that is none of them, for an error line."""
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


# ---------------------------------------------------------------- parsers
# The first line of a help text is for --help: what and in which unit, about 48 characters where they are enough. It may
# end by what holds where the flag is left out, "(default: ...)"; elsewhere that is the parsed default. A second line, of
# whole sentences, is for assets/flags.md alone.


def make_training_parser(script: str) -> FlagParser:
    """The parser of one training script; all four have the same flags."""
    parser = FlagParser(SCRIPTS[script], script)
    add_model_flags(parser)
    add_lora_flags(parser)
    add_training_data_flags(parser)
    add_bucket_flags(parser)
    add_training_flags(parser)
    add_optimizer_flags(parser)
    add_output_flags(parser)
    add_validation_flags(parser)
    add_memory_flags(parser)
    add_tracking_flags(parser)
    return parser


def make_prepare_parser() -> FlagParser:
    """The parser of prepare_dataset.py."""
    parser = FlagParser("prepare_dataset.py", "prepare")
    add_prepare_model_flags(parser)
    add_prepare_data_flags(parser)
    add_prepare_bucket_flags(parser)
    add_prepare_output_flags(parser)
    add_prepare_memory_flags(parser)
    return parser


def example_of(script: str) -> str:
    """A command that works where it is pasted into the repository's folder, on its small models and clips."""
    model = "assets/tiny-cogvideox-i2v" if script.startswith("i2v") else "assets/tiny-cogvideox"
    clips = ["--data_root assets/tests", "--video_column videos.txt --caption_column prompts.txt"]
    sizes = ["--height_buckets 64 --width_buckets 64", "--frame_buckets 9 --max_num_frames 9"]
    if script == "prepare":
        lines = ["python training/prepare_dataset.py", f"--model_id {model} --max_sequence_length 32", *clips, *sizes]
        lines += ["--save_latents_and_embeddings --output_dir outputs/example-prepared"]
    else:
        launch = "accelerate launch --config_file accelerate_configs/uncompiled_1.yaml"
        lines = [launch, f"training/{SCRIPTS[script]}", f"--pretrained_model_name_or_path {model}", *clips, *sizes]
        lines += [f"--max_train_steps 10 --output_dir outputs/example-{script}"]
    return " \\\n    ".join(lines)


# ---------------------------------------------------------------- flags of both


def add_download_flags(group):
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the model on the hub")
    group.add_argument(
        "--variant", metavar="NAME", help="variant of the weight files, such as fp16\nfp16 is *.fp16.safetensors."
    )
    group.add_argument("--cache_dir", metavar="FOLDER", help="folder for downloads (default: the hub's cache)")
    group.add_argument(
        "--allow_cpu",
        action="store_true",
        help="run a model of real size on a CPU, very slowly\nWithout the flag it is refused.",
    )


def add_clip_list_flags(group, caption_column: str):
    group.add_argument(
        "--dataset_file",
        metavar="CSV",
        help="CSV, a row per clip, in place of the text files\nIts columns are named by --video_column and "
        "--caption_column.",
    )
    group.add_argument(
        "--video_column",
        metavar="NAME",
        default="video",
        help="text file of paths, or the CSV's column\nThe file lies in --data_root and has one path per line.",
    )
    group.add_argument(
        "--caption_column",
        metavar="NAME",
        default=caption_column,
        help="text file of captions, or the CSV's column\nThe file lies in --data_root and has one caption per line.",
    )
    group.add_argument(
        "--allow_outside_root",
        action="store_true",
        help="read files outside of the data folder as well\nThey are named by .., absolute paths or links.",
    )
    group.add_argument(
        "--id_token", metavar="TOKEN", help="text put in front of every caption\nA space is put between."
    )


def add_reading_flags(group):
    group.add_argument(
        "--random_flip",
        type=float,
        metavar="P",
        help="probability that a clip is mirrored (default: 0)\nAll its frames are mirrored, left to right; "
        "captions stay as written.",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        metavar="N",
        default=0,
        help="processes that read data, for each GPU\nWith 0 the main process reads.",
    )
    group.add_argument("--pin_memory", action="store_true", help="pinned host memory: faster copies to the GPU")
    group.add_argument(
        "--video_backend",
        choices=["auto", "decord", "pyav"],
        default="auto",
        help="video decoder; auto is pyav\npyav was faster on real clips and reports damaged frames.",
    )


def add_size_flags(group):
    group.add_argument(
        "--height_buckets",
        type=int,
        nargs="+",
        metavar="PIXELS",
        default=list(SIZES),
        help="heights, multiples of 16; a clip takes the size nearest in aspect, then in area",
    )
    group.add_argument(
        "--width_buckets",
        type=int,
        nargs="+",
        metavar="PIXELS",
        default=list(SIZES),
        help="widths, multiples of 16 (default: the same)",
    )
    group.add_argument(
        "--frame_buckets",
        type=int,
        nargs="+",
        metavar="FRAMES",
        default=[49],
        help="frame counts, 4k+1\n4k is accepted with a warning.",
    )
    group.add_argument(
        "--max_num_frames",
        type=int,
        metavar="FRAMES",
        default=49,
        help="most frames of a clip\nLarger frame buckets stay empty.",
    )
    group.add_argument(
        "--video_reshape_mode",
        metavar="MODE",
        help="crop at the center or at random; with none, clips have their bucket's size already (default: "
        "center)\nBoth crops scale a clip to cover its bucket and keep its aspect; random draws a place per "
        "clip.",
    )


FPS_HELP = (
    "sampled frames per second (default: 8; CogVideoX 1.5: 16)\nClips are sampled by time, whatever their own rate is."
)


# ---------------------------------------------------------------- flags of the training scripts


def add_model_flags(parser: FlagParser):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help="model to train, required: a hub id, zai-org/... or THUDM/..., or a local diffusers folder",
    )
    group.add_argument(
        "--init_transformer",
        metavar="FOLDER",
        help="an earlier full fine-tuning to start from\nGive its output folder, a checkpoint of it, or the "
        "transformer folder there. It must be of the same kind and size as MODEL, whose other parts are used.",
    )
    group.add_argument(
        "--config",
        metavar="args.json",
        help="flags and seed of a run; those given here win\nIt is named by its args.json.",
    )
    add_download_flags(group)


def add_lora_flags(parser: FlagParser):
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, metavar="N", default=64, help="rank of the LoRA\nIts size grows with it.")
    group.add_argument(
        "--lora_alpha",
        type=int,
        metavar="N",
        default=64,
        help="output is scaled by lora_alpha / rank\nIn the file the weights are scaled already.",
    )
    group.add_argument(
        "--lora_target_modules",
        nargs="+",
        metavar="NAME",
        default=["to_q", "to_k", "to_v", "to_out.0"],
        help="linear layers that get a LoRA, by the end of their names\nff.net.0.proj and ff.net.2 are the "
        "feed-forward.",
    )
    group.add_argument(
        "--use_dora",
        action="store_true",
        help="DoRA (arXiv 2402.09353): slower, more memory\nThe length of every weight row is trained beside the "
        "LoRA.",
    )
    group.add_argument(
        "--use_rslora",
        action="store_true",
        help="scale by alpha / sqrt(rank) (arXiv 2312.03732)\nHigh ranks keep their strength.",
    )
    group.add_argument(
        "--lora_init",
        metavar="SCHEME",
        default="default",
        help="start: default, gaussian or orthogonal\nNone has an effect at first. default is Kaiming uniform, "
        "orthogonal needs an even rank. Schemes of peft that change the base weights too (pissa, olora, ...) "
        "are refused: their file fits no other base.",
    )
    group.add_argument(
        "--init_lora",
        metavar="FILE",
        help="start from this LoRA of the same rank and layers\nGive a file or the folder of a run, also in the "
        "layout of peft, kohya or ComfyUI. Rank, alpha, layers and kind must be the same.",
    )
    group.add_argument(
        "--export",
        nargs="+",
        choices=["comfyui", "kohya", "merged"],
        default=[],
        help="also write it for ComfyUI, for readers of kohya's layout, or merged into the transformer\ncomfyui "
        "is pytorch_lora_weights_comfyui.safetensors, in the key layout of ComfyUI's own CogVideoX; kohya is "
        "pytorch_lora_weights_kohya.safetensors, for VideoX-Fun; merged is transformer/, the base model with "
        "the LoRA added to its weights.",
    )


def add_training_data_flags(parser: FlagParser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root",
        metavar="FOLDER",
        help="folder of videos and captions, or with --load_tensors of prepared data\nprepare_dataset.py writes "
        "the latter. Required, unless there is a --dataset_file.",
    )
    add_clip_list_flags(group, caption_column="text")
    group.add_argument(
        "--load_tensors",
        action="store_true",
        help="train on prepared data, without the VAE and T5\nThese are the moments and prompt embeddings that "
        "prepare_dataset.py makes.",
    )
    add_reading_flags(group)


def add_bucket_flags(parser: FlagParser):
    group = parser.add_argument_group("sizes of raw videos (prepared data keeps its own)")
    add_size_flags(group)
    group.add_argument("--fps", type=int, metavar="N", default=8, help=FPS_HELP)
    group.add_argument(
        "--skip_frames_start", type=int, metavar="N", default=0, help="frames left out at the start of a file"
    )
    group.add_argument(
        "--skip_frames_end", type=int, metavar="N", default=0, help="frames left out at the end of a file"
    )


def add_training_flags(parser: FlagParser):
    group = parser.add_argument_group("training")
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of every draw (default: drawn, kept in args.json)\nDraws follow a sample's place in the run, "
        "so that the number of workers and processes changes only rounding.",
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="what the model computes in; no is fp32 (default: the launcher's, else bf16 on a GPU and no on a "
        "CPU)\nFrozen weights have it too, trained ones are fp32. fp16 scales the loss, and needs a GPU and "
        "a checkpoint not stored in bf16, such as CogVideoX-2b.",
    )
    group.add_argument("--train_batch_size", type=int, metavar="CLIPS", default=4, help="clips per batch, on each GPU")
    group.add_argument(
        "--gradient_accumulation_steps", type=int, metavar="N", default=1, help="batches per update, on each GPU"
    )
    group.add_argument(
        "--num_train_epochs", type=int, metavar="N", default=1, help="passes over the data if no --max_train_steps"
    )
    group.add_argument(
        "--max_train_steps", type=int, metavar="N", help="optimizer updates (default: by --num_train_epochs)"
    )
    group.add_argument(
        "--nccl_timeout",
        type=int,
        metavar="SECONDS",
        default=600,
        help="how long processes wait for one another\nThen the run is given up.",
    )
    add_conditioning_flags(group)


def add_conditioning_flags(group):
    group.add_argument(
        "--text_dropout",
        type=float,
        metavar="P",
        default=0.0,
        help="probability of an empty caption, per sample\nClassifier-free guidance relies on such samples.",
    )
    group.add_argument(
        "--noised_image_dropout",
        type=float,
        metavar="P",
        default=0.05,
        help="probability of no first frame, per sample",
    )
    group.add_argument(
        "--stratified_timesteps",
        action="store_true",
        help="spread timesteps in each update: less noisy loss\nThey cover the noise levels evenly; the mean of "
        "the loss stays.",
    )
    group.add_argument(
        "--image_latent_scale",
        choices=["pipeline", "raw"],
        default="pipeline",
        help="of the first frame's latents; with raw, inference must be changed\npipeline is what diffusers feeds "
        "the model, raw is the VAE's own; it is recorded in the result.",
    )
    group.add_argument(
        "--drop_learned_positions",
        action="store_true",
        help="train CogVideoX-5b-I2V at other sizes than 49 frames of 480x720; inference must drop them too\nIt "
        "is recorded in the result.",
    )


def add_optimizer_flags(parser: FlagParser):
    group = parser.add_argument_group("optimizer and learning rate")
    add_lr_flags(group)
    group.add_argument(
        "--optimizer",
        type=str.lower,
        choices=["adam", "adamw", "prodigy", "came"],
        default="adam",
        help="prodigy needs --learning_rate 1\nprodigy (arXiv 2306.06101) estimates the step size; came (arXiv "
        "2307.02047) keeps factored states.",
    )
    group.add_argument("--beta1", type=float, metavar="DECAY", default=0.9, help="decay of the gradient's mean")
    group.add_argument("--beta2", type=float, metavar="DECAY", default=0.95, help="decay of the mean of its square")
    group.add_argument(
        "--beta3",
        type=float,
        metavar="DECAY",
        help="third decay (default: sqrt(beta2); came: 0.9999)\nIt is of prodigy's step size estimate, or of "
        "came's confidence.",
    )
    group.add_argument(
        "--weight_decay",
        type=float,
        metavar="X",
        default=1e-4,
        help="weight decay (adamw), L2 term (adam)\nadamw applies it to the weights themselves, adam adds it to "
        "the gradient.",
    )
    group.add_argument(
        "--epsilon",
        type=float,
        metavar="X",
        default=1e-8,
        help="added to the denominator of the step\ncame has two of its own.",
    )
    group.add_argument(
        "--max_grad_norm",
        type=float,
        metavar="NORM",
        default=1.0,
        help="gradients are clipped to this L2 norm\nThe norm is over all trained weights and processes.",
    )
    group.add_argument(
        "--max_bad_steps",
        type=int,
        metavar="N",
        default=5,
        help="updates with NaN or infinity are skipped; so many in a row end the run\nThe exit code is 70. Loss "
        "and gradient of every update are checked.",
    )
    add_state_flags(group)


def add_state_flags(group):
    group.add_argument(
        "--use_8bit",
        action="store_true",
        help="adam, adamw: 8-bit states, by bitsandbytes\nTensors under 4,096 elements stay in fp32.",
    )
    group.add_argument("--use_4bit", action="store_true", help="adam, adamw: 4-bit states, by torchao")
    group.add_argument("--use_fp8", action="store_true", help="adam, adamw: fp8 states, by torchao, since Ada")
    group.add_argument("--use_torchao", action="store_true", help="--use_8bit by torchao")
    group.add_argument("--prodigy_decouple", action="store_true", help="weight decay of prodigy as in AdamW")
    group.add_argument("--prodigy_use_bias_correction", action="store_true", help="Adam's bias correction in prodigy")
    group.add_argument(
        "--prodigy_safeguard_warmup",
        action="store_true",
        help="prodigy's step size ignores the warm-up",
    )


def add_lr_flags(group):
    group.add_argument("--learning_rate", type=float, metavar="LR", default=1e-4, help="peak learning rate")
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="multiply --learning_rate by the clips of an update\nThese are batch size x accumulation x processes.",
    )
    group.add_argument("--lr_scheduler", metavar="NAME", default="constant", help=", ".join(LR_SCHEDULERS))
    group.add_argument(
        "--lr_warmup_steps",
        type=int,
        metavar="N",
        default=500,
        help="updates of warm-up, not with constant\nIt is linear from 0; constant_with_warmup has it.",
    )
    group.add_argument("--lr_num_cycles", type=int, metavar="N", default=1, help="cycles of cosine_with_restarts")
    group.add_argument("--lr_power", type=float, metavar="X", default=1.0, help="exponent of polynomial")


def add_output_flags(parser: FlagParser):
    group = parser.add_argument_group("output and checkpoints")
    group.add_argument(
        "--output_dir",
        metavar="FOLDER",
        default="cogvideox-sft",
        help="folder of the result; a run of the same flags there is continued\nIt holds checkpoints, args.json, "
        "metrics.jsonl and status.json too.",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="move what is in --output_dir aside, start anew\nWithout the flag, the run is continued or refused.",
    )
    group.add_argument(
        "--save_dtype",
        choices=["fp32", "fp16", "bf16"],
        help="dtype of the transformer written (default: as stored)",
    )
    group.add_argument(
        "--ema",
        action="store_true",
        help="validate and write an average of the weights\nIt moves with every update and is kept in fp32.",
    )
    group.add_argument(
        "--ema_decay",
        type=float,
        metavar="DECAY",
        default=0.9999,
        help="weight of the old average\nThe new weights have the rest, in every update.",
    )
    group.add_argument(
        "--checkpointing_steps",
        type=int,
        metavar="N",
        default=500,
        help="updates between checkpoints\nEach is a folder checkpoint-<step> of --output_dir.",
    )
    group.add_argument(
        "--checkpoints_total_limit",
        type=int,
        metavar="N",
        help="newest checkpoints kept (default: all)\nThe oldest goes once a newer one is written.",
    )
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="PATH",
        help="a checkpoint to go on from, or latest\nlatest is the newest of --output_dir; without any, the run "
        "starts afresh.",
    )


def add_validation_flags(parser: FlagParser):
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_prompt",
        metavar="TEXT",
        help="prompts to render before, during and after training, with ::: between them\nThey are rendered at "
        "every validation as well as before the first step and after the last.",
    )
    group.add_argument(
        "--validation_images",
        metavar="PATHS",
        help="first frames, files or URLs, with ::: between\nThere is one for each prompt.",
    )
    group.add_argument(
        "--validation_prompt_separator", metavar="TEXT", default=":::", help="between prompts and images"
    )
    group.add_argument("--num_validation_videos", type=int, metavar="N", default=1, help="videos per prompt")
    group.add_argument("--validation_epochs", type=int, metavar="N", default=50, help="epochs between validations")
    group.add_argument(
        "--validation_steps", type=int, metavar="N", help="updates between validations, in place of epochs"
    )
    group.add_argument(
        "--no_first_validation",
        action="store_true",
        help="none before the first update\nRuns of one sweep would all render the same untrained model.",
    )
    group.add_argument(
        "--validation_data_root",
        metavar="FOLDER",
        help="held-out clips, whose loss is logged\nThey have the form of --data_root (with --dataset_file, a CSV "
        "of that name in the folder). Noise and timesteps are fixed.",
    )
    group.add_argument(
        "--validation_num_clips", type=int, metavar="N", default=8, help="held-out clips used, the first ones"
    )
    add_sampling_flags(group)


OF_BUCKET = "(default: of the bucket with most clips)"


def add_sampling_flags(group):
    group.add_argument("--height", type=int, metavar="PIXELS", default=480, help=f"height of videos {OF_BUCKET}")
    group.add_argument("--width", type=int, metavar="PIXELS", default=720, help=f"width of videos {OF_BUCKET}")
    group.add_argument("--num_inference_steps", type=int, metavar="N", default=50, help="denoising steps")
    group.add_argument(
        "--guidance_scale", type=float, metavar="SCALE", default=6, help="classifier-free guidance; 1 is none"
    )
    group.add_argument("--use_dynamic_cfg", action="store_true", help="guidance rises from 1 while denoising")
    group.add_argument("--enable_model_cpu_offload", action="store_true", help="one model at a time on the GPU")
    group.add_argument(
        "--validation_attention",
        choices=["default", "sage"],
        default="default",
        help="sage: SageAttention\nIt must be installed; it has no backward pass and never trains.",
    )


def add_memory_flags(parser: FlagParser):
    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--memory",
        choices=MEMORY_LEVELS,
        help="what is kept for the backward pass: auto is the fastest level that fits, plan prints what each "
        "needs, see assets/training.md (default: by --gradient_checkpointing)\nspeed keeps all of it on the "
        "GPU; balanced recomputes blocks but keeps the attention's output; offload is balanced with that in "
        "host memory; stream has the frozen weights there too. offload and stream are for LoRA.",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute blocks: far less memory, slower\nActivations are not kept for the backward pass.",
    )
    group.add_argument(
        "--enable_slicing",
        action="store_true",
        help="VAE: one video at a time, less memory\nThis is where raw videos are encoded and validation videos "
        "decoded.",
    )
    group.add_argument(
        "--enable_tiling",
        action="store_true",
        help="VAE: overlapping tiles, less memory\nResults differ slightly.",
    )
    group.add_argument(
        "--use_cpu_offload_optimizer",
        action="store_true",
        help="fp32 weights and optimizer in host memory: far less GPU memory, slower steps\nThe optimizer steps "
        "there.",
    )
    group.add_argument(
        "--offload_gradients",
        action="store_true",
        help="gradients too, with --use_cpu_offload_optimizer\nEvery gradient moves to host memory as soon as it "
        "is there.",
    )
    add_speed_flags(group)


def add_speed_flags(group):
    group.add_argument(
        "--compile_blocks",
        action="store_true",
        help="torch.compile the blocks (default: on a GPU with --memory)\nEvery transformer block is compiled in "
        "place: steps are faster after a first one that compiles. accelerate_configs/compiled_1.yaml does it "
        "too.",
    )
    group.add_argument("--no_compile_blocks", action="store_true", help="--memory without torch.compile")
    group.add_argument(
        "--attention",
        choices=["auto", "cudnn", "flash", "fa4", "math"],
        default="auto",
        help="auto is the fastest there; fa4: FlashAttention-4; math: exact and slow\nauto times those that are "
        "installed on this run's shape, once for each card and shape. fa4 is a pre-release on PyPI "
        "(flash-attn-4).",
    )
    group.add_argument(
        "--base_precision",
        choices=BASE_PRECISIONS,
        default="bf16",
        help="frozen weights: fp8 is faster, int8 and nf4 are smaller; the loss changes a little\nThose of "
        "attention and feed-forward. bf16 leaves them as computed; fp8 computes faster on Ada and newer; "
        "int8 and nf4 take less memory, at some speed.",
    )
    group.add_argument(
        "--allow_tf32",
        action="store_true",
        help="TF32 for fp32 matrix products: faster, coarser\nIt needs a GPU since Ampere.",
    )


def add_tracking_flags(parser: FlagParser):
    group = parser.add_argument_group("logging and upload")
    group.add_argument(
        "--report_to",
        metavar="TRACKER",
        help="wandb, tensorboard, trackio, or all that are installed (default: metrics.jsonl alone)\nSeveral are "
        "separated by commas. metrics.jsonl is written in any case.",
    )
    group.add_argument(
        "--log_every",
        type=int,
        metavar="N",
        default=10,
        help="updates between reads of the loss\nThe gradient norm is read with it. Each update still has its own "
        "line in metrics.jsonl.",
    )
    group.add_argument("--tracker_name", metavar="NAME", help="project at the tracker (default: the task's name)")
    group.add_argument("--logging_dir", metavar="FOLDER", default="logs", help="trackers' folder in --output_dir")
    group.add_argument("--push_to_hub", action="store_true", help="upload the result, private by default")
    group.add_argument("--hub_public", action="store_true", help="make a new repository public")
    group.add_argument(
        "--hub_token",
        metavar="TOKEN",
        help="token for the hub; other users of the machine can read it, HF_TOKEN is safer\nSo is `hf auth "
        "login`. The token is written nowhere.",
    )
    group.add_argument("--hub_model_id", metavar="ID", help="repository (default: yours, named as --output_dir)")
    add_verbose_flag(group)


def add_verbose_flag(group):
    group.add_argument(
        "--verbose", action="store_true", help="show what the libraries say too: their logs, warnings and bars"
    )


# ---------------------------------------------------------------- flags of prepare_dataset.py


def add_prepare_model_flags(parser: FlagParser):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_id",
        metavar="MODEL",
        default="THUDM/CogVideoX-2b",
        help="model that will be trained: a hub id, zai-org/... or THUDM/..., or a local diffusers folder\nIts "
        "VAE and T5 encode.",
    )
    add_download_flags(group)
    group.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="precision of the VAE and T5\nThey are loaded and compute in it.",
    )
    group.add_argument(
        "--max_sequence_length",
        type=int,
        metavar="TOKENS",
        default=226,
        help="tokens that captions are cut or padded to\nCogVideoX is trained with 226.",
    )


def add_prepare_data_flags(parser: FlagParser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="folder of videos and captions, required\nVideo paths are relative to it.",
    )
    add_clip_list_flags(group, caption_column="caption")
    add_reading_flags(group)
    group.add_argument(
        "--num_decode_threads",
        type=int,
        metavar="N",
        default=0,
        help="threads that decode one video\n0 leaves it to the decoder.",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=42,
        help="seed of every draw\nThey are made per clip: flip, crop, start, noise on first frames.",
    )


def add_prepare_bucket_flags(parser: FlagParser):
    group = parser.add_argument_group("sizes")
    add_size_flags(group)
    group.add_argument("--target_fps", type=int, metavar="N", default=8, help=FPS_HELP)


def add_prepare_output_flags(parser: FlagParser):
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="folder to write, required\nIn one that holds part of the work, only what is missing is done.",
    )
    group.add_argument(
        "--save_latents_and_embeddings",
        action="store_true",
        help="write what --load_tensors trains on, not resized videos and first frames\nThese are VAE moments and "
        "prompt embeddings.",
    )
    group.add_argument(
        "--save_image_latents",
        action="store_true",
        help="first frames too, noised, for image-to-video\nTheir moments are written; "
        "--save_latents_and_embeddings is needed.",
    )
    group.add_argument(
        "--num_image_variants",
        type=int,
        metavar="N",
        default=8,
        help="noised first frames per clip\nThey need --save_image_latents; training draws one each time.",
    )
    group.add_argument(
        "--save_previews",
        action="store_true",
        help="write resized videos and first frames too\nWithout --save_latents_and_embeddings they are always "
        "written.",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="hash everything again, make again what is old\nNothing remembered is believed: every video and "
        "weight file is hashed anew, and what an earlier version prepared is made again, compared and "
        "replaced.",
    )
    group.add_argument(
        "--prune",
        action="store_true",
        help="remove its files of clips no longer listed\nThose in the output folder's own subfolders that "
        "prepare_dataset.py wrote and no row names any more.",
    )


def add_prepare_memory_flags(parser: FlagParser):
    group = parser.add_argument_group("memory and speed")
    group.add_argument("--batch_size", type=int, metavar="CLIPS", default=1, help="clips encoded at once, on each GPU")
    group.add_argument("--use_slicing", action="store_true", help="VAE: one clip at a time, less memory")
    group.add_argument(
        "--use_tiling", action="store_true", help="VAE: overlapping tiles, less memory\nResults differ slightly."
    )
    group.add_argument(
        "--num_artifact_workers", type=int, metavar="N", default=4, help="threads that write files, for each GPU"
    )
    add_verbose_flag(group)
