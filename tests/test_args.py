"""Flags: names and defaults of the original, what is refused, and how it is said."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from args import (
    make_caption_parser,
    make_prepare_parser,
    make_training_parser,
    parse_caption_args,
    parse_prepare_args,
    parse_training_args,
)
from base.errors import StorageError
from base.flag_checks import IDLE_WITHOUT
from base.flag_parser import FIRST, NO_MEANING, SCRIPTS, recorded_flags
from data.clip_lists import read_clips


SIZES = "256 320 384 480 512 576 720 768 960 1024 1280 1536"
MODEL = ["--pretrained_model_name_or_path", "zai-org/CogVideoX-2b"]
TRAIN = [*MODEL, "--data_root", "clips"]
PREPARE = ["--data_root", "clips", "--output_dir", "prepared"]

# The flags that users of the original pass, frozen: flag | type | default | choices
TRAINING_FLAGS = f"""
pretrained_model_name_or_path | str | required |
revision | str | None |
variant | str | None |
cache_dir | str | None |
data_root | str | None |
dataset_file | str | None |
video_column | str | None |
caption_column | str | None |
id_token | str | None |
height_buckets | ints | {SIZES} |
width_buckets | ints | {SIZES} |
frame_buckets | ints | 49 |
load_tensors | flag | False |
random_flip | float | None |
dataloader_num_workers | int | 0 |
pin_memory | flag | False |
seed | int | None |
rank | int | 64 |
lora_alpha | int | 64 |
mixed_precision | str | None | no fp16 bf16
output_dir | str | cogvideox-sft |
height | int | 480 |
width | int | 720 |
video_reshape_mode | str | None |
fps | int | 8 |
max_num_frames | int | 49 |
skip_frames_start | int | 0 |
skip_frames_end | int | 0 |
train_batch_size | int | 4 |
num_train_epochs | int | 1 |
max_train_steps | int | None |
checkpointing_steps | int | 500 |
checkpoints_total_limit | int | None |
resume_from_checkpoint | str | None |
gradient_accumulation_steps | int | 1 |
gradient_checkpointing | flag | False |
learning_rate | float | 0.0001 |
scale_lr | flag | False |
lr_scheduler | str | constant |
lr_warmup_steps | int | 500 |
lr_num_cycles | int | 1 |
lr_power | float | 1.0 |
enable_slicing | flag | False |
enable_tiling | flag | False |
noised_image_dropout | float | 0.05 |
validation_prompt | str | None |
validation_images | str | None |
validation_prompt_separator | str | ::: |
num_validation_videos | int | 1 |
validation_epochs | int | 50 |
guidance_scale | float | 6 |
use_dynamic_cfg | flag | False |
enable_model_cpu_offload | flag | False |
optimizer | lower | adam | adam adamw prodigy came
use_8bit | flag | False |
use_4bit | flag | False |
use_torchao | flag | False |
beta1 | float | 0.9 |
beta2 | float | 0.95 |
beta3 | float | None |
prodigy_decouple | flag | False |
weight_decay | float | 0.0001 |
epsilon | float | 1e-08 |
max_grad_norm | float | 1.0 |
prodigy_use_bias_correction | flag | False |
prodigy_safeguard_warmup | flag | False |
use_cpu_offload_optimizer | flag | False |
offload_gradients | flag | False |
tracker_name | str | None |
push_to_hub | flag | False |
hub_token | str | None |
hub_model_id | str | None |
logging_dir | str | logs |
allow_tf32 | flag | False |
nccl_timeout | int | 600 |
report_to | str | None |
"""
PREPARE_FLAGS = f"""
model_id | str | THUDM/CogVideoX-2b |
data_root | str | required |
dataset_file | str | None |
caption_column | str | None |
video_column | str | None |
id_token | str | None |
height_buckets | ints | {SIZES} |
width_buckets | ints | {SIZES} |
frame_buckets | ints | 49 |
random_flip | float | None |
dataloader_num_workers | int | 0 |
pin_memory | flag | False |
video_reshape_mode | str | None |
save_image_latents | flag | False |
output_dir | str | required |
max_num_frames | int | 49 |
max_sequence_length | int | 226 |
target_fps | int | 8 |
save_latents_and_embeddings | flag | False |
use_slicing | flag | False |
use_tiling | flag | False |
batch_size | int | 1 |
num_decode_threads | int | 0 |
dtype | str | fp32 | fp32 fp16 bf16
seed | int | 42 |
num_artifact_workers | int | 4 |
"""
NEW_TRAINING_FLAGS = {
    "host_memory": None,
    "states_on_gpu": None,
    "allow_cpu": False,
    "allow_outside_root": False,
    "overwrite": False,
    "text_dropout": 0.0,
    "stratified_timesteps": False,
    "image_latent_scale": "pipeline",
    "drop_learned_positions": False,
    "save_dtype": None,
    "log_every": 10,
    "video_backend": "auto",
    "max_bad_steps": 5,
    "config": None,
    "lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    "use_dora": False,
    "use_rslora": False,
    "lora_init": "default",
    "init_lora": None,
    "init_transformer": None,
    "export": [],
    "use_fp8": False,
    "ema": False,
    "ema_decay": 0.9999,
    "validation_steps": None,
    "no_first_validation": False,
    "num_inference_steps": 50,
    "validation_attention": "default",
    "repeats": 1,
    "windows": None,
    "validation_data_root": None,
    "validation_num_clips": 8,
    "compile_blocks": False,
    "no_compile_blocks": False,
    "memory": None,
    "attention": "auto",
    "base_precision": "bf16",
    "hub_public": False,
    "verbose": False,
}
NEW_PREPARE_FLAGS = {
    "allow_cpu": False,
    "allow_outside_root": False,
    "check": False,
    "repeats": 1,
    "windows": None,
    "revision": None,
    "variant": None,
    "cache_dir": None,
    "save_previews": False,
    "video_backend": "auto",
    "num_image_variants": 8,
    "verify": False,
    "prune": False,
    "verbose": False,
}

# What each flag of IDLE_WITHOUT is tried with
IDLE_USES = {
    "validation_prompt_separator": "|",
    "num_validation_videos": "2",
    "guidance_scale": "7",
    "use_dynamic_cfg": None,
    "enable_model_cpu_offload": None,
    "num_inference_steps": "10",
    "validation_attention": "sage",
    "validation_images": "a.png",
    "validation_epochs": "1",
    "validation_steps": "10",
    "no_first_validation": None,
    "validation_num_clips": "3",
    "tracker_name": "runs",
    "logging_dir": "tensorboard",
    "hub_model_id": "me/ball",
    "hub_public": None,
    "hub_token": "hf_secret",
    "ema_decay": "0.9",
    "offload_gradients": None,
    "states_on_gpu": "0.5",
    "prodigy_decouple": None,
    "prodigy_use_bias_correction": None,
    "prodigy_safeguard_warmup": None,
    "beta3": "0.5",
}


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|", 3)] for line in table.strip().splitlines()]


def describe(action: argparse.Action) -> list[str]:
    """A parser's flag in the notation of the tables."""
    if isinstance(action.default, list):
        kind, default = "ints", " ".join(map(str, action.default))
        assert action.nargs == "+" and action.type is int
    else:
        made = action.type("0" if "beta" in action.dest else "1") if action.type else ""  # decays are below 1
        kind = "lower" if action.type is str.lower else type(made).__name__
        default = str(action.default)
    if action.nargs == 0:
        kind = "flag"
    if action.required:
        default = "required"
    return [action.dest, kind, default, " ".join(action.choices or [])]


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def refusal(capsys, parse, *argv) -> str:
    """The one line on stderr with which `parse` ends, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert ".py: error: " in captured.err
    return captured.err


def refused_training(capsys, *flags, script="t2v_lora", base=TRAIN) -> str:
    return refusal(capsys, parse_training_args, script, [*base, *flags])


# ---------------------------------------------------------------- the original's flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_flags_are_the_original_ones_and_the_listed_new_ones(script):
    table, flags = rows(TRAINING_FLAGS), flags_of(make_training_parser(script))
    assert len(table) == 76
    assert [describe(flags[name]) for name, *_ in table] == table
    new = {
        name: action.default for name, action in flags.items() if name not in dict.fromkeys(row[0] for row in table)
    }
    assert new == NEW_TRAINING_FLAGS


def test_prepare_flags_are_the_original_ones_and_the_listed_new_ones():
    table, flags = rows(PREPARE_FLAGS), flags_of(make_prepare_parser())
    assert len(table) == 26
    assert [describe(flags[name]) for name, *_ in table] == table
    new = {
        name: action.default for name, action in flags.items() if name not in dict.fromkeys(row[0] for row in table)
    }
    assert new == NEW_PREPARE_FLAGS


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_accepted_at_its_default(script, capsys):
    argv = list(TRAIN)
    # A switch is off at its default, and an unset value has no spelling.
    for name, kind, default, _ in rows(TRAINING_FLAGS):
        if kind != "flag" and default not in ("None", "required"):
            argv += [f"--{name}", *default.split()]
    args = parse_training_args(script, argv)
    defaults = vars(parse_training_args(script, TRAIN))
    assert {name: value for name, value in vars(args).items() if name != "given"} == {
        name: value for name, value in defaults.items() if name != "given"
    }
    assert capsys.readouterr().err == ""


def test_sweep_command_with_precomputed_data_is_accepted():
    fixed = "--load_tensors --height 480 --width 720 --fps 8 --max_num_frames 49 --skip_frames_start 0"
    args = parse_training_args("t2v_lora", [*TRAIN, *fixed.split(), "--skip_frames_end", "0", "--id_token", "BW"])
    assert args.load_tensors and args.id_token == "BW"


# ---------------------------------------------------------------- help and the parser itself


ROOT = Path(__file__).resolve().parent.parent
MAKERS = {script: (lambda script=script: make_training_parser(script)) for script in SCRIPTS}
MAKERS |= {"prepare": make_prepare_parser, "caption": make_caption_parser}
by_parser = pytest.mark.parametrize("script", MAKERS)


def help_of(script: str, monkeypatch, columns: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return MAKERS[script]().format_help()


def shown_flags(text: str) -> list[str]:
    """The flags that --help explains, in its order."""
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


@by_parser
def test_every_flag_has_a_group_and_a_help_text(script):
    parser = MAKERS[script]()
    for name, action in flags_of(parser).items():
        assert len((action.help or "").split()) >= 2, name
    assert [action.dest for action in parser._optionals._group_actions] == ["help"]


@pytest.mark.parametrize(
    "parse", [lambda: parse_training_args("i2v_sft", ["--help"]), lambda: parse_prepare_args(["-h"])]
)
def test_help_prints_and_ends_with_0(parse, capsys):
    with pytest.raises(SystemExit) as ended:
        parse()
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "[49]" in out and "zai-org/" in out and "THUDM/" in out and "local" in out


@by_parser
def test_help_is_short_and_begins_with_ten_flags(script, monkeypatch):
    text = help_of(script, monkeypatch)
    lines = text.splitlines()
    assert len(lines) < 200 and max(map(len, lines)) <= 80
    first = text.split("most runs need")[1].split("\n\n")[0]
    assert shown_flags(first) == list(FIRST[script]) and len(FIRST[script]) == 10
    required = {name for name, action in flags_of(MAKERS[script]()).items() if action.required}
    assert required <= set(FIRST[script])


@by_parser
def test_help_explains_once_what_has_a_use_and_names_the_rest(script, monkeypatch):
    text = help_of(script, monkeypatch)
    hidden = set(NO_MEANING.get(script, {}))
    assert sorted(shown_flags(text)) == sorted(flags_of(MAKERS[script]()).keys() - hidden)
    named = text.partition("Without a use in this script")[2].split("assets/")[0]
    assert set(re.findall(r"--(\w+)", named)) == hidden


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_without_a_use_is_accepted_as_before(script):
    parser = MAKERS[script]()
    for name in NO_MEANING[script]:
        action = flags_of(parser)[name]
        given = action.nargs != 0 and action.default not in (None, [])
        argv = [f"--{name}", *map(str, as_list(action.default))] if given else []
        assert getattr(parse_training_args(script, [*TRAIN, *argv]), name) == action.default


def as_list(value):
    return value if isinstance(value, list) else [value]


@by_parser
@pytest.mark.parametrize("columns", [1, 60, 80, 100, 400])
def test_help_fits_terminals_of_any_width(script, columns, monkeypatch):
    text = help_of(script, monkeypatch, columns)
    flags = text.split("most runs need")[1]
    assert max(map(len, flags.splitlines())) <= min(max(columns, 60), 100)
    assert shown_flags(text) == shown_flags(help_of(script, monkeypatch))


DEFAULTS_THAT_HOLD = {
    "rank": "64",
    "lora_target_modules": "to_q to_k to_v to_out.0",
    "text_dropout": "0.0",
    "skip_frames_start": "0",
    "fps": "8; CogVideoX 1.5: 16",
    "max_train_steps": "by --num_train_epochs",
    "random_flip": "0",
    "seed": "drawn, kept in args.json",
}


@pytest.mark.parametrize("flag", DEFAULTS_THAT_HOLD)
def test_help_names_the_default_that_holds(flag, monkeypatch):
    text = help_of("t2v_lora", monkeypatch)
    entry = re.search(rf"^  --{flag} .*\n(?: {{20,}}.*\n)*", text, re.MULTILINE)[0]
    assert " ".join(entry.split()).endswith(f"[{DEFAULTS_THAT_HOLD[flag]}]")


@by_parser
def test_help_never_shows_none_or_false_as_a_default(script, monkeypatch):
    text = help_of(script, monkeypatch)
    assert not re.search(r"\[(None|False|\[\]|)\]|whatever", text)
    switches = [name for name, action in flags_of(MAKERS[script]()).items() if action.nargs == 0]
    shown = {name for name in switches if re.search(rf"^  --{name} .*\]$", text, re.MULTILINE)}
    assert shown <= {"compile_blocks"}  # on by itself with --memory


@by_parser
def test_the_example_of_the_help_can_be_pasted(script, monkeypatch):
    example = help_of(script, monkeypatch).split("Example")[1].partition("\n")[2].split("\n\n")[0]
    words = shlex.split(example.replace("\\\n", " "))
    if script == "caption":
        args = parse_caption_args(words[2:])
        assert words[1] == "training/caption_dataset.py" and list((ROOT / args.data_root).glob("*.mp4"))
        return
    name = "training/prepare_dataset.py" if script == "prepare" else f"training/{SCRIPTS[script]}"
    argv = words[words.index(name) + 1 :]
    monkeypatch.chdir(ROOT)
    args = parse_prepare_args(argv) if script == "prepare" else parse_training_args(script, argv)
    model = args.model_id if script == "prepare" else args.pretrained_model_name_or_path
    files = [name, f"{model}/model_index.json"]
    files += words[words.index("--config_file") + 1 :][:1] if "--config_file" in words else []
    assert not [file for file in files if not Path(file).is_file()]
    assert read_clips(args.data_root, args.dataset_file, args.caption_column, args.video_column)
    assert model.endswith("-i2v") == script.startswith("i2v")


def test_help_shows_a_flag_that_names_no_value():
    parser = make_training_parser("t2v_lora")
    parser._action_groups[-1].add_argument("--new_flag", type=int, help="a number (default: 7 where it is warm)")
    assert "  --new_flag NEW_FLAG       a number [7 where it is warm]\n" in parser.format_help()


def test_import_needs_the_standard_library_only():
    """`--help` answers in under a second because nothing heavy comes with args."""
    code = (
        "import sys; before = set(sys.modules); import args;"
        "tops = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(tops - sys.stdlib_module_names - {'args', 'base'}))"
    )
    training = ROOT / "training"
    done = subprocess.run([sys.executable, "-c", code], cwd=training, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_given_names_the_flags_on_the_command_line():
    args = parse_training_args("t2v_lora", [*TRAIN, "--fps", "8", "--seed=0", "--load_tensors"])
    assert args.given == ["data_root", "fps", "load_tensors", "pretrained_model_name_or_path", "seed"]
    assert args.seed == 0
    assert parse_prepare_args([*PREPARE, "--target_fps", "8"]).given == ["data_root", "output_dir", "target_fps"]


def test_flags_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *PREPARE, "--batch_size", "3"])
    args = parse_prepare_args()
    assert args.batch_size == 3 and "batch_size" in args.given


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--learning_rat", "--learning_rate"), ("--data-root=x", "--data_root"), ("-rank", "--rank")],
)
def test_unknown_flag_names_the_nearest(typed, meant, capsys):
    assert f"did you mean {meant}?" in refused_training(capsys, typed, "1")


def test_misspelt_required_flag_gets_a_suggestion_too(capsys):
    line = refusal(capsys, parse_training_args, "t2v_lora", ["--pretrained_model_name", "x", "--data_root", "clips"])
    assert "--pretrained_model_name;" in line and "--pretrained_model_name_or_path?" in line


def test_abbreviations_and_strangers_are_refused(capsys):
    assert "--max_train" in refused_training(capsys, "--max_train", "3")
    assert "unknown flag --zzzz; --help lists" in refused_training(capsys, "--zzzz")
    assert "unrecognized arguments: rolls" in refused_training(capsys, "--id_token", "ball", "rolls")


def test_mistyped_secret_is_not_repeated(capsys):
    assert "hf_secret" not in refused_training(capsys, "--hub_tokn=hf_secret")


@pytest.mark.parametrize("value", ["-5", "-1e-4", "nan"])
def test_negative_numbers_are_values_not_flags(value, capsys):
    line = refused_training(capsys, "--learning_rate", value)
    assert "--learning_rate" in line and "unknown flag" not in line


def test_values_may_hold_dashes_and_spaces():
    args = parse_training_args("t2v_lora", [*TRAIN, "--id_token", "--a token", "--cache_dir=-x"])
    assert args.id_token == "--a token" and args.cache_dir == "-x"


def test_missing_required_flag(capsys):
    assert "--pretrained_model_name_or_path" in refusal(capsys, parse_training_args, "t2v_lora", [])
    assert "--data_root, --output_dir" in refusal(capsys, parse_prepare_args, [])


def test_only_the_first_process_of_a_machine_speaks(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        parse_training_args("t2v_lora", [*TRAIN, "--rank", "0"])
    assert ended.value.code == 2 and capsys.readouterr().err == ""


# ---------------------------------------------------------------- no meaning, no effect


def test_every_idle_flag_is_tried():
    assert set(IDLE_USES) == {dest for _, _, dests in IDLE_WITHOUT for dest in dests}


@pytest.mark.parametrize("flag", IDLE_USES)
def test_a_flag_without_what_it_needs_is_warned_of(flag, capsys):
    """Not refused: the original's wrappers pass them always."""
    value, script = IDLE_USES[flag], "t2v_sft" if flag in ("ema_decay", "states_on_gpu") else "i2v_lora"
    parse_training_args(script, [*TRAIN, f"--{flag}", *([] if value is None else [value])])
    lines = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert len(lines) == 1 and f"warning: --{flag}: no effect without --" in lines[0]


