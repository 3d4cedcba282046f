# ruff: noqa: F811 - fixtures of test_fixtures are arguments here
"""File systems that refuse to flush, lock or rename, and commands that are refused: whole runs on the smallest models."""

import errno
import fcntl
import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import prepare_dataset
from args import parse_prepare_args, parse_training_args
from base import files
from base.errors import StorageError, UsageError
from base.files import lock_folder, release_locks, write_json
from make_fixtures import RUNS, prepare_argv, train_argv
from run.exits import run_script
from test_fixtures import losses, old  # noqa: F401


KINDS = ("t2v_lora", "t2v_sft")
both_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def train(old):
    """Train anew in the folder `out` with the flags of a fixture and more; returns the folder."""

    def run(kind="t2v_lora", *flags, out="out"):
        argv = [*train_argv(kind), "--output_dir", out, *flags]
        module = importlib.import_module(f"cogvideox_{RUNS[kind][0]}")
        run_script(lambda: module.main(parse_training_args(kind, argv)), out)
        release_locks()
        return old / out

    return run


@pytest.fixture
def prepare(old):
    def run(*flags, out="made", name="prepared"):
        argv = [*prepare_argv(name), "--output_dir", out, *flags]
        run_script(lambda: prepare_dataset.main(parse_prepare_args(argv)), out)
        release_locks()
        return old / out

    return run


@pytest.fixture
def ends(capsys):
    """Expect a run to leave with an exit code and one line, which is returned."""

    def expect(code, run, *arguments, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(*arguments, **options)
        release_locks()
        lines = capsys.readouterr().err.splitlines()
        assert left.value.code == code and not any("Traceback" in line for line in lines), lines
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return expect


def refuse(monkeypatch, owner, name, number, when=lambda *arguments: True):
    """Make `owner.name` fail with that error wherever `when` says so; returns the arguments of what was refused."""
    original, refused = getattr(owner, name), []

    def function(*arguments, **options):
        if when(*arguments):
            refused.append(arguments)
            raise OSError(number, os.strerror(number))
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, function)
    return refused


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def is_file(descriptor):
    return not is_folder(descriptor)


def checkpoints(out):
    return sorted(path.name for path in out.glob("checkpoint-*"))


# ---------------------------------------------------------------- fsync


@both_kinds
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_flushed_stops_nothing(train, kind, number, monkeypatch):
    refused = refuse(monkeypatch, os, "fsync", number, is_folder)
    out = train(kind)
    assert refused and checkpoints(out) == ["checkpoint-2", "checkpoint-4"]
    assert json.loads((out / "status.json").read_text())["state"] == "complete"


def test_a_folder_that_cannot_be_opened_to_flush_it_stops_nothing(train, monkeypatch):
    refused = refuse(
        monkeypatch, os, "open", errno.EISDIR, lambda path, *_: os.path.isdir(path) and "checkpoint" in str(path)
    )
    assert checkpoints(train()) == ["checkpoint-2", "checkpoint-4"] and refused


@both_kinds
@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF], ids=errno.errorcode.get
)
def test_files_that_cannot_be_flushed_are_warned_of_once(train, kind, number, monkeypatch, caplog):
    assert refuse(monkeypatch, os, "fsync", number) == []
    out = train(kind)
    assert caplog.text.count("the disk does not support fsync") == 1 and os.strerror(number) in caplog.text
    before = losses(out)
    for path in (out / "checkpoint-4", out / "status.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    caplog.clear()
    assert losses(train(kind)) == before
    assert (
        "continuing from out/checkpoint-2" in caplog.text and caplog.text.count("the disk does not support fsync") == 1
    )


@both_kinds
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_disk_ends_the_run_before_its_first_step(old, train, ends, kind, number, monkeypatch):
    refuse(monkeypatch, os, "fsync", number, is_file)
    line = ends(74, train, kind)
    assert os.strerror(number) in line and not (old / "out/metrics.jsonl").exists()
    assert sorted(os.listdir(old / "out")) == [".lock", "status.json"]


def test_a_disk_that_fails_later_leaves_the_checkpoints_before(old, train, ends, monkeypatch):
    has_one = lambda descriptor: is_file(descriptor) and (old / "out/checkpoint-2").exists()  # noqa: E731
    refuse(monkeypatch, os, "fsync", errno.EIO, has_one)
    assert "Input/output error" in ends(74, train)
    assert checkpoints(old / "out") == ["checkpoint-2"] and not list((old / "out").glob(".tmp*"))
    monkeypatch.undo()
    os.chdir(old)
    assert checkpoints(train()) == ["checkpoint-2", "checkpoint-4"]


# ---------------------------------------------------------------- rename

REFUSALS = [errno.EPERM, errno.EXDEV, errno.EINVAL, errno.ENOTSUP, errno.EIO]


@both_kinds
@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["rename", "replace"])
def test_a_disk_that_cannot_rename_is_known_before_the_first_step(old, train, ends, kind, number, name, monkeypatch):
    """Folders are renamed, files replaced; where no file can be, status.json is written in place."""
    refused = refuse(monkeypatch, Path, name, number)
    line = ends(74, train, kind)
    assert refused and os.strerror(number) in line and str(old) not in line.split("cannot")[0].replace("out/", "")
    assert set(os.listdir(old / "out")) == {".lock", "status.json"}


