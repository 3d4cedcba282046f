"""The wrappers, run with stubs in place of accelerate, python and torchrun: what they would start, and what they report."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from dry_run import printed_commands


ROOT = Path(__file__).resolve().parent.parent
PREPARE = ROOT / "prepare_dataset.sh"
CAPTION = ROOT / "caption_dataset.sh"


class Training(NamedTuple):
    """A training wrapper and what sets it apart."""

    script: str  # of args.SCRIPTS
    task: str
    output_name: str
    model: str
    learning_rate: str

    @property
    def wrapper(self):
        return ROOT / f"train_{self.task}.sh"

    @property
    def is_lora(self):
        return self.task.endswith("lora")

    @property
    def is_image_to_video(self):
        return self.task.startswith("image")


T2V_LORA = Training("t2v_lora", "text_to_video_lora", "cogvideox-lora", "zai-org/CogVideoX-5b", "1e-4")
TRAININGS = [
    T2V_LORA,
    Training("t2v_sft", "text_to_video_sft", "cogvideox-sft", "zai-org/CogVideoX-2b", "1e-5"),
    Training("i2v_lora", "image_to_video_lora", "cogvideox-i2v-lora", "zai-org/CogVideoX-5b-I2V", "1e-4"),
    Training("i2v_sft", "image_to_video_sft", "cogvideox-i2v-sft", "zai-org/CogVideoX-5b-I2V", "1e-5"),
]
TRAIN = T2V_LORA.wrapper
WRAPPERS = [*(training.wrapper for training in TRAININGS), PREPARE]
by_training = pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.script)
by_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.stem)

HOSTILE = """  it's "quoted" $(touch pwned) `touch pwned` * \\n %s ${HOME} & ; | > pwned # ~ \u00e9\nsecond line  """

# Writes its argv to a log; a run whose output folder contains FAIL_RUN ends as a failing training does.
STUB = f"""#!{sys.executable}
import json, os, pathlib, sys
argv = sys.argv[1:]
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps([pathlib.Path(sys.argv[0]).name, os.environ.get("CUDA_VISIBLE_DEVICES"), *argv]) + "\\n")
output_dir = pathlib.Path(argv[argv.index("--output_dir") + 1])
output_dir.mkdir(parents=True, exist_ok=True)
run = {{"run": os.environ.get("COGVIDEOX_RUN_ID")}}
status = {{"state": "complete", "exit_code": 0, "step": 3000, **run}}
if os.environ.get("FAIL_RUN", "no run") in output_dir.name:
    status = json.loads(os.environ["FAIL_STATUS"])
    status = status and status | run
if status:
    (output_dir / "status.json").write_text(json.dumps(status, indent=2))
sys.exit(0 if status and status["exit_code"] == 0 else 1)
"""


# The tests' DATA_ROOT, folders of prepared data in the working directory; one that a setting names is made too.
DATA_ROOTS = ["d", "prepared", "birds/red kites", "birds/owls"]