def test_came_has_epsilons_of_its_own(capsys):
    parse_training_args("t2v_lora", [*TRAIN, "--optimizer", "came", "--epsilon", "1e-7"])
    assert "warning: --epsilon: no effect with --optimizer came" in capsys.readouterr().err


def test_a_flag_with_what_it_needs_is_not_warned_of(capsys):
    flags = (
        "--validation_prompt ball --num_inference_steps 10 --validation_steps 5 --report_to wandb --tracker_name me"
    )
    parse_training_args("t2v_lora", [*TRAIN, *flags.split(), "--optimizer", "prodigy", "--beta3", "0.9"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--use_8bit --use_4bit", "--use_8bit and --use_4bit: the optimizer's states have one precision"),
        ("--use_8bit --optimizer came", "--use_8bit --optimizer came: low-bit states exist for adam and adamw only"),
        ("--use_fp8 --use_cpu_offload_optimizer", "--use_fp8 --use_cpu_offload_optimizer: states in host memory"),
        ("--use_torchao", "add --use_8bit, --use_4bit or --use_fp8"),
        ("--validation_steps 5 --validation_epochs 5", "give one of them"),
        ("--height 500", "--height 500: must be a multiple of 16"),
        ("--report_to tensorbord", "did you mean tensorboard?"),
        ("--report_to wandb,all", "all and none stand alone"),
    ],
)
def test_combinations_that_exist_nowhere_are_refused(flags, message, capsys):
    assert message in refused_training(capsys, *flags.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--memory stream --optimizer came", "use --optimizer adamw, or --memory balanced with --use_cpu_offload"),
        ("--memory offload --mixed_precision fp16", "use --mixed_precision bf16, or --memory balanced with --use_cpu"),
        ("--memory offload --mixed_precision no", "--memory offload --mixed_precision no: full fine-tuning has that"),
        ("--memory offload --optimizer prodigy", "--optimizer prodigy: full fine-tuning has that level in bf16, with"),
        ("--memory offload --optimizer came", "use --optimizer adamw, or --memory balanced with --use_cpu_offload"),
        ("--memory offload --use_8bit --use_torchao", "no --use_torchao: fp32 states take no GPU memory there"),
        ("--memory offload --use_4bit", "use --use_8bit, or no --use_4bit: fp32 states take no GPU memory there"),
        ("--memory stream --use_fp8", "use --use_8bit, or no --use_fp8: fp32 states take no GPU memory there"),
    ],
)
def test_levels_that_full_fine_tuning_does_not_have_are_refused(flags, message, capsys):
    for script in ("t2v_sft", "i2v_sft"):
        line = refused_training(capsys, *flags.split(), script=script)
        assert message in line and len(line.splitlines()) == 1
    parse_training_args("t2v_lora", [*TRAIN, *flags.split()])


