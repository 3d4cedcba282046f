"""The console of a run: the project's own lines, every error, and of the libraries nothing unless it is asked for."""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import bars
import console
from runtime import run_script


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-cogvideox"
# Levels and a few fixed words: how every line of ours begins
OWN_LINE = re.compile(r"(INFO|WARNING|error:|[a-z_]+\.py: (error|warning):) \S")
CLIPS = [
    "--data_root", str(ROOT / "assets/tests"), "--caption_column", "prompts.txt", "--video_column", "videos.txt",
]  # fmt: skip
SIZES = ["--height_buckets", "64", "--width_buckets", "64", "--frame_buckets", "9", "--max_num_frames", "9"]


@pytest.fixture
def quiet(monkeypatch):
    """The console as `set_up` leaves it, and afterwards as it was."""
    for name in [*console.QUIET, *console.WISHES.values()]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "warnoptions", [])
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    before = {logger: logger.filters[:] for logger in loggers if isinstance(logger, logging.Logger)}
    logger_class = logging.getLoggerClass()
    console.KEPT.lines.clear()
    console.set_up()
    yield
    logging.captureWarnings(False)
    logging.setLoggerClass(logger_class)
    console.KEPT.lines.clear()
    for logger, filters in before.items():
        logger.filters[:] = filters


def library(name="somelibrary.part"):
    """A logger as libraries make them: with a handler of its own, past everything that is set at the root."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.propagate = False
    return logger


# ---------------------------------------------------------------- the gate


def test_a_librarys_warning_is_kept_back_and_its_error_comes(quiet, capsys):
    library().info("a note")
    library().warning("deprecated: %s", "that")
    library().error("broken")
    assert capsys.readouterr().err == "broken\n"
    assert list(console.KEPT.lines) == ["somelibrary.part: a note", "somelibrary.part: deprecated: that"]


def test_a_logger_that_is_there_before_is_gated_too(capsys, request):
    logger = library("earlier.library")
    request.getfixturevalue("quiet")
    logger.warning("old news")
    logging.root.warning("said by the root logger")
    assert capsys.readouterr().err == "" and len(console.KEPT.lines) == 2


def test_the_projects_own_warnings_stay(quiet, caplog):
    caplog.set_level(logging.INFO)
    bars.say_download.__wrapped__("some/model")
    bars.logger.warning("this is a line of a test, not ours")
    assert caplog.messages == ["some/model is downloaded from the hub"]


def test_pythons_warnings_are_kept_back(quiet, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        console.set_up()  # again: pytest has a recorder of its own in place
        warnings.warn("context_fn is passed", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "" and "context_fn is passed" in "\n".join(console.KEPT.lines)


def test_a_driver_that_cannot_be_used_is_told(quiet, caplog):
    """All that follows speaks only of a machine without a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        console.set_up()
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", UserWarning, stacklevel=1)
    assert "driver on your system is too old" in caplog.text and not console.KEPT.lines


@pytest.mark.parametrize(("name", "variable"), console.WISHES.items())
def test_who_asks_a_library_gets_its_log(quiet, name, variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "info")
    library(f"{name}.module").info("asked for")
    library("another").info("not asked for")
    assert capsys.readouterr().err == "asked for\n"