@pytest.fixture
def run_wrapper(tmp_path):
    """Run a wrapper beside its data; returns its result and the stubs' argvs, the program's name first."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("accelerate", "python", "torchrun"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    log = tmp_path / "argv.jsonl"
    work_dir = tmp_path / "work"
    for name in DATA_ROOTS:
        (work_dir / name / "video_latents").mkdir(parents=True)

    def run(wrapper, *arguments, **settings):
        env = {"PATH": f"{stubs}:{os.defpath}", "HOME": str(tmp_path), "STUB_LOG": str(log), "LC_ALL": "C", **settings}
        log.write_text("")
        if not (work_dir / settings.get("DATA_ROOT", "d")).exists():
            (work_dir / settings["DATA_ROOT"] / "video_latents").mkdir(parents=True)
        result = subprocess.run(
            [wrapper, *arguments], env=env, cwd=work_dir, capture_output=True, text=True, encoding="utf-8", timeout=60
        )
        return result, [json.loads(line) for line in log.read_text().splitlines()]

    return run


def output_dir_of(lr: str, optimizer: str = "adamw", name: str = T2V_LORA.output_name) -> str:
    return f"out/{name}__optimizer_{optimizer}__steps_3000__lr-schedule_cosine_with_restarts__learning-rate_{lr}"


VALIDATION_ARGV = [
    "--validation_prompt", "A \"cat\":::A dog", "--validation_prompt_separator", ":::",
    "--num_validation_videos", "2", "--validation_epochs", "10",
]  # fmt: skip


def training_argv(training: Training, lr: str, optimizer: str) -> list[str]:
    return [
        "accelerate", None, "launch", "--quiet",
        "--config_file", str(ROOT / "accelerate_configs/uncompiled_1.yaml"), "--gpu_ids", "0",
        str(ROOT / f"training/cogvideox_{training.task}.py"),
        "--pretrained_model_name_or_path", "some/model", "--data_root", "prepared",
        "--output_dir", output_dir_of(lr, optimizer, training.output_name),
        *(["--rank", "64", "--lora_alpha", "64"] if training.is_lora else []),
        "--mixed_precision", "bf16",
        "--train_batch_size", "1", "--gradient_accumulation_steps", "1", "--max_train_steps", "3000",
        "--optimizer", optimizer, "--learning_rate", lr, "--lr_scheduler", "cosine_with_restarts",
        "--lr_warmup_steps", "200", "--lr_num_cycles", "1", "--beta1", "0.9", "--beta2", "0.95",
        "--weight_decay", "0.001", "--max_grad_norm", "1.0", "--text_dropout", "0.1",
        *(["--noised_image_dropout", "0.05"] if training.is_image_to_video else []),
        "--checkpointing_steps", "1000", "--dataloader_num_workers", "2", "--pin_memory", "--seed", "42",
        "--allow_tf32", "--nccl_timeout", "1800",
        "--memory", "auto", "--load_tensors",
        *VALIDATION_ARGV, *(["--validation_images", "a b.png:::c.png"] if training.is_image_to_video else []),
        "--report_to", "wandb", "--tracker_name", "my project", "--checkpoints_total_limit", "2",
    ]  # fmt: skip


# The flags of the original scripts' sweep in their order, with their values: None for a flag without one, "" for what
# each user or run sets.
ORIGINAL_SWEEP = {
    "--pretrained_model_name_or_path": "", "--data_root": "", "--caption_column": "prompt.txt",
    "--video_column": "videos.txt", "--id_token": "BW_STYLE", "--height_buckets": "480", "--width_buckets": "720",
    "--frame_buckets": "49", "--dataloader_num_workers": "8", "--pin_memory": None, "--validation_prompt": "",
    "--validation_prompt_separator": ":::", "--num_validation_videos": "1", "--validation_epochs": "10",
    "--seed": "42", "--rank": "128", "--lora_alpha": "128", "--mixed_precision": "bf16", "--output_dir": "",
    "--max_num_frames": "49", "--train_batch_size": "1", "--max_train_steps": "3000", "--checkpointing_steps": "1000",
    "--gradient_accumulation_steps": "1", "--gradient_checkpointing": None, "--learning_rate": "",
    "--lr_scheduler": "cosine_with_restarts", "--lr_warmup_steps": "400", "--lr_num_cycles": "1",
    "--enable_slicing": None, "--enable_tiling": None, "--optimizer": "", "--beta1": "0.9", "--beta2": "0.95",
    "--weight_decay": "0.001", "--max_grad_norm": "1.0", "--allow_tf32": None, "--report_to": "wandb",
    "--nccl_timeout": "1800",
}  # fmt: skip


SWEEP = {
    "MODEL": "some/model",
    "DATA_ROOT": "prepared",
    "OUTPUT_ROOT": "out",
    "LEARNING_RATES": "1e-4 1e-3",
    "OPTIMIZERS": "adamw adam",
}
REPORTED = {
    "VALIDATION_PROMPT": 'A "cat":::A dog',
    "VALIDATION_IMAGES": "a b.png:::c.png",
    "NUM_VALIDATION_VIDEOS": "2",
    "REPORT_TO": "wandb",
    "TRACKER_NAME": "my project",
}
SWEEP_RUNS = [("1e-4", "adamw"), ("1e-4", "adam"), ("1e-3", "adamw"), ("1e-3", "adam")]


# ---------------------------------------------------------------- all wrappers


@by_wrapper
def test_unedited_names_the_setting_to_fill(run_wrapper, wrapper):
    result, argvs = run_wrapper(wrapper)
    assert (result.returncode, argvs) == (2, [])
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "fill in DATA_ROOT" in result.stderr


HOSTILE_SETTINGS = {"VALIDATION_PROMPT": "--validation_prompt", "ID_TOKEN": "--id_token", "DATA_ROOT": "--data_root"}
HOSTILE_PREPARE_SETTINGS = {
    "DATA_ROOT": "--data_root",
    "CAPTION_COLUMN": "--caption_column",
    "MODEL": "--model_id",
    "ID_TOKEN": "--id_token",
}


@by_wrapper
def test_hostile_settings_arrive_byte_for_byte(run_wrapper, tmp_path, wrapper):
    settings = HOSTILE_PREPARE_SETTINGS if wrapper == PREPARE else HOSTILE_SETTINGS
    result, [argv] = run_wrapper(wrapper, HOSTILE, OUTPUT_ROOT="out", **dict.fromkeys(settings, HOSTILE))
    assert result.returncode == 0, result.stderr
    for flag in settings.values():
        assert argv[argv.index(flag) + 1] == HOSTILE
    assert argv[-1] == HOSTILE
    assert not list(tmp_path.rglob("pwned"))


@by_wrapper
def test_dry_run_prints_what_a_run_starts_and_starts_nothing(run_wrapper, tmp_path, wrapper):
    settings = {**SWEEP, "ID_TOKEN": HOSTILE}
    before = sorted((tmp_path / "work").rglob("*"))
    dry, none = run_wrapper(wrapper, HOSTILE, DRY_RUN="1", **settings)
    assert (dry.returncode, none) == (0, []), dry.stderr
    assert sorted((tmp_path / "work").rglob("*")) == before
    real, argvs = run_wrapper(wrapper, HOSTILE, **settings)
    assert real.returncode == 0, real.stderr
    # What bash makes of the output is what was started
    shown, replayed = run_wrapper("bash", "-c", dry.stdout)
    assert shown.returncode == 0, shown.stderr
    assert replayed == argvs
    assert len(argvs) == (1 if wrapper == PREPARE else 4)


@by_wrapper
def test_dry_run_prints_one_flag_a_line(run_wrapper, wrapper):
    settings = {**SWEEP, "DATA_ROOT": "birds/red kites", "ID_TOKEN": "it's BW"}
    dry, _ = run_wrapper(wrapper, "--revision=main", "--cache_dir", "a & b", DRY_RUN="1", **settings)
    lines = dry.stdout.splitlines()
    assert max(line.count(" --") for line in lines if not line.startswith("#")) == 1
    for flag in ("--data_root 'birds/red kites'", "--id_token it\\'s\\ BW", "--revision=main"):
        assert f"    {flag} \\" in lines
    _, argvs = run_wrapper(wrapper, "--revision=main", "--cache_dir", "a & b", **settings)
    commands = printed_commands(dry.stdout)
    assert [words for _, words in commands] == [[argv[0], *argv[2:]] for argv in argvs]
    assert [env for env, _ in commands] == ([{"CUDA_VISIBLE_DEVICES": "0"}] if wrapper == PREPARE else [{}] * 4)


ONE_RUN = {"LEARNING_RATES": "1e-4", "OPTIMIZERS": "adamw"}


@pytest.mark.parametrize(
    ("settings", "comments"),
    [
        (ONE_RUN, ["# 1 run"]),
        (
            {**ONE_RUN, "OPTIMIZERS": "adam came"},
            ["# run 1 of 2: --optimizer adam", "# run 2 of 2: --optimizer came", "# 2 runs, differing in optimizer"],
        ),
        (
            {},
            [
                "# run 1 of 4: --learning_rate 1e-4 --optimizer adamw",
                "# run 2 of 4: --learning_rate 1e-4 --optimizer adam",
                "# run 3 of 4: --learning_rate 1e-3 --optimizer adamw",
                "# run 4 of 4: --learning_rate 1e-3 --optimizer adam",
                "# 4 runs, differing in learning_rate and optimizer",
            ],
        ),
        (
            {**ONE_RUN, "LR_SCHEDULES": "constant linear", "MAX_TRAIN_STEPS": "1 2", "LEARNING_RATES": "1 2"},
            [..., "# 8 runs, differing in learning_rate, lr_scheduler and max_train_steps"],
        ),
    ],
)
@by_training
def test_dry_run_says_what_sets_the_runs_apart(run_wrapper, training, settings, comments):
    dry, _ = run_wrapper(training.wrapper, DRY_RUN="1", **(SWEEP | settings))
    found = [line for line in dry.stdout.splitlines() if line.startswith("#")]
    assert found[-1] == dry.stdout.splitlines()[-1] == comments[-1]
    assert found == comments or (comments[0] is ... and len(found) == 9)


@by_wrapper
@pytest.mark.parametrize("dry_run", ["0", "1"])
@pytest.mark.parametrize("data_root", ["nowhere", "d/a_file", "no\nwhere"])
def test_data_that_is_not_there_is_refused(run_wrapper, tmp_path, wrapper, dry_run, data_root):
    (tmp_path / "work/d/a_file").touch()
    result, argvs = run_wrapper("env", f"DATA_ROOT={data_root}", wrapper, DRY_RUN=dry_run)
    assert (result.returncode, argvs, result.stdout) == (2, [], "")
    assert len(result.stderr.splitlines()) == 1
    assert f"{wrapper.name}: DATA_ROOT: there is no folder {' '.join(data_root.split())};" in result.stderr


# ---------------------------------------------------------------- settings, however they are written


@pytest.fixture
def edited(tmp_path):
    """edited(wrapper, text, place): a copy of the repository's wrappers, one of them edited; returns that one."""

    def edit(wrapper, text, place="end"):
        folder = tmp_path / "edited"
        for name in ("training/settings.sh", "training/sweep.sh", "accelerate_configs/uncompiled_1.yaml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        lines = wrapper.read_text().splitlines()
        headers = [index for index, line in enumerate(lines) if line.startswith("# -----")]
        if place == "end":  # of all settings
            lines[headers[2] : headers[2]] = text.splitlines()
        elif place == "over":  # the first block of settings
            lines[headers[0] + 1 : headers[1]] = text.splitlines()
        else:  # line for line
            new = {line.split("=")[0]: line for line in text.splitlines()}
            lines = [new.get(line.split("=")[0], line) for line in lines]
        copy = folder / wrapper.name
        copy.write_text("\n".join(lines) + "\n")
        copy.chmod(0o755)
        return copy

    return edit


def values_of(argv, flag):
    """What stands after `flag`, up to the next one."""
    rest = argv[argv.index(flag) + 1 :]
    return rest[: next((place for place, word in enumerate(rest) if word.startswith("--")), len(rest))]


# As the original's users write them
TRAINING_BLOCK = """\
GPU_IDS=("0")
LEARNING_RATES=("3e-4" "6e-5")
LR_SCHEDULES=("constant" "polynomial")
OPTIMIZERS=("adamw" "came")
MAX_TRAIN_STEPS=("120" "480" "960")
ACCELERATE_CONFIG_FILE="accelerate_configs/uncompiled_1.yaml"
DATA_ROOT="birds/red kites"
CAPTION_COLUMN="prompt.txt"
VIDEO_COLUMN="clips.txt"
"""
PREPARE_BLOCK = """\
MODEL_ID="some/model"
NUM_GPUS=2
DATA_ROOT="birds/red kites"
CAPTION_COLUMN="prompt.txt"
VIDEO_COLUMN="clips.txt"
OUTPUT_DIR="birds/red kites, prepared"
HEIGHT_BUCKETS="480 720"
WIDTH_BUCKETS="720 960"
FRAME_BUCKETS="33 49"
MAX_NUM_FRAMES="49"
MAX_SEQUENCE_LENGTH=200
TARGET_FPS=12
BATCH_SIZE=3
DTYPE=fp32
"""


@by_training
@pytest.mark.parametrize("place", ["end", "over", "lines"])
def test_the_originals_block_of_settings_starts_the_runs_that_it_starts_there(run_wrapper, edited, training, place):
    argument = ["--rank", "128"] if training.is_lora else ["--checkpoints_total_limit", "3"]
    result, argvs = run_wrapper(edited(training.wrapper, TRAINING_BLOCK, place), *argument, "--use_8bit")
    assert result.returncode == 0, result.stderr
    flags = ("--learning_rate", "--lr_scheduler", "--optimizer", "--max_train_steps", "--output_dir")
    found = [tuple(argv[argv.index(flag) + 1] for flag in flags) for argv in argvs]
    expected = [
        (
            lr, schedule, optimizer, steps,
            f"outputs/{training.output_name}__optimizer_{optimizer}__steps_{steps}__lr-schedule_{schedule}"
            f"__learning-rate_{lr}",
        )
        for lr in ("3e-4", "6e-5")
        for schedule in ("constant", "polynomial")
        for optimizer in ("adamw", "came")
        for steps in ("120", "480", "960")
    ]  # fmt: skip
    assert found == expected
    for argv in argvs:
        assert argv[5:8] == [str(result.args[0].parent / "accelerate_configs/uncompiled_1.yaml"), "--gpu_ids", "0"]
        assert values_of(argv, "--data_root") == ["birds/red kites"]
        assert values_of(argv, "--caption_column") == ["prompt.txt"]
        assert values_of(argv, "--video_column") == ["clips.txt"]
        assert argv[-3:] == [*argument, "--use_8bit"]


@pytest.mark.parametrize("place", ["end", "over"])
def test_the_originals_block_of_settings_prepares_what_it_prepares_there(run_wrapper, edited, place):
    result, [argv] = run_wrapper(edited(PREPARE, PREPARE_BLOCK, place), "--save_image_latents")
    assert result.returncode == 0, result.stderr
    assert argv[:5] == ["torchrun", "0,1", "--standalone", "--nproc_per_node", "2"]
    expected = {
        "--model_id": ["some/model"], "--data_root": ["birds/red kites"], "--caption_column": ["prompt.txt"],
        "--video_column": ["clips.txt"], "--output_dir": ["birds/red kites, prepared"],
        "--height_buckets": ["480", "720"], "--width_buckets": ["720", "960"], "--frame_buckets": ["33", "49"],
        "--max_num_frames": ["49"], "--max_sequence_length": ["200"], "--target_fps": ["12"], "--batch_size": ["3"],
        "--dtype": ["fp32"], "--save_latents_and_embeddings": [], "--save_image_latents": [],
    }  # fmt: skip
    assert {flag: values_of(argv, flag) for flag in expected} == expected


LISTS = {
    "LEARNING_RATES": "--learning_rate", "LR_SCHEDULES": "--lr_scheduler", "OPTIMIZERS": "--optimizer",
    "MAX_TRAIN_STEPS": "--max_train_steps", "HEIGHT_BUCKETS": "--height_buckets", "WIDTH_BUCKETS": "--width_buckets",
    "FRAME_BUCKETS": "--frame_buckets",
}  # fmt: skip
WRITTEN = {"array": '("64" "96" "128")', "words": "(64 96 '128')", "text": '"64 96  128"', "lines": "$'64\\n96\\t128'"}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_an_array_or_a_text_in_the_file_or_the_environment(run_wrapper, edited, name, written):
    """Before a command, bash makes a text of an array: NAME=(a b) ./wrapper.sh."""
    trainings = TRAININGS if written == WRITTEN["array"] else TRAININGS[:1]
    for wrapper in [training.wrapper for training in trainings] + ([PREPARE] if name.endswith("_BUCKETS") else []):
        settings = {"DATA_ROOT": "d", "LOAD_TENSORS": "false"}
        in_file = run_wrapper(edited(wrapper, f"{name}={written}"), **settings)
        in_environment = run_wrapper("bash", "-c", f'{name}={written} "$0"', wrapper, **settings)
        for result, argvs in (in_file, in_environment):
            assert result.returncode == 0, result.stderr
            assert sum((values_of(argv, LISTS[name]) for argv in argvs), []) == ["64", "96", "128"]


@pytest.mark.parametrize("written", ["(0 1)", '("0" "1")', '"0 1"', "0,1", '("0,1")', '"0, 1"'])
def test_gpus_are_a_list_however_it_is_written(run_wrapper, edited, written):
    config = str(ROOT / "accelerate_configs/uncompiled_2.yaml")
    for wrapper in (edited(TRAIN, f"GPU_IDS={written}"), edited(PREPARE, f"GPU_IDS={written}")):
        in_file = run_wrapper(wrapper, DATA_ROOT="d", ACCELERATE_CONFIG_FILE=config)
        in_environment = run_wrapper(
            "bash", "-c", f'GPU_IDS={written} "$0"', ROOT / wrapper.name, DATA_ROOT="d", ACCELERATE_CONFIG_FILE=config
        )
        for result, argvs in (in_file, in_environment):
            assert result.returncode == 0, result.stderr
            prepares = wrapper.name == PREPARE.name
            expected = ["0,1", "--standalone", "--nproc_per_node", "2"] if prepares else ["--gpu_ids", "0,1"]
            assert [argv[1:5] if prepares else argv[6:8] for argv in argvs] == [expected]


def test_arrays_of_texts_keep_their_white_space(run_wrapper, edited):
    block = """VALIDATION_PROMPT=("A red kite  over dunes." 'a "cat"' "(a dog)")
VALIDATION_IMAGES=("first frame.png" b.png c.png)
REPORT_TO=(wandb tensorboard)"""
    result, [argv] = run_wrapper(edited(TRAININGS[2].wrapper, block), DATA_ROOT="d")
    assert result.returncode == 0, result.stderr
    assert values_of(argv, "--validation_prompt") == ['A red kite  over dunes.:::a "cat":::(a dog)']
    assert values_of(argv, "--validation_images") == ["first frame.png:::b.png:::c.png"]
    assert values_of(argv, "--report_to") == ["wandb,tensorboard"]
    _, [argv] = run_wrapper(TRAIN, DATA_ROOT="d", VALIDATION_PROMPT="a (small) 'dog'", REPORT_TO="wandb  tensorboard")
    assert values_of(argv, "--validation_prompt") == ["a (small) 'dog'"]  # a text is left as it is
    assert values_of(argv, "--report_to") == ["wandb,tensorboard"]


SEVERAL = {*LISTS, "GPU_IDS", "REPORT_TO", "VALIDATION_PROMPT", "VALIDATION_IMAGES"}


@by_wrapper
def test_an_array_of_several_is_refused_where_one_value_is_taken(run_wrapper, edited, wrapper):
    names = re.findall(r"^([A-Z][A-Z_]*)=", wrapper.read_text(), re.MULTILINE)
    assert len(names) > 15
    for name in [name for name in names if name not in SEVERAL]:
        result, argvs = run_wrapper(edited(wrapper, f'{name}=("one" "two words")'), DATA_ROOT="d")
        assert (result.returncode, argvs) == (2, []), name
        assert result.stderr == f"{wrapper.name}: {name} takes one value, not 2 (one two words)\n"


@by_training
def test_an_array_of_one_or_none_is_that_value(run_wrapper, edited, training):
    block = (
        'SEED=(7)\nID_TOKEN=("my token")\nDATA_ROOT=([2]="d")\nREPORT_TO=()\nVALIDATION_PROMPT=()\nVALIDATION_STEPS=()'
    )
    result, [argv] = run_wrapper(edited(training.wrapper, block))
    assert result.returncode == 0, result.stderr
    assert [values_of(argv, flag) for flag in ("--seed", "--id_token", "--data_root")] == [["7"], ["my token"], ["d"]]
    assert not [word for word in argv[2:] if "validation" in word or "report" in word]
    result, argvs = run_wrapper(edited(training.wrapper, "LR_SCHEDULES=()"), DATA_ROOT="d")
    assert (result.returncode, argvs) == (2, []) and "LR_SCHEDULES" in result.stderr


@by_wrapper
@pytest.mark.parametrize("line", ['LEARNING_RATE=("1e-3")', 'NUM_GPU="2"', 'RANK="${RANK:-8}"'])
def test_a_setting_that_does_not_exist_is_refused(run_wrapper, edited, wrapper, line):
    result, argvs = run_wrapper(edited(wrapper, line), DATA_ROOT="d")
    assert (result.returncode, argvs) == (2, [])
    assert result.stderr == f"{wrapper.name}: {line.split('=')[0]} is no setting of this file\n"


def test_an_own_name_that_a_setting_is_made_of_is_none_of_them(run_wrapper, edited):
    result, [argv] = run_wrapper(edited(TRAIN, 'BIRDS=birds\nDATA_ROOT="$BIRDS/owls"'))
    assert values_of(argv, "--data_root") == ["birds/owls"], result.stderr


@by_wrapper
@pytest.mark.parametrize("name", ["MODEL_ID", "MODEL_PATH"])
def test_the_originals_names_are_taken_and_two_that_disagree_are_refused(run_wrapper, wrapper, name):
    flag = "--model_id" if wrapper == PREPARE else "--pretrained_model_name_or_path"
    result, [argv] = run_wrapper(wrapper, DATA_ROOT="d", **{name: "other/model"})
    assert values_of(argv, flag) == ["other/model"]
    assert result.stderr == f"{wrapper.name}: MODEL is other/model, given as {name}\n"
    result, argvs = run_wrapper(wrapper, DATA_ROOT="d", MODEL="some/model", **{name: "other/model"})
    assert (result.returncode, argvs) == (2, []) and len(result.stderr.splitlines()) == 1
    _, [argv] = run_wrapper(wrapper, DATA_ROOT="d", MODEL="some/model", **{name: "some/model"})
    assert values_of(argv, flag) == ["some/model"]


@pytest.mark.parametrize(
    ("settings", "gpus", "message"),
    [
        ({"NUM_GPUS": "1"}, "0", None),
        ({"NUM_GPUS": "3"}, "0,1,2", None),
        ({"NUM_GPUS": "2", "GPU_IDS": "4 5"}, "4,5", None),
        ({"NUM_GPUS": "4", "GPU_IDS": "4,5"}, None, "NUM_GPUS is 4 but GPU_IDS=4,5 names 2"),
        ({"NUM_GPUS": "all"}, None, "NUM_GPUS is a number of GPUs, not all"),
        ({"NUM_GPUS": "a[$(touch pwned)]"}, None, "NUM_GPUS is a number of GPUs"),
    ],
)
def test_a_number_of_gpus_counts_from_the_first(run_wrapper, tmp_path, settings, gpus, message):
    result, argvs = run_wrapper(PREPARE, DATA_ROOT="d", **settings)
    assert [argv[1] for argv in argvs] == ([gpus] if gpus else []), result.stderr
    assert result.returncode == (2 if message else 0) and (message or "") in result.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_a_relative_config_is_this_repositorys_unless_there_is_one_here(run_wrapper, tmp_path):
    settings = {"DATA_ROOT": "d", "ACCELERATE_CONFIG_FILE": "accelerate_configs/compiled_1.yaml"}
    _, [argv] = run_wrapper(TRAIN, **settings)
    assert argv[5] == str(ROOT / "accelerate_configs/compiled_1.yaml")
    (tmp_path / "work/accelerate_configs").mkdir()
    (tmp_path / "work/accelerate_configs/compiled_1.yaml").write_text("num_processes: 1\n")
    _, [argv] = run_wrapper(TRAIN, **settings)
    assert argv[5] == "accelerate_configs/compiled_1.yaml"


@by_training
def test_a_folder_of_videos_is_trained_as_such_unless_said_otherwise(run_wrapper, training, tmp_path):
    (tmp_path / "work/clips").mkdir()
    result, [argv] = run_wrapper(training.wrapper, DATA_ROOT="clips")
    assert "--load_tensors" not in argv and values_of(argv, "--height_buckets") == ["480"]
    assert "clips holds no video_latents" in result.stderr
    _, [argv] = run_wrapper(training.wrapper, DATA_ROOT="clips", LOAD_TENSORS="true")
    assert "--load_tensors" in argv
    (tmp_path / "work/clips/video_latents").mkdir()
    for settings in ({}, {"LOAD_TENSORS": "auto"}, {"LOAD_TENSORS": ""}):
        result, [argv] = run_wrapper(training.wrapper, DATA_ROOT="clips", **settings)
        assert "--load_tensors" in argv and result.stderr == ""


@by_training
@pytest.mark.parametrize("argument", ["--output_dir", "--hub_model_id=me/lora"])
def test_one_place_for_several_runs_is_refused(run_wrapper, training, argument):
    more = ["runs"] if argument == "--output_dir" else []
    result, argvs = run_wrapper(training.wrapper, argument, *more, **SWEEP)
    assert (result.returncode, argvs) == (2, [])
    assert f"{argument.split('=')[0]} names one place for 4 runs" in result.stderr
    result, [argv] = run_wrapper(training.wrapper, argument, *more, DATA_ROOT="d")
    assert result.returncode == 0 and argument in argv


@by_wrapper
def test_a_file_where_the_results_go_is_refused(run_wrapper, tmp_path, wrapper):
    (tmp_path / "work/out").touch()
    result, argvs = run_wrapper(wrapper, DATA_ROOT="d", OUTPUT_ROOT="out")
    assert (result.returncode, argvs) == (2, []) and "out is a file" in result.stderr


# ---------------------------------------------------------------- training


@by_training
def test_sweep_argv_is_exact(run_wrapper, training):
    result, argvs = run_wrapper(training.wrapper, "--checkpoints_total_limit", "2", **SWEEP, **REPORTED)
    assert result.returncode == 0, result.stderr
    assert argvs == [training_argv(training, *run) for run in SWEEP_RUNS]


@by_training
def test_model_and_learning_rate_of_the_task(run_wrapper, training):
    _, [argv] = run_wrapper(training.wrapper, DATA_ROOT="d")
    assert argv[argv.index("--pretrained_model_name_or_path") + 1] == training.model
    assert argv[argv.index("--learning_rate") + 1] == training.learning_rate


@by_training
def test_what_image_to_video_alone_offers(run_wrapper, training):
    settings = {"NOISED_IMAGE_DROPOUT": "0.5", "DROP_LEARNED_POSITIONS": "true"}
    result, argvs = run_wrapper(training.wrapper, DATA_ROOT="d", **settings)
    assert result.returncode == 0, result.stderr
    assert ("--drop_learned_positions" in argvs[0]) == training.is_image_to_video
    assert ("0.5" in argvs[0]) == training.is_image_to_video


def test_every_swept_setting_is_swept_and_files_are_no_values(run_wrapper, tmp_path):
    (tmp_path / "work/a_file").touch()
    _, argvs = run_wrapper(
        TRAIN, DATA_ROOT="d", LEARNING_RATES=" 1e-4\n*", LR_SCHEDULES="constant linear", MAX_TRAIN_STEPS="1\t2"
    )
    flags = ("--learning_rate", "--lr_scheduler", "--max_train_steps")
    runs = [tuple(argv[argv.index(flag) + 1] for flag in flags) for argv in argvs]
    expected = [(lr, name, steps) for lr in ("1e-4", "*") for name in ("constant", "linear") for steps in "12"]
    assert runs == expected
    assert len({argv[argv.index("--output_dir") + 1] for argv in argvs}) == len(expected)


@by_training
def test_what_is_not_set_is_not_passed(run_wrapper, training):
    _, [argv] = run_wrapper(training.wrapper, DATA_ROOT="d", TRACKER_NAME="a name without a tracker")
    optional = {"--id_token", "--dataset_file", "--drop_learned_positions", "--report_to", "--tracker_name"}
    assert not optional & set(argv)
    assert not [word for word in argv if word and "validation" in word]


@by_training
def test_every_flag_of_the_originals_sweep_is_passed(run_wrapper, training):
    _, [argv] = run_wrapper(
        training.wrapper, DATA_ROOT="d", LOAD_TENSORS="false", ID_TOKEN="BW_STYLE", VALIDATION_PROMPT="p",
        REPORT_TO="wandb", CAPTION_COLUMN="prompt.txt", VIDEO_COLUMN="videos.txt",
    )  # fmt: skip
    no_meaning = set() if training.is_lora else {"--rank", "--lora_alpha"}
    replaced = {"--gradient_checkpointing"} if "--memory" in argv else set()  # a level says more
    no_use = {"--enable_slicing", "--enable_tiling"}  # whole frames take less memory than tiles did
    assert not ORIGINAL_SWEEP.keys() - no_meaning - replaced - no_use - set(argv)


@by_training
def test_validation_by_steps_takes_the_place_of_epochs(run_wrapper, training):
    settings = {"VALIDATION_PROMPT": "p", "VALIDATION_STEPS": "250", "VALIDATION_EPOCHS": "3"}
    _, [argv] = run_wrapper(training.wrapper, DATA_ROOT="d", **settings)
    assert argv[argv.index("--validation_steps") + 1] == "250"
    assert "--validation_epochs" not in argv


@by_training
def test_raw_videos_are_trained_at_the_sizes_set(run_wrapper, training):
    settings = {"HEIGHT_BUCKETS": "64 96", "FRAME_BUCKETS": "9 17", "DATASET_FILE": "a b.csv"}
    _, [argv] = run_wrapper(training.wrapper, DATA_ROOT="d", LOAD_TENSORS="false", **settings)
    assert "--load_tensors" not in argv
    start = argv.index("--height_buckets")
    assert argv[start : start + 9] == [
        "--height_buckets", "64", "96", "--width_buckets", "720", "--frame_buckets", "9", "17", "--max_num_frames",
    ]  # fmt: skip
    assert argv[argv.index("--dataset_file") + 1] == "a b.csv"


def test_a_failing_run_is_reported_and_the_rest_goes_on(run_wrapper):
    failure = {"exit_code": 65, "state": "failed", "step": 12, "message": 'a "bad" clip, exit'}
    result, argvs = run_wrapper(TRAIN, FAIL_RUN="optimizer_adam__", FAIL_STATUS=json.dumps(failure), **SWEEP)
    assert result.returncode == 65
    assert len(argvs) == 4
    table = [line.split() for line in result.stdout.split("output_dir\n")[1].splitlines()]
    assert table == [
        ["failed", "65", "12", output_dir_of(*run)]
        if run[1] == "adam"
        else ["complete", "0", "3000", output_dir_of(*run)]
        for run in SWEEP_RUNS
    ]
    assert result.stderr.count("failed with exit code 65") == 2


def test_an_older_status_says_nothing_of_a_run_that_wrote_none(run_wrapper):
    first, _ = run_wrapper(TRAIN, **SWEEP)
    assert first.returncode == 0
    result, argvs = run_wrapper(TRAIN, FAIL_RUN="1e-3", FAIL_STATUS="null", **SWEEP)
    assert result.returncode == 1
    assert len(argvs) == 4
    assert result.stderr.count("failed with exit code 1") == 2


def test_an_interrupted_run_ends_the_sweep(run_wrapper):
    status = json.dumps({"state": "interrupted", "exit_code": 75, "step": 7})
    result, argvs = run_wrapper(TRAIN, FAIL_RUN="optimizer_adam__", FAIL_STATUS=status, **SWEEP)
    assert result.returncode == 75
    assert len(argvs) == 2
    assert result.stdout.count("not started") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"GPU_IDS": "0,1"}, "GPU_IDS=0,1 names 2 but num_processes is 1"),
        ({"ACCELERATE_CONFIG_FILE": str(ROOT / "accelerate_configs/uncompiled_2.yaml")}, "num_processes is 2"),
        ({"ACCELERATE_CONFIG_FILE": "nowhere.yaml"}, "there is no nowhere.yaml"),
        ({"LOAD_TENSORS": "yes"}, "LOAD_TENSORS is true, false or auto"),
        ({"LEARNING_RATES": " "}, "LEARNING_RATES"),
    ],
)
@by_training
def test_settings_that_cannot_work_are_refused_in_one_line(run_wrapper, training, settings, message):
    result, argvs = run_wrapper(training.wrapper, DATA_ROOT="d", **settings)
    assert (result.returncode, argvs) == (2, [])
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("wrapper", "name"), [(TRAININGS[2].wrapper, "DROP_LEARNED_POSITIONS"), (PREPARE, "IMAGE_LATENTS")]
)
def test_a_choice_of_two_is_true_or_false(run_wrapper, wrapper, name):
    result, argvs = run_wrapper(wrapper, DATA_ROOT="d", **{name: "1"})
    assert (result.returncode, argvs) == (2, [])
    assert result.stderr == f"{wrapper.name}: {name} is true or false, not 1\n"