@pytest.mark.parametrize(
    "more",
    ["", "--optimizer adamw", "--use_8bit", "--use_cpu_offload_optimizer --offload_gradients", "--states_on_gpu 0.5"],
)
def test_full_fine_tuning_offloads(more, capsys):
    args = parse_training_args("t2v_sft", [*TRAIN, "--memory", "offload", "--mixed_precision", "bf16", *more.split()])
    assert args.memory == "offload" and capsys.readouterr().err == ""


IMAGE_USES = {"noised_image_dropout": "0.1", "image_latent_scale": "raw", "drop_learned_positions": None}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_other_tasks_are_refused_when_used(script, capsys):
    image, lora = script.startswith("i2v"), script.endswith("lora")
    lora_uses = {"rank": "8", "lora_alpha": "8", "use_dora": None, "lora_init": "gaussian", "init_lora": "a"}
    rows = [(IMAGE_USES, image), (lora_uses, lora), ({"save_dtype": "fp32", "ema": None}, not lora)]
    for uses, has_meaning in rows:
        for flag, value in uses.items():
            argv = [f"--{flag}", *([value] if value else [])]
            if has_meaning:
                args = parse_training_args(script, [*TRAIN, *argv])
                assert str(getattr(args, flag)) == (value or "True")
            else:
                line = refused_training(capsys, *argv, script=script)
                assert f"--{flag} has no meaning in {SCRIPTS[script]}" in line


