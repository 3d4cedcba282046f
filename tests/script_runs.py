"""A training script on a tiny model, in this process: its data, its commands, its runs, and what they leave behind.

conftest.py makes the fixtures known to every test.
"""

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from args import parse_prepare_args, parse_training_args
from engine import objective
from run.exits import run_script
from synthetic_clips import write_clip


ROOT = Path(__file__).resolve().parent.parent


class Script(NamedTuple):
    """A training script and the tiny pipelines that it is tried on."""

    module: str
    key: str  # of args.SCRIPTS
    kind: str
    other_kinds: tuple[str, ...]
    flags: tuple[str, ...] = ()


LORA_FLAGS = ("--rank", "4", "--lora_alpha", "4")
SFT_FLAGS = ("--save_dtype", "fp32")
SCRIPTS = {
    "t2v_lora": Script("cogvideox_text_to_video_lora", "t2v_lora", "5b", ("2b", "1.5-5b"), LORA_FLAGS),
    "t2v_sft": Script("cogvideox_text_to_video_sft", "t2v_sft", "5b", ("2b", "1.5-5b"), SFT_FLAGS),
    "i2v_lora": Script("cogvideox_image_to_video_lora", "i2v_lora", "1.5-5b-i2v", ("5b-i2v",), LORA_FLAGS),
    "i2v_sft": Script("cogvideox_image_to_video_sft", "i2v_sft", "1.5-5b-i2v", ("5b-i2v",), SFT_FLAGS),
}
# In `make test` two scripts, of either task and either method, stand for the four: test_structure.py proves that all make
# the same calls in the same order.
EVERY_SCRIPT = [
    pytest.param(name, marks=[] if name in ("t2v_lora", "i2v_sft") else pytest.mark.slow) for name in SCRIPTS
]
LORA_SCRIPTS = [name for name in SCRIPTS if name.endswith("lora")]

BUCKET_FLAGS = ["--height_buckets", "64", "--width_buckets", "64", "96", "--frame_buckets", "9"]
DEFAULTS = [
    "--optimizer", "adamw", "--learning_rate", "1e-2", "--lr_warmup_steps", "0", "--train_batch_size", "1",
    "--checkpointing_steps", "1",
]  # fmt: skip
TEXT_FILES = ["--caption_column", "prompts.txt", "--video_column", "videos.txt"]
SIZES = {"one": [(9, 64, 96)] * 4, "two": [(9, 64, 96)] * 4 + [(9, 64, 64), (14, 64, 64)]}  # frames, height, width


# ---------------------------------------------------------------- data


@pytest.fixture(scope="session")
def clips(once):
    """name of SIZES -> folder of raw clips; read-only."""
    return {name: once(f"clips-{name}", lambda folder, name=name: write_clips(folder, SIZES[name])) for name in SIZES}


def write_clips(folder, sizes):
    (folder / "videos").mkdir()
    for i, (frames, height, width) in enumerate(sizes):
        write_clip(folder / f"videos/{i}.mp4", frames, height, width, seed=i)
    write_lists(folder, [f"clip {i} of a moving square" for i in range(len(sizes))])


def write_lists(folder, prompts):
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    (folder / "videos.txt").write_text("".join(f"videos/{i}.mp4\n" for i in range(len(prompts))))


@pytest.fixture(scope="session")
def prepared(clips, tiny, once):
    """(kind, name of SIZES) -> folder of prepare_dataset.py; read-only."""

    def folder_of(kind, name="one"):
        build = lambda out: prepare(tiny(kind), clips[name], out, *image_flags(kind))  # noqa: E731
        return once(f"prepared-{kind}-{name}", build)

    return folder_of


def image_flags(kind):
    return ["--save_image_latents", "--num_image_variants", "1"] if kind.endswith("i2v") else []


def prepare(model, data_root, out, *flags):
    paths = ["--model_id", str(model), "--data_root", str(data_root), "--output_dir", str(out)]
    fixed = [*paths, *TEXT_FILES, "--target_fps", "8", "--save_latents_and_embeddings", *BUCKET_FLAGS]
    fixed += ["--seed", "1"]  # the runs' own: a longer clip starts at the same place, prepared or not
    importlib.import_module("prepare_dataset").main(parse_prepare_args([*fixed, *flags]))


@pytest.fixture
def own_copy(tmp_path):
    """A copy of a read-only folder that a test may spoil."""
    return lambda folder, name: shutil.copytree(folder, tmp_path / name)