def test_two_gpus_are_launched_with_the_config_for_two(run_wrapper):
    config = str(ROOT / "accelerate_configs/uncompiled_2.yaml")
    result, [argv] = run_wrapper(TRAIN, DATA_ROOT="d", GPU_IDS="2,3", ACCELERATE_CONFIG_FILE=config)
    assert result.returncode == 0, result.stderr
    assert argv[2:8] == ["launch", "--quiet", "--config_file", config, "--gpu_ids", "2,3"]


def test_the_environment_of_make_install_is_found(run_wrapper, tmp_path):
    for name in (TRAIN.name, "training/settings.sh", "training/sweep.sh", "accelerate_configs/uncompiled_1.yaml"):
        (tmp_path / "copy" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    refused, argvs = run_wrapper(tmp_path / "copy" / TRAIN.name, DATA_ROOT="d", PATH=os.defpath)
    assert (refused.returncode, argvs) == (2, [])
    assert "make install" in refused.stderr
    shutil.copytree(tmp_path / "bin", tmp_path / "copy/.venv/bin")
    result, [argv] = run_wrapper(tmp_path / "copy" / TRAIN.name, DATA_ROOT="d", PATH=os.defpath)
    assert result.returncode == 0, result.stderr
    assert argv[0] == "accelerate"


def test_the_launchers_own_program_is_started_where_it_is(run_wrapper, tmp_path):
    shutil.copy(tmp_path / "bin/accelerate", tmp_path / "bin/accelerate-launch")
    result, [argv] = run_wrapper(TRAIN, DATA_ROOT="d")
    assert argv[0] == "accelerate-launch" and argv[2] == "--quiet", result.stderr
    shown, _ = run_wrapper(TRAIN, DATA_ROOT="d", DRY_RUN="1")
    assert shown.stdout.startswith("accelerate launch ")


# ---------------------------------------------------------------- preparation


def test_prepare_argv_is_exact(run_wrapper):
    result, [argv] = run_wrapper(
        PREPARE, "--save_previews", MODEL="some/model", DATA_ROOT="clips/", DATASET_FILE="clips/a.csv", GPU_IDS="3",
        CAPTION_COLUMN="caption", VIDEO_COLUMN="path", HEIGHT_BUCKETS="64 96", TARGET_FPS="16", IMAGE_LATENTS="true",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert argv == [
        "python", "3", str(ROOT / "training/prepare_dataset.py"), "--model_id", "some/model",
        "--data_root", "clips/", "--output_dir", "clips-prepared", "--save_latents_and_embeddings",
        "--height_buckets", "64", "96", "--width_buckets", "720", "--frame_buckets", "49", "--max_num_frames", "49",
        "--dtype", "bf16", "--batch_size", "1", "--dataloader_num_workers", "2",
        "--save_image_latents", "--dataset_file", "clips/a.csv", "--caption_column", "caption", "--video_column", "path",
        "--target_fps", "16", "--save_previews",
    ]  # fmt: skip


def test_image_latents_are_prepared_only_when_asked_for(run_wrapper):
    _, [argv] = run_wrapper(PREPARE, DATA_ROOT="clips")
    assert "--save_image_latents" not in argv


def test_prepare_splits_over_gpus_and_keeps_the_exit_code(run_wrapper):
    status = json.dumps({"state": "failed", "exit_code": 65, "step": 0})
    result, [argv] = run_wrapper(PREPARE, DATA_ROOT="clips", GPU_IDS="0,2", FAIL_RUN="clips", FAIL_STATUS=status)
    assert argv[:5] == ["torchrun", "0,2", "--standalone", "--nproc_per_node", "2"]
    assert result.returncode == 65


# ---------------------------------------------------------------- captions

CAPTION_SETTINGS = {
    "DATASET_FILE": "--dataset_file", "CAPTION_COLUMN": "--caption_column", "VIDEO_COLUMN": "--video_column",
    "OUTPUT_ROOT": "--output_dir", "BASE_URL": "--base_url", "CAPTIONER": "--model", "CONCURRENCY": "--concurrency",
    "MODEL": "--pretrained_model_name_or_path", "NUM_FRAMES": "--num_frames", "PROMPT_FILE": "--prompt_file",
    "TRIGGER": "--trigger", "MAX_TOKENS": "--max_tokens",
}  # fmt: skip


def test_caption_argv_is_exact(run_wrapper):
    result, [argv] = run_wrapper(CAPTION, "--timeout", "60", DATA_ROOT="clips", TRIGGER="BW STYLE", MODEL="some/model")
    assert result.returncode == 0, result.stderr
    assert argv == [
        "python", None, str(ROOT / "training/caption_dataset.py"), "--data_root", "clips", "--output_dir", "clips",
        "--base_url", "http://localhost:8000/v1", "--concurrency", "8", "--send", "frames", "--context", "none",
        "--num_frames", "8", "--pretrained_model_name_or_path", "some/model", "--trigger", "BW STYLE", "--timeout", "60",
    ]  # fmt: skip


def test_every_setting_of_captions_arrives_byte_for_byte_and_parses(run_wrapper, tmp_path):
    from args import parse_caption_args

    numbers = {"CONCURRENCY": "3", "NUM_FRAMES": "4", "MAX_TOKENS": "99", "BASE_URL": "https://vlm.example/v1"}
    values = dict.fromkeys(CAPTION_SETTINGS, HOSTILE) | numbers
    result, [argv] = run_wrapper(CAPTION, DATA_ROOT=HOSTILE, RECAPTION="true", CONTEXT="caption", **values)
    assert result.returncode == 0, result.stderr
    assert {name: values_of(argv, flag) for name, flag in CAPTION_SETTINGS.items()} == {
        name: [value] for name, value in values.items()
    }
    args = parse_caption_args(argv[3:])
    assert (args.recaption, args.context, args.trigger, args.data_root) == (True, "caption", HOSTILE, HOSTILE)
    _, [argv] = run_wrapper(CAPTION, DATA_ROOT="d", SEND="video")
    assert "--num_frames" not in argv and parse_caption_args(argv[3:]).send == "video"
    assert not list(tmp_path.rglob("pwned"))


def test_a_dry_run_of_captions_prints_what_a_run_starts_and_starts_nothing(run_wrapper, tmp_path):
    settings = {"DATA_ROOT": "birds/red kites", "TRIGGER": HOSTILE}
    before = sorted((tmp_path / "work").rglob("*"))
    dry, none = run_wrapper(CAPTION, HOSTILE, DRY_RUN="1", **settings)
    assert (dry.returncode, none) == (0, []) and sorted((tmp_path / "work").rglob("*")) == before
    assert dry.stdout.endswith("\n# 1 run\n") and "    --data_root 'birds/red kites' \\\n" in dry.stdout
    _, argvs = run_wrapper(CAPTION, HOSTILE, **settings)
    _, replayed = run_wrapper("bash", "-c", dry.stdout)
    assert replayed == argvs and len(argvs) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"DATA_ROOT": ""}, "fill in DATA_ROOT"),
        ({"DATA_ROOT": "nowhere"}, "DATA_ROOT: there is no folder nowhere"),
        ({"RECAPTION": "1"}, "RECAPTION is true or false, not 1"),
        ({"TRIGGER": "(a b)"}, "TRIGGER=(a b): an array in front of the command"),
        ({"OUTPUT_ROOT": "birds/a_file"}, "OUTPUT_ROOT: birds/a_file is a file"),
    ],
)
def test_settings_of_captions_that_cannot_work_are_refused(run_wrapper, tmp_path, settings, message):
    (tmp_path / "work/birds/a_file").touch()
    given = {f"{name}={value}" for name, value in ({"DATA_ROOT": "d"} | settings).items()}
    result, argvs = run_wrapper("env", *given, CAPTION)  # DATA_ROOT is not made
    assert (result.returncode, argvs, result.stdout) == (2, [], "") and result.stderr.count("\n") == 1
    assert f"caption_dataset.sh: {message}" in result.stderr