def test_available_choices_pass():
    args = parse_training_args("t2v_lora", [*TRAIN, "--optimizer", "AdamW", "--report_to", "none"])
    assert args.optimizer == "adamw"


def test_hub_token_warns_without_repeating_it(capsys):
    args = parse_training_args("t2v_lora", [*TRAIN, "--hub_token", "hf_secret"])
    err = capsys.readouterr().err
    assert args.hub_token == "hf_secret"
    assert "--hub_token" in err and "HF_TOKEN" in err and "hf_secret" not in err


# ---------------------------------------------------------------- values


TRAINING_LIMITS = """
rank 0 | lora_alpha 0 | train_batch_size 0 | num_train_epochs 0 | max_train_steps 0 | checkpointing_steps 0
checkpoints_total_limit 0 | gradient_accumulation_steps -1 | lr_num_cycles 0 | nccl_timeout 0 | log_every 0
max_bad_steps 0 | ema_decay 1 | beta3 1 | height 0 | num_validation_videos 0 | validation_epochs 0
validation_steps 0 | validation_num_clips 0 | num_inference_steps 0 | guidance_scale -1 | fps 0 | max_num_frames 0 | dataloader_num_workers -1 | seed -1 | skip_frames_start -1
skip_frames_end -1 | lr_warmup_steps -1 | random_flip 1.5 | text_dropout -0.1 | text_dropout nan | learning_rate 0
learning_rate inf | lr_power 0 | beta1 1 | beta2 -0.5 | weight_decay -1 | epsilon 0 | max_grad_norm 0
"""
PREPARE_LIMITS = """
random_flip 1.5 | dataloader_num_workers -1 | seed -1 | target_fps 0 | max_num_frames 0 | max_sequence_length 0
batch_size 0 | num_decode_threads -1 | num_artifact_workers 0
"""