# ---------------------------------------------------------------- runs


four_scripts = pytest.mark.parametrize("script", SCRIPTS, indirect=True)  # all of them in `make test` too


@pytest.fixture(params=EVERY_SCRIPT)
def script(request):
    return SCRIPTS[request.param]


@pytest.fixture
def module(script):
    return importlib.import_module(script.module)


@pytest.fixture
def command(script, tiny, prepared, clips, tmp_path):
    """(name of the output folder, flags) -> argv of the script, by default on prepared data of one bucket."""

    def make(name, *flags, data="one", raw=False, model=None, seed=1):
        argv = ["--pretrained_model_name_or_path", str(model or tiny(script.kind)), *DEFAULTS]
        argv += ["--output_dir", str(tmp_path / name)]
        argv += [*script.flags, *([] if seed is None else ["--seed", str(seed)])]
        if raw:
            folder = data if isinstance(data, Path) else clips[data]
            return argv + ["--data_root", str(folder), *TEXT_FILES, "--fps", "8", *BUCKET_FLAGS, *flags]
        folder = data if isinstance(data, Path) else prepared(script.kind, data)
        return argv + ["--data_root", str(folder), "--load_tensors", *flags]

    return make


@pytest.fixture
def train(script, module, command, tmp_path):
    """Run the script in this process, as `command` says; returns the output folder."""

    def run(name, *flags, **where):
        module.main(parse_training_args(script.key, command(name, *flags, **where)))
        return tmp_path / name

    return run


@pytest.fixture
def stops(train, tmp_path, capsys):
    """Run the script and expect it to leave with an exit code; returns its last line on stderr, the only error there."""

    def run(code, name, *flags, **where):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_script(lambda: train(name, *flags, **where), tmp_path / name)
        assert left.value.code == code
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return run


def result_tensors(folder):
    """What was trained, from a LoRA file or a `transformer` folder."""
    lora = folder / "pytorch_lora_weights.safetensors"
    files = [lora] if lora.exists() else sorted((folder / "transformer").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def result_hash(folder):
    lora = folder / "pytorch_lora_weights.safetensors"
    files = [lora] if lora.exists() else sorted((folder / "transformer").glob("*.safetensors"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def metrics(folder):
    """The lines of updates, without those of events."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "event" not in row]


def losses(folder):
    return [row["loss"] for row in metrics(folder)]


def status(folder):
    return json.loads((folder / "status.json").read_text())


def checkpoints(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def same_run(ours, theirs, step):
    """The same result file, the same losses and the same optimizer state, bit for bit."""
    folders = [run / f"checkpoint-{step}" for run in (ours, theirs)]
    states = [load_file(folder / "optimizer.safetensors") for folder in folders]
    assert states[0] and states[0].keys() == states[1].keys()
    equal = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    numbers = [[(row["step"], row["loss"], row["grad_norm"]) for row in metrics(run)] for run in (ours, theirs)]
    texts = [(folder / "state.json").read_bytes() for folder in folders]
    return result_hash(ours) == result_hash(theirs) and equal and numbers[0] == numbers[1] and texts[0] == texts[1]


def distance(ours, theirs):
    """Norm of the difference of two results, as a share of their norm."""
    ours, theirs = result_tensors(ours), result_tensors(theirs)
    assert ours.keys() == theirs.keys()
    difference = sum((ours[name].double() - theirs[name].double()).square().sum() for name in ours)
    return float(difference.sqrt() / sum(ours[name].double().square().sum() for name in ours).sqrt())


def interrupt(monkeypatch, module, update_number):
    """Ctrl-C in place of the update of this number."""
    calls, update = [], module.update

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == update_number:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(module, "update", interrupted)


def make_loss_nan(monkeypatch, is_bad):
    """The loss is NaN in the forward passes, counted from 1, that `is_bad` picks."""
    calls, v_prediction_loss = [], objective.v_prediction_loss

    def spoiled(*arguments):
        calls.append(None)
        return v_prediction_loss(*arguments) * (math.nan if is_bad(len(calls)) else 1)

    monkeypatch.setattr(objective, "v_prediction_loss", spoiled)


# ---------------------------------------------------------------- several processes


def run_ranks(main, num_ranks):
    """Exit codes of `main` in forked processes that meet over gloo: importing everything anew would take 8 s each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def work(rank):
        from accelerate.state import AcceleratorState, GradientState

        torch.set_num_threads(1)  # renews the thread pool, which several threads may not do at once after a fork
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        main()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]
