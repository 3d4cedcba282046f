"""Checkpoints that survive: killed at every file operation, torn in every way, on a full disk, beside another run."""

import builtins
import io
import json
import logging
import os
import resource
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from args import parse_training_args
from base import files as files_module
from base import tensor_file
from base.errors import NumbersError, StorageError, UsageError
from base.files import release_locks, write_manifest, written_folder
from base.manifest import find_damage
from engine.optimizers import split_tensors
from run import checkpoints
from run.checkpoints import write_checkpoint
from run.exits import run_script
from run.output_dir import checkpoint_dirs, open_output_dir, write_record
from run.result import check_disk
from test_checkpointing import MAIN, PROVENANCE, OneTensorEngine, make_state, run_in, step


KILLED = 77
ARGV = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--load_tensors", "--output_dir"]


class FolderEngine(OneTensorEngine):
    """Saves a folder beside a file, as full fine-tuning does."""

    def save_state(self, directory):
        super().save_state(directory)
        (directory / "transformer").mkdir()
        (directory / "transformer/config.json").write_text("{}")
        safetensors.torch.save_file({"weight": self.weight.data}, directory / "transformer/model.safetensors")


def flags(out, *more):
    return parse_training_args("t2v_lora", [*ARGV, str(out), *more])


@pytest.fixture
def state():
    state = make_state(engine_class=FolderEngine)
    step(state, 3)
    return state


@pytest.fixture
def out(state, tmp_path):
    """The folder of a run killed after its checkpoints 1 and 2."""
    folder = tmp_path / "out"
    open_output_dir(flags(folder), MAIN)
    write_record(flags(folder), 5, {})
    for number in (1, 2):
        write_checkpoint(folder, number, state, PROVENANCE)
    release_locks()
    return folder


def continued(out, *more):
    """The checkpoint that the same command goes on from, read to its end; its weights and states are loaded whole."""
    args, run = flags(out, *more), run_in(out)
    open_output_dir(args, MAIN)
    try:
        if path := checkpoints.find(args, run, 100, {}):
            resumed = make_state(engine_class=FolderEngine)
            path = out / f"checkpoint-{checkpoints.resume(args, run, path, resumed, PROVENANCE)}"
            assert content_of(resumed) == content_of(loaded(path))
        return path
    finally:
        release_locks()


def loaded(path):
    state = make_state(engine_class=FolderEngine)
    checkpoints.load(path, state, PROVENANCE)
    return state


def content_of(state):
    """Everything that training goes on from, comparable."""
    tensors, rest = split_tensors(state.optimizer.state_dict())
    tensors |= {f"weight {name}": weight.detach() for name, weight in state.engine.weights.items()}
    return {name: tensor.tolist() for name, tensor in tensors.items()}, rest, state.lr_scheduler.state_dict()


def partial(out):
    return [path.name for path in checkpoint_dirs(out) if find_damage(path)]


# ---------------------------------------------------------------- killed at every file operation