def limits(text: str) -> list[list[str]]:
    return [pair.split() for line in text.strip().splitlines() for pair in line.split("|")]


@pytest.mark.parametrize(("flag", "value"), limits(TRAINING_LIMITS))
def test_numbers_out_of_range_are_refused(flag, value, capsys):
    line = refused_training(capsys, f"--{flag}", value, script="t2v_sft" if flag == "ema_decay" else "t2v_lora")
    assert f"error: --{flag} {value}" in line and "must be a" in line


@pytest.mark.parametrize(("flag", "value"), limits(PREPARE_LIMITS))
def test_prepare_numbers_out_of_range_are_refused(flag, value, capsys):
    line = refusal(capsys, parse_prepare_args, [*PREPARE, f"--{flag}", value])
    assert f"error: --{flag} {value}: must be a" in line


@pytest.mark.parametrize("value", ["x", "", "nan", "inf", "-inf", "-1", "9" * 5000])
def test_what_is_no_number_in_range_is_refused_with_what_would_be(value, capsys):
    numbers = {name: action for name, action in flags_of(make_training_parser("t2v_lora")).items() if action.type}
    for name, action in numbers.items():
        if action.type is not str.lower and action.nargs is None:
            line = refused_training(capsys, f"--{name}={value}")
            assert re.search(rf"error: --{name} \S+: must be an? (integer of|number|probability) ", line)