@pytest.mark.parametrize("owner", [os, Path])
def test_a_disk_that_cannot_replace_a_folder_is_known_before_the_first_step(train, ends, owner, monkeypatch):
    """The earlier one steps aside: some network mounts hold a folder whose files were just read."""
    refuse(monkeypatch, owner, "rename", errno.EBUSY, lambda old, new: ".old-" in str(new))
    assert "Device or resource busy" in ends(74, train)


def test_what_a_refused_rename_leaves_is_cleaned_up_by_the_next_run(old, train, ends, monkeypatch):
    before = train("t2v_lora", out="whole")
    with monkeypatch.context() as patches:
        refuse(patches, Path, "rename", errno.EPERM, lambda old, new: new.name == "checkpoint-4")
        assert "checkpoint-4: written, but cannot be renamed" in ends(74, train)
    assert checkpoints(old / "out") == ["checkpoint-2"]
    assert losses(train()) == losses(before)


@both_kinds
def test_a_result_that_cannot_be_renamed_is_one_line(old, train, ends, kind, monkeypatch):
    refuse(
        monkeypatch, Path, "rename" if kind == "t2v_sft" else "replace", errno.EPERM,
        lambda _, new: new.parent.name == "out" and (new.suffix == ".safetensors" or new.name == "transformer"),
    )  # fmt: skip
    assert "Operation not permitted" in ends(74, train, kind)
    assert checkpoints(old / "out") == ["checkpoint-2", "checkpoint-4"]


def test_a_record_that_cannot_be_renamed_is_one_line(train, ends, monkeypatch):
    refuse(monkeypatch, Path, "replace", errno.EPERM, lambda _, new: new.name == "args.json")
    assert "args.json: written, but cannot be renamed" in ends(74, train)


@pytest.mark.parametrize("suffix", [".safetensors", ".png", ".mp4", "data.jsonl"])
def test_prepared_files_that_cannot_be_renamed_are_one_line(old, prepare, ends, suffix, monkeypatch):
    with monkeypatch.context() as patches:
        refuse(patches, Path, "replace", errno.EXDEV, lambda _, new: new.name.endswith(suffix))
        assert "Invalid cross-device link" in ends(74, prepare, "--save_previews")
    assert not list((old / "made").rglob(".tmp*"))
    assert json.loads((prepare("--save_previews") / "status.json").read_text())["exit_code"] == 0


def test_the_rehearsal_reads_back_what_it_wrote(old, train, ends, monkeypatch):
    """A disk that loses the end of a file, as a network mount without room may."""
    put = files.put_in_place

    def loses(temporary, target):
        put(temporary, target)
        os.truncate(target / "state.json", 3)

    monkeypatch.setattr(files, "put_in_place", loses)
    assert "gives back other files than were written (state.json has 3 bytes" in ends(74, train)
    assert not list((old / "out").glob(".tmp*"))


# ---------------------------------------------------------------- locks, permissions


@pytest.mark.parametrize(
    "number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM], ids=errno.errorcode.get
)
def test_a_disk_without_locks_is_warned_of(train, number, monkeypatch, caplog):
    refuse(monkeypatch, fcntl, "lockf", number)
    assert checkpoints(train()) == ["checkpoint-2", "checkpoint-4"]
    assert caplog.text.count("cannot be locked") == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES], ids=errno.errorcode.get)
def test_a_lock_that_another_holds_is_known_by_either_error(tmp_path, number, monkeypatch):
    (tmp_path / ".lock").write_text("4711\n")
    refuse(monkeypatch, fcntl, "lockf", number)
    with pytest.raises(UsageError, match="process 4711 is writing there"):
        lock_folder(tmp_path)


