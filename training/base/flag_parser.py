"""Parser for a script's flags: every mistake is one line on stderr and exit code 2."""

import argparse
import contextlib
import difflib
import json
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

from base.errors import REFUSED, StorageError, print_to_pipe


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
    "caption": "Have clips captioned by a vision-language model behind an OpenAI-compatible server, such as vLLM's.",
}
# script -> the wrapper that calls it
WRAPPERS = {script: name.replace("cogvideox", "train").replace(".py", ".sh") for script, name in SCRIPTS.items()}
WRAPPERS |= {"prepare": "prepare_dataset.sh", "caption": "caption_dataset.sh"}
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
    "caption": (
        "data_root", "output_dir", "base_url", "model", "pretrained_model_name_or_path", "num_frames", "concurrency",
        "prompt_file", "trigger", "context",
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
NO_SHARE = "a LoRA's optimizer states are small"
SFT_ONLY = {"save_dtype": NO_DTYPE, "ema": NO_EMA, "ema_decay": NO_EMA, "states_on_gpu": NO_SHARE}
NO_MEANING = {
    "t2v_lora": dict.fromkeys(IMAGE_FLAGS, NO_IMAGE) | SFT_ONLY,
    "t2v_sft": dict.fromkeys(IMAGE_FLAGS, NO_IMAGE) | dict.fromkeys(LORA_FLAGS, NO_LORA),
    "i2v_lora": SFT_ONLY,
    "i2v_sft": dict.fromkeys(LORA_FLAGS, NO_LORA),
}


class FlagParser(argparse.ArgumentParser):
    """Reports every mistake in one line on stderr, with exit code 2."""

    def __init__(self, prog: str, script: str):
        description = f"{DESCRIPTIONS[script]} {WRAPPERS[script]} calls it with settings for most runs."
        super().__init__(
            prog=prog,
            usage=f"{prog} [flags]",
            description=description,
            epilog=EPILOG,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self.script = script  # key of FIRST, and of SCRIPTS where it trains
        self.argv: list[str] = []

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """A `type=` error follows the flag's name, as in every other refusal: `--rank 0: must be ...`."""
        try:
            return super().parse_args(args, namespace)
        except argparse.ArgumentError as error:
            is_of_type = isinstance(error.__context__, argparse.ArgumentTypeError)
            self.error(f"{error.argument_name} {error.message}" if is_of_type else str(error))

    def error(self, message: str):
        """Exits with code 2."""
        from base.status import record_refusal  # imported here to keep --help fast

        self.say("error", message)
        output_dir = named_value(self.argv, "--output_dir")
        if output_dir:
            with contextlib.suppress(OSError, StorageError):  # the line above is what matters
                record_refusal(Path(output_dir), message)
        self.exit(REFUSED)

    def format_help(self) -> str:
        """An example, the flags that most runs need, the others by group, and the names of those without a use."""
        width = min(max(shutil.get_terminal_size().columns, 60), 100) - 2  # longer lines are hard to read
        first, hidden = FIRST[self.script], NO_MEANING.get(self.script, {})
        flags = {action.dest: action for action in self._actions}
        parts = [f"usage: {self.usage}\n{textwrap.fill(self.description, width)}"]
        parts.append(f"{CAPTION_HEAD if self.script == 'caption' else EXAMPLE_HEAD}\n  {example_of(self.script)}")
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
        """One line on stderr, from one process per machine, since all of them parse the same flags."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.prog}: {kind}: {' '.join(message.splitlines())}", file=sys.stderr)

    def parse_flags(self, argv: list[str] | None) -> argparse.Namespace:
        """The flags' values; `given` holds the sorted names of those on the command line."""
        argv = sys.argv[1:] if argv is None else list(argv)
        self.argv = argv
        self.refuse_unknown(argv)
        argv = self.with_config(argv)
        args = self.parse_args(argv)
        # argparse fills in a default only if the namespace has no value: what is still unset was not given.
        unset = object()
        marked = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
        args.given = sorted(dest for dest, value in vars(marked).items() if value is not unset)
        return args

    def with_config(self, argv: list[str]) -> list[str]:
        """The flags of the run that --config names, followed by those on the command line, which win."""
        path = named_value(argv, "--config")
        return argv if path is None else self.recorded_argv(path) + argv

    def recorded_argv(self, path: str) -> list[str]:
        """The command line of the run that wrote this args.json, with the seed that it drew."""
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
        """Runs before argparse, which would report a required flag as missing if it is only misspelt."""
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
CAPTION_HEAD = "Example, on the clips in this repository (a server has to run on this machine):"


def help_of_group(title: str, actions: list[argparse.Action], width: int) -> str:
    return "\n".join([f"{title}:", *(line for action in actions for line in help_of_flag(action, width))])


def help_of_flag(action: argparse.Action, width: int) -> list[str]:
    """The flag on the left, its meaning beside it, or below it if the line would be too long."""
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
    """(meaning in short, the rest, what applies without the flag, "" for nothing)."""
    short, _, more = action.help.partition("\n")
    stated = re.fullmatch(r"(.*) \(default: (.*)\)", short)
    if stated:
        return stated[1], more, stated[2]
    is_unset = action.required or action.default is None or action.default is False or action.default == []
    values = action.default if isinstance(action.default, list) else [action.default]
    return short, more, "" if is_unset else " ".join(map(str, values))


# ---------------------------------------------------------------- command line


def named_value(argv: list[str], flag: str) -> str | None:
    """The value of one flag, ignoring all others; None also if its value is missing, which argparse reports."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, dest="value")
    try:
        return parser.parse_known_args(argv)[0].value
    except argparse.ArgumentError:
        return None


# A token is never written, --config only stands for another run's flags, --verbose does not affect a run
NOT_RECORDED = ("hub_token", "config", "given", "verbose")


def recorded_flags(args: argparse.Namespace) -> dict:
    """The flags' values, without those that files and trackers must not hold."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in NOT_RECORDED}


def looks_like_flag(token: str) -> bool:
    """argparse's own rule: a leading dash, no space, not a negative number."""
    if len(token) < 2 or token[0] != "-" or " " in token:
        return False
    try:
        float(token)
    except ValueError:
        return True
    return False


# ---------------------------------------------------------------- parsers


def example_of(script: str) -> str:
    """A command that works when pasted in the repository's folder, on its small models and clips."""
    model = "assets/tiny-cogvideox-i2v" if script.startswith("i2v") else "assets/tiny-cogvideox"
    clips = ["--data_root assets/tests"]
    sizes = ["--height_buckets 64 --width_buckets 64", "--frame_buckets 9 --max_num_frames 9"]
    if script == "caption":
        lines = ["python training/caption_dataset.py", "--data_root assets/tests/videos"]
        lines += ["--base_url http://localhost:8000/v1 --output_dir outputs/example-captioned"]
    elif script == "prepare":
        lines = ["python training/prepare_dataset.py", f"--model_id {model} --max_sequence_length 32", *clips, *sizes]
        lines += ["--save_latents_and_embeddings --output_dir outputs/example-prepared"]
    else:
        launch = "accelerate launch --config_file accelerate_configs/uncompiled_1.yaml"
        lines = [launch, f"training/{SCRIPTS[script]}", f"--pretrained_model_name_or_path {model}", *clips, *sizes]
        lines += [f"--max_train_steps 10 --output_dir outputs/example-{script}"]
    return " \\\n    ".join(lines)