def test_numbers_of_another_runs_flags_are_checked_as_well(tmp_path, capsys):
    content = {"flags": {"rank": 0, "learning_rate": float("nan")}, "given": ["rank"], "seed": 7}
    for given, message in (("rank", "--rank 0: must be"), ("learning_rate", "--learning_rate nan: must be")):
        (tmp_path / "args.json").write_text(json.dumps(content | {"given": [given]}))
        assert message in refused_training(capsys, "--config", str(tmp_path / "args.json"))


def test_seeds_have_no_upper_end():
    assert parse_training_args("t2v_lora", [*TRAIN, "--seed", "9" * 400]).seed == int("9" * 400)


@pytest.mark.parametrize("flag", ["random_flip", "text_dropout"])
def test_both_ends_of_a_probability_are_legal(flag):
    for value in (0.0, 1.0):
        assert getattr(parse_training_args("t2v_lora", [*TRAIN, f"--{flag}", str(value)]), flag) == value


def test_lr_scheduler_is_one_of_those_that_work(capsys):
    for name in ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]:
        assert parse_training_args("t2v_lora", [*TRAIN, "--lr_scheduler", name]).lr_scheduler == name
    for name in ("piecewise_constant", "cosin"):
        line = refused_training(capsys, "--lr_scheduler", name)
        assert f"--lr_scheduler {name}" in line and "cosine_with_restarts" in line