def test_captions_keep_the_exit_code(run_wrapper):
    status = json.dumps({"state": "failed", "exit_code": 65})
    result, _ = run_wrapper(CAPTION, DATA_ROOT="d", OUTPUT_ROOT="out", FAIL_RUN="out", FAIL_STATUS=status)
    assert result.returncode == 65


@pytest.mark.parametrize("line", ['CAPTION_MODEL="a"', 'FRAMES="2"'])
def test_a_setting_that_captions_do_not_have_is_refused(run_wrapper, edited, line):
    result, argvs = run_wrapper(edited(CAPTION, line, "over"), DATA_ROOT="d")
    assert (result.returncode, argvs) == (2, []) and "is no setting of this file" in result.stderr


# ---------------------------------------------------------------- accelerate itself


@by_training
def test_commands_parse_as_the_scripts_own_flags(run_wrapper, training):
    """The wrappers' flags exist and work, and the token survives accelerate's own parser."""
    from accelerate.commands.launch import launch_command_parser

    from args import parse_training_args

    settings = REPORTED | {"VALIDATION_STEPS": "250", "ID_TOKEN": HOSTILE, "DROP_LEARNED_POSITIONS": "true"}
    _, [argv] = run_wrapper(training.wrapper, DATA_ROOT="d", **settings)
    launched = launch_command_parser().parse_args(argv[3:])
    args = parse_training_args(training.script, launched.training_script_args)
    assert (args.id_token, args.validation_steps, args.tracker_name) == (HOSTILE, 250, "my project")
    _, [argv] = run_wrapper(training.wrapper, DATA_ROOT="d", LOAD_TENSORS="false")
    launched = launch_command_parser().parse_args(argv[3:])
    assert parse_training_args(training.script, launched.training_script_args).frame_buckets == [49]