def test_verbose_changes_nothing(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    before = logging.getLoggerClass()
    console.set_up(verbose=True)
    assert logging.getLoggerClass() is before and "TQDM_DISABLE" not in os.environ


class Clips(torch.utils.data.Dataset):
    """A sample whose reading makes a library talk."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        library("decoder").warning("a warning of a worker")
        library("decoder").error("an error of a worker")
        return index


def test_data_workers_are_quiet_too(quiet, capfd):
    assert len(list(torch.utils.data.DataLoader(Clips(), num_workers=1))) == 2
    assert capfd.readouterr().err == "an error of a worker\n" * 2


def test_an_internal_error_comes_with_its_traceback_and_what_was_kept_back(quiet, tmp_path, capsys):
    def main():
        library().warning("no kernel for this GPU")
        raise ZeroDivisionError("that was wrong")

    with pytest.raises(SystemExit) as left:
        run_script(main, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == 70
    assert lines[:2] == ["what libraries said before, the last 1 lines:", "somelibrary.part: no kernel for this GPU"]
    assert "Traceback (most recent call last):" in lines and "ZeroDivisionError: that was wrong" in lines
    assert lines[-1].startswith("error: ZeroDivisionError")


def test_what_a_library_prints_is_kept_back_where_that_is_said(quiet, capsys):
    with console.prints_kept():
        print("* Welcome to the tracker")
        print("Time to load cpu_adam op: 2.3 seconds", file=sys.stderr)
    assert capsys.readouterr() == ("", "") and len(console.KEPT.lines) == 2


# ---------------------------------------------------------------- bars


def test_a_log_gets_lines_in_place_of_a_bar(caplog, capsys, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 10_000, 10))  # a moment later each time it is asked
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    with bars.progress(100, "steps", initial=90) as bar:
        for _ in range(8):
            bar.set_postfix(loss="0.5")
            bar.update()
    assert capsys.readouterr().err.count("\r") == 0
    counts = [re.match(r"steps (\d+)/100 \[.*loss=0.5\]$", line)[1] for line in caplog.messages]
    assert counts[-1] == "98" and 2 <= len(counts) < 8


def test_work_that_is_over_at_once_has_no_bar(caplog):
    caplog.set_level(logging.INFO)
    assert list(bars.tracked(["a", "b"], "captions", delay=5)) == ["a", "b"] and not caplog.messages


def test_the_hubs_bar_speaks_of_downloads_alone(caplog):
    """What is in the cache already goes through the same bars, with no byte counted."""
    caplog.set_level(logging.INFO)
    bar_class = bars.download_bar("owner/never-seen-before")
    files, bytes_ = bar_class(total=3, desc="Fetching 3 files"), bar_class(total=0, unit="B", name="hub", disable=None)
    files.update(3)
    bytes_.update(0)
    assert not caplog.messages
    bytes_.update(10)
    bytes_.update(10)
    assert caplog.messages == ["owner/never-seen-before is downloaded from the hub"]


# ---------------------------------------------------------------- whole consoles
# Processes of their own: what is tried is that nothing is written while libraries are imported, by C code, or at exit.


def console_of(script, *flags):
    """(exit code, lines of stdout and stderr) of a script as users start it."""
    env = {name: value for name, value in os.environ.items() if name not in {*console.QUIET, *console.WISHES.values()}}
    command = [sys.executable, str(ROOT / "training" / script), *map(str, flags)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def preparation(out):
    return ["--model_id", TINY, *CLIPS, *SIZES, "--output_dir", out, "--save_latents_and_embeddings",
            "--max_sequence_length", "32"]  # fmt: skip


def strange(lines):
    return [line for line in lines if not OWN_LINE.match(line)]


@pytest.mark.slow
def test_the_console_of_a_preparation_and_of_a_training_is_the_projects(tmp_path):
    code, lines = console_of("prepare_dataset.py", *preparation(tmp_path / "data"), "--dataloader_num_workers", "1")
    assert (code, strange(lines)) == (0, []) and lines[-1].endswith("6 clips, 6 prepared now, 0 left out")
    code, lines = console_of(
        "cogvideox_text_to_video_lora.py", "--pretrained_model_name_or_path", TINY, "--data_root", tmp_path / "data",
        "--load_tensors", "--output_dir", tmp_path / "run", "--rank", "4", "--max_train_steps", "2",
        "--dataloader_num_workers", "1", "--memory", "balanced", "--validation_prompt", "a red ball",
        "--num_inference_steps", "2", "--report_to", "tensorboard",
    )  # fmt: skip
    assert (code, strange(lines)) == (0, [])
    assert lines[-1] == f"INFO complete at step 2: {tmp_path / 'run'}"
    assert any(line.startswith("INFO steps 2/2 [") for line in lines)


def test_an_error_stands_alone(tmp_path):
    wrong = [*preparation(tmp_path / "data"), "--data_root", tmp_path / "nowhere"]
    code, lines = console_of("prepare_dataset.py", *wrong)
    assert (code, len(lines)) == (65, 1) and lines[0].startswith("error: ") and "nowhere" in lines[0]


@pytest.mark.slow
def test_verbose_brings_the_libraries_lines_back(tmp_path):
    wrong = [*preparation(tmp_path / "data"), "--data_root", tmp_path / "nowhere", "--verbose"]
    code, lines = console_of("prepare_dataset.py", *wrong)
    assert code == 65 and lines[-1].startswith("error: ")
    assert any("torchao" in line for line in lines[:-1])