def test_video_reshape_mode(capsys):
    for mode in ("center", "random", "none"):
        assert parse_prepare_args([*PREPARE, "--video_reshape_mode", mode]).video_reshape_mode == mode
    assert "center, random, none" in refused_training(capsys, "--video_reshape_mode", "stretch")
    assert "center, random, none" in refusal(capsys, parse_prepare_args, [*PREPARE, "--video_reshape_mode", "stretch"])


def test_lines_stay_one_line_whatever_the_value(capsys):
    assert "--video_reshape_mode a b" in refused_training(capsys, "--video_reshape_mode", "a\nb")


# ---------------------------------------------------------------- buckets


PARSERS = [
    lambda flags: parse_training_args("t2v_lora", [*TRAIN, *flags]),
    lambda flags: parse_prepare_args([*PREPARE, *flags]),
]


@pytest.mark.parametrize("parse", PARSERS, ids=["training", "prepare"])
class TestBuckets:
    @pytest.mark.parametrize("frames", ["1", "5", "49", "81"])
    def test_4k_plus_1_frames_are_silent(self, parse, frames, capsys):
        args = parse(["--frame_buckets", frames, "--max_num_frames", "81"])
        assert args.frame_buckets == [int(frames)] and capsys.readouterr().err == ""

    def test_4k_frames_warn_in_one_line(self, parse, capsys):
        assert parse(["--frame_buckets", "48", "49", "16"]).frame_buckets == [48, 49, 16]
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and ": warning: --frame_buckets 48 16:" in err
        assert "48: 45 or 49" in err and "16: 13 or 17" in err

    @pytest.mark.parametrize(
        ("frames", "instead"), [("50", "49 or 53"), ("3", "1 or 5"), ("0", "1"), ("-4", "1"), ("47", "45 or 49")]
    )
    def test_other_frames_are_refused(self, parse, frames, instead, capsys):
        line = refusal(capsys, parse, ["--frame_buckets", "1", frames])
        assert f"--frame_buckets {frames}: must be 4k+1 frames; nearest: {instead}\n" in line

    @pytest.mark.parametrize("flag", ["height_buckets", "width_buckets"])
    @pytest.mark.parametrize(("size", "instead"), [("250", "240 or 256"), ("8", "16"), ("0", "16"), ("-480", "16")])
    def test_sizes_are_multiples_of_16(self, parse, flag, size, instead, capsys):
        assert getattr(parse([f"--{flag}", "16", "464"]), flag) == [16, 464]
        line = refusal(capsys, parse, [f"--{flag}", "480", size])
        assert f"--{flag} {size}: must be a multiple of 16; nearest: {instead}\n" in line

    def test_max_num_frames_below_every_bucket_is_refused(self, parse, capsys):
        line = refusal(capsys, parse, ["--max_num_frames", "25", "--frame_buckets", "81", "49"])
        assert "--max_num_frames 25: must be at least 49" in line

    def test_buckets_above_max_num_frames_are_named(self, parse, capsys):
        parse(["--max_num_frames", "49", "--frame_buckets", "81", "49"])
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "--frame_buckets 81" in err and "--max_num_frames 81" in err


# ---------------------------------------------------------------- flags that belong together


def test_data_comes_from_somewhere(capsys):
    assert parse_training_args("t2v_lora", [*MODEL, "--dataset_file", "clips.csv"]).data_root is None
    line = refused_training(capsys, base=MODEL)
    assert "--data_root" in line and "--dataset_file" in line
    assert "--data_root is required with --load_tensors" in refused_training(capsys, "--load_tensors", base=MODEL)