def test_the_prepare_command_parses_as_the_scripts_own_flags(run_wrapper):
    from args import parse_prepare_args

    _, [argv] = run_wrapper(PREPARE, DATA_ROOT="d", TARGET_FPS="16", IMAGE_LATENTS="true")
    args = parse_prepare_args(argv[3:])
    assert (args.target_fps, args.save_image_latents) == (16, True)


CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
by_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)


def launcher_environment(config, monkeypatch):
    """(number of processes, what `accelerate launch` with this config puts into the environment of its processes)."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    argv = ["--quiet", "--config_file", str(config), "--gpu_ids", "0,1", "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return args.num_processes, launch.prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu:
        return args.num_processes, launch.prepare_multi_gpu_env(args)
    return args.num_processes, launch.prepare_simple_launcher_cmd_env(args)[1]


@by_config
def test_configs_leave_precision_accumulation_clipping_and_gpus_to_the_flags(config, monkeypatch):
    num_processes, environment = launcher_environment(config, monkeypatch)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # what is exported where nothing is said
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert not {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"} & environment.keys()
    assert num_processes == (2 if config.stem == "uncompiled_2" else 1)
    compiled = config.stem.startswith("compiled")
    assert environment.get("ACCELERATE_DYNAMO_BACKEND", "NO") == ("INDUCTOR" if compiled else "NO")
    is_deepspeed = config.stem == "deepspeed"
    assert environment.get("ACCELERATE_USE_DEEPSPEED", "false") == str(is_deepspeed).lower()
    if is_deepspeed:
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
        assert environment["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == "cpu"


@by_config
def test_configs_say_hardware_and_effect_and_fit_the_wrappers(config, run_wrapper):
    header = config.read_text().split("compute_environment")[0]
    assert header.startswith("# Hardware: ")
    assert "\n# Effect: " in header
    gpus = "0,1" if config.stem == "uncompiled_2" else "0"
    result, [argv] = run_wrapper(TRAIN, DATA_ROOT="d", GPU_IDS=gpus, ACCELERATE_CONFIG_FILE=str(config))
    assert result.returncode == 0, result.stderr
    assert argv[5] == str(config)


def test_make_help_lists_every_target_and_each_parses():
    shown = subprocess.run(
        ["make", "-s", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = [line.split()[0] for line in shown.splitlines()]
    assert {"help", "install", "quickstart", "test", "test-gpu", "quality", "style", "clean"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("training/*.sh"), *ROOT.glob("tiny_model/*.sh"), ROOT / ".ci/run"]
    result = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_training_script_has_a_wrapper():
    from base.flag_parser import SCRIPTS

    assert {training.script: f"cogvideox_{training.task}.py" for training in TRAININGS} == SCRIPTS


@by_wrapper
@pytest.mark.parametrize("name", ["ID_TOKEN", "MODEL", "DATA_ROOT", "OUTPUT_ROOT"])
def test_an_array_in_front_of_a_command_is_no_text_of_one_value(run_wrapper, wrapper, name):
    """bash hands ID_TOKEN=(x) ./wrapper on as the text "(x)"."""
    result, argvs = run_wrapper(wrapper, **{"DATA_ROOT": "d", name: "(x)"})
    assert (result.returncode, argvs) == (2, []) and f"{name}=(x): an array in front of the command" in result.stderr


@by_training
def test_an_array_of_prompts_in_front_of_a_command_is_refused(run_wrapper, training):
    result, argvs = run_wrapper(training.wrapper, DATA_ROOT="d", VALIDATION_PROMPT="(A cat runs. A dog sits.)")
    assert (result.returncode, argvs) == (2, []) and "write ::: between texts" in result.stderr