def in_child(function) -> int:
    """The exit code of `function` in a forked process."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - nothing of pytest may go on in the child
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


OPERATIONS = [
    (os, "open"), (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"),
    (os, "write"), (os, "ftruncate"), (builtins, "open"), (io, "open"), (safetensors.torch, "serialize_file"),
    (tensor_file, "bytes_of"),
]  # fmt: skip


def at_each_operation(act):
    """Replace every function that changes files by one that first calls `act(number, name, arguments)`."""
    count = 0

    def watched(name, original):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            act(count, name, arguments)
            return original(*arguments, **options)

        return call

    for module, name in OPERATIONS:
        setattr(module, name, watched(name, getattr(module, name)))


def kill_at(last):
    """Die before operation `last`; of a file of tensors, half is written."""
    serialize = safetensors.torch.serialize_file

    def act(number, name, arguments):
        if number == last:
            if name == "serialize_file":
                serialize(*arguments)
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            os._exit(KILLED)

    at_each_operation(act)


def count_operations(function, folder):
    log = folder / "operations"

    def counted():
        names = []
        at_each_operation(lambda number, name, arguments: names.append(name))
        function()
        os._exit(log.write_text(" ".join(names)) < 0)

    assert in_child(counted) == 0
    return log.read_text().split()


@pytest.mark.parametrize("number", [3, 2], ids=["a new one, the oldest goes", "one again under its name"])
def test_a_save_killed_at_every_file_operation_loses_nothing(number, state, out, tmp_path):
    args, run = Namespace(checkpoints_total_limit=2), run_in(tmp_path / "copy")

    def save():
        checkpoints.save(args, run, number, state, PROVENANCE)

    def copy():
        shutil.rmtree(run.output_dir, ignore_errors=True)
        return Path(shutil.copytree(out, run.output_dir))

    folder = copy()
    operations = count_operations(save, tmp_path)
    assert len(operations) > 30 and {"fsync", "rename", "mkdir", "serialize_file", "bytes_of", "rmdir"} <= set(
        operations
    )
    reached = set()
    for last in range(1, len(operations) + 1):
        folder = copy()
        assert in_child(lambda last=last: (kill_at(last), save())) == KILLED
        assert not partial(folder), f"killed at operation {last}, {operations[last - 1]}"
        path = continued(folder)
        assert int(path.name.removeprefix("checkpoint-")) >= 2, f"killed at operation {last}, {operations[last - 1]}"
        assert not [left for left in folder.iterdir() if left.name.startswith((".tmp", ".old"))]
        other = make_state()
        reached.add(checkpoints.load(path, other, PROVENANCE))
        assert torch.equal(other.engine.weight, state.engine.weight)
    assert reached == {2, number}


def test_everything_is_on_the_disk_before_the_rename(state, tmp_path, monkeypatch):
    """A power cut keeps the order of what was flushed: all files, then the manifest, then the folders, then the name."""
    events = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    )
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    path = write_checkpoint(tmp_path, 3, state, PROVENANCE)
    place = events.index("rename", len(events) - 2)
    flushed = [event.name for event in events[:place]]
    files = {file.name for file in path.rglob("*") if file.is_file()}
    assert set(flushed[: len(files) - 1]) == files - {"manifest.json"} and flushed[len(files) - 1] == "manifest.json"
    assert len(flushed) == len(files) + 2  # the folder and its subfolder
    assert events[place + 1 :] == [tmp_path]


# ---------------------------------------------------------------- torn in every way


def cut(share):
    def damage_file(path):
        os.truncate(path, int(path.stat().st_size * share))

    return damage_file


def flip(path):
    """A byte of the last quarter: of tensors, a value that loads without a word."""
    data = bytearray(path.read_bytes())
    data[len(data) * 7 // 8] ^= 1
    path.write_bytes(data)


FILES = [
    "optimizer.safetensors", "state.json", "weight.safetensors", "transformer/config.json",
    "transformer/model.safetensors", "manifest.json",
]  # fmt: skip
DAMAGES = {"empty": cut(0), "half": cut(0.5), "almost whole": cut(0.99), "one bit": flip, "gone": Path.unlink}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(kind, name, out, caplog):
    newest = out / "checkpoint-2"
    DAMAGES[kind](newest / name)
    with caplog.at_level(logging.WARNING):
        assert continued(out) == out / "checkpoint-1"
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{newest} cannot be used: ") and (name in line or name == "manifest.json")
    with pytest.raises(UsageError, match="--resume_from_checkpoint checkpoint-2: "):
        continued(out, "--resume_from_checkpoint", "checkpoint-2")


def test_without_a_whole_checkpoint_nothing_starts_anew(out):
    for number in (1, 2):
        flip(out / f"checkpoint-{number}/weight.safetensors")
    for more in ([], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(
            UsageError, match=r"none of its 2 checkpoints is intact .*weight\.safetensors.*--overwrite"
        ):
            continued(out, *more)
    (out / "checkpoint-3").mkdir()  # made by hand, or by a tool that copies folder by folder
    with pytest.raises(UsageError, match="none of its 3"):
        continued(out)
    assert continued(out, "--overwrite") is None


NUMBERS = "optimizer.safetensors", "weight.safetensors"  # found to be damaged only while they are loaded


@pytest.mark.parametrize("name", NUMBERS)
def test_damage_found_while_loading_leaves_nothing_behind(name, state, out, caplog):
    """The newest has other weights, states and rates; of those, none is trained from."""
    step(state, 3)
    write_checkpoint(out, 3, state, PROVENANCE)
    flip(out / "checkpoint-3" / name)
    args, run, resumed = flags(out), run_in(out), make_state(engine_class=FolderEngine)
    newest = checkpoints.find(args, run, 100, {})
    assert newest == out / "checkpoint-3" and not caplog.text
    assert checkpoints.resume(args, run, newest, resumed, PROVENANCE) == 2
    assert f"{newest} cannot be used: {name} was changed after it was written" in caplog.text
    assert content_of(resumed) == content_of(loaded(out / "checkpoint-2")) != content_of(state)


@pytest.mark.parametrize("name", NUMBERS)
def test_if_all_turn_out_damaged_the_run_is_refused(name, out, caplog):
    for number in (1, 2):
        flip(out / f"checkpoint-{number}" / name)
    args, run = flags(out), run_in(out)
    with pytest.raises(UsageError, match=rf"none of its 2 checkpoints is intact .*{name}.*--overwrite"):
        checkpoints.resume(args, run, checkpoints.find(args, run, 100, {}), make_state(), PROVENANCE)
    assert [record.getMessage().split()[0][-12:] for record in caplog.records] == ["checkpoint-2", "checkpoint-1"]


def test_older_ones_that_are_damaged_too_are_passed_over(state, out, caplog):
    for number in (3, 4):
        write_checkpoint(out, number, state, PROVENANCE)
    flip(out / "checkpoint-4/optimizer.safetensors")
    (out / "checkpoint-3/state.json").unlink()
    flip(out / "checkpoint-2/weight.safetensors")
    assert continued(out) == out / "checkpoint-1"
    assert len(caplog.records) == 3


def test_two_names_of_one_step_are_tried_once_each(state, out):
    (out / "checkpoint-2").rename(out / "checkpoint-02")
    write_checkpoint(out, 2, state, PROVENANCE)
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-02"):
        flip(out / name / "weight.safetensors")
    with pytest.raises(UsageError, match="none of its 3 checkpoints is intact"):
        continued(out)


def test_what_one_rank_finds_damaged_no_rank_trains_from(out, monkeypatch, caplog):
    """Each reads for itself: a disk of its own, or a bad cable."""
    asked = []

    def exchanged(name, message):
        asked.append((name, message))
        return [message, "weight.safetensors was changed" if name.endswith("checkpoint-2") else ""]

    monkeypatch.setattr(checkpoints, "exchange_on_host", exchanged)
    assert continued(out) == out / "checkpoint-1"
    assert [message for _, message in asked] == ["", ""] and len(dict(asked)) == 2
    assert "checkpoint-2 cannot be used: weight.safetensors was changed" in caplog.text


def test_a_file_beside_those_of_the_checkpoint_does_no_harm(out):
    (out / "checkpoint-2/notes.txt").write_text("the best so far")
    assert continued(out) == out / "checkpoint-2"


def test_a_damaged_later_checkpoint_does_not_push_out_the_good_ones(state, out):
    """After a fall back the next saves are older than the damaged one: with a limit of 1 it must not be what is kept."""
    write_checkpoint(out, 20, state, PROVENANCE)
    flip(out / "checkpoint-20/weight.safetensors")
    args, run = Namespace(checkpoints_total_limit=1), run_in(out)
    checkpoints.save(args, run, 3, state, PROVENANCE)
    assert continued(out) == out / "checkpoint-3"
    checkpoints.save(args, run, 20, state, PROVENANCE)
    assert [path.name for path in checkpoint_dirs(out)] == ["checkpoint-20"] and not partial(out)


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(state, out, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    args, run = Namespace(checkpoints_total_limit=1), run_in(out)
    with monkeypatch.context() as patches:
        patches.setattr(files_module.shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or fail())
        checkpoints.save(args, run, 3, state, PROVENANCE)
    assert "checkpoint-1: cannot be removed (Permission denied)" in caplog.text
    assert continued(out) == out / "checkpoint-3"


# ---------------------------------------------------------------- bad numbers, full disk


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["weight", "state"])
def test_numbers_that_are_not_finite_are_written_nowhere(place, value, state, out):
    weight = state.engine.weight
    tensor = weight.data if place == "weight" else state.optimizer.state[weight]["exp_avg"]
    tensor[2] = value
    with pytest.raises(NumbersError, match="weights or optimizer states are no longer finite"):
        write_checkpoint(out, 3, state, PROVENANCE)
    assert [path.name for path in checkpoint_dirs(out)] == ["checkpoint-1", "checkpoint-2"]
    assert not list(out.glob(".tmp-*"))


@pytest.mark.parametrize("limit", [0, 100, 300, 500, 800])
def test_a_full_disk_leaves_the_checkpoints_before(limit, state, out, capsys):
    """Files may not grow beyond `limit` bytes: whichever file is the first to be too large."""
    before = {path: find_damage(path) for path in checkpoint_dirs(out)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            checkpoints.save(Namespace(checkpoints_total_limit=1), run_in(out), 3, state, PROVENANCE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.raises(SystemExit) as left:
        run_script(save, out)
    line = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 74 and "cannot write" in line and "GiB are free" in line
    assert {path: find_damage(path) for path in checkpoint_dirs(out)} == before and set(before.values()) == {None}
    assert not list(out.glob(".tmp-*")) and json.loads((out / "status.json").read_text())["exit_code"] == 74


def test_the_merged_model_counts_too(tmp_path, monkeypatch):
    engine = Namespace(params=[torch.zeros(8)], transformer=torch.nn.Linear(1000, 1000))  # 4 MB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=3e6))
    check_disk(flags(tmp_path), engine, 0, 5)
    with pytest.raises(StorageError, match="GiB are free"):
        check_disk(flags(tmp_path, "--export", "merged"), engine, 0, 5)


@pytest.mark.parametrize(
    ("weights", "more", "free", "expected"),
    [
        (1000, [], 10**9, None),
        # 5 checkpoints of 12 bytes a weight and 4 of the result
        (1000, ["--max_train_steps", "50", "--checkpointing_steps", "10"], 64_000, None),
        (1000, ["--max_train_steps", "50", "--checkpointing_steps", "10"], 63_000, "warning"),
        (1000, ["--max_train_steps", "50", "--checkpointing_steps", "10"], 15_000, "error"),
        (1000, ["--checkpoints_total_limit", "2", "--checkpointing_steps", "10"], 40_000, None),
        (1000, ["--checkpoints_total_limit", "2", "--checkpointing_steps", "10"], 39_000, "error"),
        (1000, ["--use_8bit", "--max_train_steps", "50", "--checkpointing_steps", "50"], 10_000, None),
    ],
)
def test_the_disk_is_measured_before_the_first_step(weights, more, free, expected, tmp_path, monkeypatch, caplog):
    engine = Namespace(params=[torch.zeros(weights)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=free))
    args = flags(tmp_path, *more)
    if expected == "error":
        with pytest.raises(StorageError, match=r"checkpoints of .* need .* GiB are free"):
            check_disk(args, engine, 0, args.max_train_steps or 50)
        return
    check_disk(args, engine, 0, args.max_train_steps or 50)
    assert ("--checkpoints_total_limit keeps fewer" in caplog.text) == (expected == "warning")


# ---------------------------------------------------------------- two runs in one folder


def test_a_second_run_in_the_same_folder_is_refused_with_the_firsts_pid(out):
    open_output_dir(flags(out), MAIN)
    before = sorted(out.iterdir())

    def second(*more):
        with pytest.raises(UsageError, match=f"process {os.getppid()} is writing there"):
            open_output_dir(flags(out, *more), MAIN)

    assert in_child(second) == 0
    assert in_child(lambda: second("--overwrite")) == 0  # nor is a running run moved aside
    assert sorted(out.iterdir()) == before


def test_the_lock_of_a_killed_run_does_not_count(out):
    def killed():
        open_output_dir(flags(out), MAIN)
        os.kill(os.getpid(), 9)

    assert in_child(killed) == -9
    assert continued(out) == out / "checkpoint-2"


def test_a_forked_worker_does_not_keep_the_lock(out):
    """Data workers outlive a killed run for some seconds."""
    read, write = os.pipe()

    def run_with_worker():
        open_output_dir(flags(out), MAIN)
        if os.fork() == 0:
            os.read(read, 1)
            os._exit(0)
        os.kill(os.getpid(), 9)

    assert in_child(run_with_worker) == -9
    assert continued(out) == out / "checkpoint-2"
    os.write(write, b"x")


# ---------------------------------------------------------------- the folder as such


def test_a_failing_body_leaves_nothing(tmp_path):
    with pytest.raises(SafetensorError), written_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
        raise SafetensorError("no")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_what_is_there(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    write_manifest(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["files"] == {
        "a": {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    }
    assert find_damage(tmp_path) is None
    for text in ("", "[]", "{}", '{"files": 3}', '{"files": {"a": {}}}'):
        (tmp_path / "manifest.json").write_text(text)
        assert "manifest.json is damaged" in find_damage(tmp_path)