RAW_USES = """
random_flip 0.5 | video_reshape_mode center | skip_frames_start 3 | skip_frames_end 3 | dataset_file clips.csv
video_backend pyav | fps 16 | windows all
"""


@pytest.mark.parametrize("use", limits(RAW_USES), ids=lambda use: use[0])
def test_flags_of_raw_videos_are_refused_with_precomputed_data(use, capsys):
    flags = [f"--{use[0]}", *use[1:]]
    parse_training_args("t2v_lora", [*TRAIN, *flags])
    line = refused_training(capsys, "--load_tensors", *flags)
    assert f"--{use[0]} has no effect with --load_tensors" in line


def test_all_idle_flags_are_named_at_once(capsys):
    line = refused_training(capsys, "--load_tensors", "--fps", "16", "--random_flip", "0.5")
    assert "--random_flip, --fps have no effect with --load_tensors" in line


def test_precomputed_data_of_any_length_needs_no_frame_bucket():
    assert parse_training_args("t2v_lora", [*TRAIN, "--load_tensors", "--max_num_frames", "25"]).max_num_frames == 25


def test_image_latents_need_latents(capsys):
    both = ["--save_latents_and_embeddings", "--save_image_latents"]
    assert parse_prepare_args([*PREPARE, *both, "--num_image_variants", "2"]).num_image_variants == 2
    for flags, missing in (
        (["--save_image_latents"], "--save_latents_and_embeddings"),
        (["--save_latents_and_embeddings", "--num_image_variants", "2"], "--save_image_latents"),
    ):
        assert f"needs {missing}" in refusal(capsys, parse_prepare_args, [*PREPARE, *flags])
    line = refusal(capsys, parse_prepare_args, [*PREPARE, *both, "--num_image_variants", "0"])
    assert "--num_image_variants 0: must be an integer of 1 or more" in line


# ---------------------------------------------------------------- a run once more


def record(tmp_path, *flags, seed=7):
    """args.json of a run with these flags, which drew `seed`."""
    args = parse_training_args("t2v_lora", [*TRAIN, *flags])
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"flags": recorded_flags(args), "given": args.given, "seed": seed}))
    return str(path)


def test_config_gives_the_flags_of_a_run_and_its_seed(tmp_path):
    flags = ["--load_tensors", "--rank", "8", "--height_buckets", "256", "320", "--validation_prompt", "-- a 'b' $(c)"]
    again = parse_training_args("t2v_lora", ["--config", record(tmp_path, *flags)])
    assert (again.rank, again.load_tensors, again.height_buckets) == (8, True, [256, 320])
    assert again.validation_prompt == "-- a 'b' $(c)" and again.seed == 7
    assert again.data_root == "clips" and {"rank", "load_tensors", "seed"} <= set(again.given)
    assert again.learning_rate == 1e-4 and "learning_rate" not in again.given


def test_a_run_by_config_can_be_named_itself(tmp_path):
    first = record(tmp_path, "--rank", "8")
    args = parse_training_args("t2v_lora", ["--config", first, "--output_dir", "other"])
    content = {"flags": recorded_flags(args), "given": args.given, "seed": 7}
    (tmp_path / "second.json").write_text(json.dumps(content))
    again = parse_training_args("t2v_lora", ["--config", str(tmp_path / "second.json")])
    assert recorded_flags(again) == recorded_flags(args) and again.output_dir == "other"


def test_flags_win_over_the_config(tmp_path):
    path = record(tmp_path, "--rank", "8", "--frame_buckets", "9", "17")
    flags = ["--rank", "16", "--config", path, "--seed", "3", "--frame_buckets", "5", "--max_num_frames", "5"]
    args = parse_training_args("t2v_lora", flags)
    assert (args.rank, args.seed, args.frame_buckets) == (16, 3, [5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not the args.json of a run"),
        ("[]", "not the args.json of a run"),
        ('{"flags": {"x": 1}, "given": ["x"], "seed": 1}', "holds unknown flags (x)"),
    ],
)
def test_a_config_that_is_none(content, message, tmp_path, capsys):
    path = tmp_path / "args.json"
    if content:
        path.write_text(content)
    assert message in refused_training(capsys, "--config", str(path))


def test_a_refusal_on_a_disk_that_takes_no_status_is_still_one_line(tmp_path, monkeypatch, capsys):
    def refuse(output_dir, message):
        raise StorageError("no rename")

    monkeypatch.setattr("base.status.record_refusal", refuse)
    with pytest.raises(SystemExit) as left:
        parse_training_args("t2v_lora", [*TRAIN, "--output_dir", str(tmp_path), "--rankk", "4"])
    assert left.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