def test_a_lock_whose_file_is_removed_in_between_is_taken_again(tmp_path, monkeypatch):
    """By a refused command, which leaves no file: two would hold the folder, each a file of its own."""
    lockf, calls = fcntl.lockf, []

    def late(descriptor, *flags):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(descriptor)
        return lockf(descriptor, *flags)

    monkeypatch.setattr(fcntl, "lockf", late)
    lock_folder(tmp_path)
    assert len(calls) == 2 and (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


# ---------------------------------------------------------------- refused commands


def snapshot(folder):
    """Everything below `folder`, with content and time of modification of the files."""
    paths = folder.rglob("*")
    return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


REFUSED = {
    "no such model": ["--pretrained_model_name_or_path", "nowhere"],
    "a model of the other task": ["--pretrained_model_name_or_path", "i2v"],
    "no such checkpoint": ["--resume_from_checkpoint", "checkpoint-77"],
    "an unknown layer": ["--lora_target_modules", "nothing"],
    "a schedule beyond": ["--max_train_steps", "1"],
    "fp16": ["--mixed_precision", "fp16"],
}


@pytest.mark.parametrize("flags", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("place", ["new", "deep/new/folder", "t2v_lora"])
def test_a_refused_command_changes_nothing(old, train, ends, flags, overwrite, place):
    if flags[0] == "--max_train_steps" and (overwrite or place != "t2v_lora"):
        return  # a run of one step, of which nothing is refused
    before = snapshot(old)
    ends(2, train, "t2v_lora", *flags, *overwrite, out=place)
    assert snapshot(old) == before


def test_a_run_with_other_flags_or_data_leaves_the_folder_as_it_was(old, train, ends):
    out = train()
    (out / ".old-checkpoint-3").mkdir()  # of a killed process: finished by a run that is accepted
    before = snapshot(old)
    assert "--rank 2 -> 3" in ends(2, train, "t2v_lora", "--rank", "3")
    assert "leave out one of them" in ends(2, train, "t2v_lora", "--overwrite", "--resume_from_checkpoint", "latest")
    assert snapshot(old) == before
    manifest = old / "prepared/data.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[1:]))
    shutil.rmtree(out / ".old-checkpoint-3")
    before = snapshot(old)
    assert "other content: the list of clips" in ends(2, train, "t2v_lora", "--max_train_steps", "5")
    assert snapshot(old) == before
    assert train("t2v_lora", "--overwrite").exists() and len(list(old.glob("out.*"))) == 1


def test_a_folder_that_another_process_holds_stays_as_it_is(old, train, ends, prepare):
    (old / "out").mkdir()
    code = f"import sys, time; sys.path.insert(0, {str(Path(files.__file__).parents[1])!r}); import pathlib; from base import files; "
    code += "files.lock_folder(pathlib.Path('out')); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=old)
    try:
        assert holder.stdout.readline() == b"held\n"
        before = snapshot(old)
        for run in (train, prepare):
            assert f"process {holder.pid} is writing there" in ends(2, run, out="out")
        assert snapshot(old) == before
    finally:
        holder.kill()
        holder.wait()


PREPARE_REFUSED = {
    "no such model": ["--model_id", "nowhere"],
    "over the data": ["--output_dir", "clips"],
    "a file": ["--output_dir", "clips/a.mp4"],
    "below a file": ["--output_dir", "clips/a.mp4/x/y"],
}


@pytest.mark.parametrize("flags", PREPARE_REFUSED.values(), ids=PREPARE_REFUSED)
@pytest.mark.parametrize("place", ["new", "deep/new/folder", "prepared"])
def test_a_refused_preparation_changes_nothing(old, prepare, ends, flags, place):
    (old / "prepared/.tmp-1-data.jsonl").write_text("of a killed process")
    before = snapshot(old)
    ends(2, prepare, *flags, out=place)
    assert snapshot(old) == before


def test_a_refused_command_is_no_hindrance_to_the_next(old, train, ends):
    ends(2, train, "t2v_lora", "--resume_from_checkpoint", "nowhere")
    assert not (old / "out").exists()
    assert checkpoints(train()) == ["checkpoint-2", "checkpoint-4"] and (old / "out/.lock").exists()


def test_rename_names_the_place_and_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    refuse(monkeypatch, Path, "replace", errno.EPERM)
    with pytest.raises(StorageError, match="b: written, but cannot be renamed to that .* choose a disk"):
        files.rename(tmp_path / "a", tmp_path / "b")


def test_a_disk_that_renames_nothing_still_has_a_status(tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, Path, "replace", errno.EPERM)
    refuse(monkeypatch, Path, "rename", errno.EPERM)
    with pytest.raises(SystemExit) as left:
        run_script(lambda: write_json(tmp_path / "out" / "a.json", {}), tmp_path / "out")
    assert left.value.code == 74
    assert json.loads((tmp_path / "out/status.json").read_text())["exit_code"] == 74


def test_a_disk_that_does_not_say_what_is_free_is_used(train, monkeypatch):
    refuse(monkeypatch, shutil, "disk_usage", errno.ENOSYS)
    assert checkpoints(train()) == ["checkpoint-2", "checkpoint-4"]


def test_a_disk_that_does_not_remove_a_rehearsal_goes_on(train, monkeypatch):
    refuse(monkeypatch, os, "rmdir", errno.EBUSY, lambda path, *_, **__: "rehears" in str(path))
    assert checkpoints(train()) == ["checkpoint-2", "checkpoint-4"]
