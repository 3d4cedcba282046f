"""The console of a run: the project's own lines, every error, and of the libraries nothing unless it is asked for."""

import contextlib
import fcntl
import logging
import os
import re
import runpy
import select
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path

import pytest
import torch

import args
from base import bars, console, flag_parser
from run import exits, launch
from run.exits import run_script
from script_runs import SCRIPTS


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-cogvideox"
# Levels and a few fixed words: how every line of ours begins
OWN_LINE = re.compile(r"(INFO|WARNING|error:|[a-z_]+\.py: (error|warning):) \S")
CLIPS = [
    "--data_root", str(ROOT / "assets/tests"), "--caption_column", "prompts.txt", "--video_column", "videos.txt",
]  # fmt: skip
VARIABLES = [(name, variable) for name, variables in console.LOG_VARIABLES.items() for variable in variables]
CONSOLE_VARIABLES = {*console.QUIET, *console.QUIET_ALONE, *(variable for _, variable in VARIABLES)}
SIZES = ["--height_buckets", "64", "--width_buckets", "64", "--frame_buckets", "9", "--max_num_frames", "9"]


@pytest.fixture
def quiet(monkeypatch):
    """The console as `set_up` leaves it, and afterwards as it was."""
    for name in CONSOLE_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(console, "IS_SET_UP", False)
    monkeypatch.setattr(sys, "warnoptions", [])
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    before = {logger: logger.filters[:] for logger in loggers if isinstance(logger, logging.Logger)}
    logger_class = logging.getLoggerClass()
    console.SUPPRESSED.take()
    console.set_up()
    yield
    logging.captureWarnings(False)
    logging.setLoggerClass(logger_class)
    console.SUPPRESSED.take()
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
    assert list(console.SUPPRESSED.lines) == ["somelibrary.part: a note", "somelibrary.part: deprecated: that"]


def test_a_logger_that_is_there_before_is_gated_too(capsys, request):
    logger = library("earlier.library")
    request.getfixturevalue("quiet")
    logger.warning("old news")
    logging.root.warning("said by the root logger")
    assert capsys.readouterr().err == "" and len(console.SUPPRESSED.lines) == 2


def test_the_projects_own_warnings_stay(quiet, caplog):
    caplog.set_level(logging.INFO)
    bars.log_download.__wrapped__("some/model")
    bars.logger.warning("this is a line of a test, not ours")
    assert caplog.messages == ["some/model is downloaded from the hub"]


def test_pythons_warnings_are_kept_back(quiet, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        console.set_up()  # again: pytest has a recorder of its own in place
        warnings.warn("context_fn is passed", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "" and "context_fn is passed" in "\n".join(console.SUPPRESSED.lines)


def test_a_driver_that_cannot_be_used_is_told(quiet, caplog):
    """All that follows speaks only of a machine without a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        console.set_up()
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", UserWarning, stacklevel=1)
    assert "driver on your system is too old" in caplog.text and not console.SUPPRESSED.lines


def test_what_makes_a_run_slower_or_worse_is_told_once_for_all_processes(quiet, monkeypatch, capsys):
    library("torch._dynamo.convert_frame").warning("torch._dynamo hit config.%s (8)", "recompile_limit")
    assert capsys.readouterr().err == "torch._dynamo hit config.recompile_limit (8)\n"
    monkeypatch.setenv("RANK", "1")
    library("torch._dynamo.convert_frame").warning("torch._dynamo hit config.%s (8)", "recompile_limit")
    assert capsys.readouterr().err == "" and len(console.SUPPRESSED.lines) == 1


def test_a_library_that_logs_wrongly_ends_nothing(quiet, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    library().warning("deprecated", FutureWarning)


def test_another_process_keeps_what_libraries_say_and_shows_errors(quiet, monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [console.ConsoleHandler(sys.stderr)])
    console.log_errors_only()
    logger = logging.getLogger("a.library")  # whose records go to the root's handlers
    logger.warning("no peer access")
    bars.log_download.__wrapped__("some/model")  # a line of ours, which the first process says too
    logger.error("broken")
    assert capsys.readouterr().err == "broken\n" and list(console.SUPPRESSED.lines) == ["a.library: no peer access"]


@pytest.mark.parametrize(("num_ranks", "level"), [("1", "ERROR"), ("2", None)])
def test_several_processes_show_why_they_do_not_meet(num_ranks, level, request, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", num_ranks)
    request.getfixturevalue("quiet")
    assert os.environ.get("TORCH_CPP_LOG_LEVEL") == level


@pytest.mark.parametrize(("name", "variable"), VARIABLES)
def test_who_asks_a_library_gets_its_log(quiet, name, variable, monkeypatch, capsys):
    monkeypatch.setenv(variable, "0")
    library(f"{name}.module").info("not asked for")
    monkeypatch.setenv(variable, "info")
    library(f"{name}.module").info("asked for")
    library("another").info("not asked for")
    assert capsys.readouterr().err == "asked for\n"


def test_verbose_changes_nothing(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    before = logging.getLoggerClass()
    console.set_up(verbose=True)
    assert logging.getLoggerClass() is before and "TQDM_DISABLE" not in os.environ and not console.is_quiet()


TRAIN = ["--pretrained_model_name_or_path", "m", "--data_root", "d"]
PREPARE = ["--data_root", "d", "--output_dir", "o"]


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("script", [*flag_parser.SCRIPTS, "prepare", "caption"])
def test_every_script_sets_up_the_console_as_its_command_line_says(script, verbose, monkeypatch):
    """Before its other imports, so that nothing of theirs is heard."""
    calls = []

    def set_up(verbose):
        calls.append(verbose)
        sys.exit(3)

    monkeypatch.setattr(console, "set_up", set_up)
    name = SCRIPTS[script].module if script in SCRIPTS else f"{script}_dataset"
    flags = TRAIN if script in SCRIPTS else PREPARE
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, *["--verbose"][: int(verbose)]])
    with pytest.raises(SystemExit, match="3"):
        runpy.run_path(str(ROOT / f"training/{name}.py"), run_name="__main__")
    assert calls == [verbose]


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
    assert lines[:2] == ["libraries' last messages (1):", "somelibrary.part: no kernel for this GPU"]
    assert "Traceback (most recent call last):" in lines and "ZeroDivisionError: that was wrong" in lines
    assert lines[-1].startswith("error: ZeroDivisionError")


def test_what_a_library_prints_is_kept_back_where_that_is_said(quiet, capsys):
    with console.capture_prints():
        print("* Welcome to the tracker", 3)
        print("Time to load cpu_adam op: 2.3 seconds", file=sys.stderr)
        print("unfinished", end="")
    assert capsys.readouterr() == ("", "")
    console.print_suppressed()
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "libraries' last messages (3):", "* Welcome to the tracker 3", "Time to load cpu_adam op: 2.3 seconds",
        "unfinished", "",
    ]  # fmt: skip
    console.print_suppressed()
    assert capsys.readouterr().err == ""


def test_a_handler_made_while_prints_are_captured_shows_errors_afterwards(quiet, capsys):
    with console.capture_prints():
        logger = library("made.within")
        logger.handlers = [logging.StreamHandler(sys.stdout)]
    logger.error("broken later")
    assert capsys.readouterr().err == "broken later\n"


def test_deepspeed_logs_to_the_console_it_finds(quiet, monkeypatch, tmp_path):
    """It makes its handler at its import, which accelerate would do while prints are captured."""
    found = []
    (tmp_path / "deepspeed.py").write_text("import sys\nstreams = [sys.stdout, sys.stderr]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    del sys.modules["deepspeed"]
    monkeypatch.setattr(exits, "uses_deepspeed", lambda: True)
    monkeypatch.setattr(launch, "uses_deepspeed", lambda: True)
    monkeypatch.setattr(launch, "check_deepspeed_from_args", lambda args: None)

    def make(**options):
        import deepspeed

        found.extend(deepspeed.streams)
        raise InterruptedError

    monkeypatch.setattr(launch, "Accelerator", make)
    flags = args.parse_training_args("t2v_lora", [*TRAIN, "--output_dir", str(tmp_path / "run")])
    with pytest.raises(InterruptedError):
        launch.init_accelerator(flags)
    assert len(found) == 2 and console.SUPPRESSED not in found


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
    assert list(bars.with_progress(["a", "b"], "captions", delay=5)) == ["a", "b"] and not caplog.messages


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


@contextlib.contextmanager
def terminal():
    """stderr is a terminal within; a function that returns its lines, as they end up there."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns

    def shown():
        content = b""
        while select.select([reader], [], [], 0.1)[0]:  # what was written arrives piece by piece
            content += os.read(reader, 1 << 16)
        lines = content.decode().replace("\r\n", "\n").split("\n")
        return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines]

    with open(writer, "w", buffering=1) as stream, contextlib.redirect_stderr(stream):
        yield shown
    os.close(reader)


def test_a_line_beside_a_bar_stands_on_its_own(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    logger = logging.getLogger("beside")
    logger.propagate = False
    with terminal() as shown:
        logger.handlers = [console.ConsoleHandler(sys.stderr)]
        with bars.progress(3, "steps") as bar:
            bar.update()
            logger.warning("a line of the log")
            bar.update(2)
        lines = shown()
    assert lines[0] == "a line of the log" and lines[1].startswith("steps: 100%") and lines[2:] == [""]


@pytest.mark.parametrize(("value", "is_bar"), [("1", False), ("0", True), (console.QUIET["TQDM_DISABLE"], True)])
def test_a_user_turns_bars_off_and_gets_lines(value, is_bar, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", value)
    with terminal(), bars.progress(3, "steps") as bar:
        assert isinstance(bar, bars.tqdm) == is_bar


def test_a_user_turns_the_hubs_bars_off(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with terminal():
        assert not bars.download_bar("owner/model")(total=3, unit="B").disable
        with monkeypatch.context() as set_by_user:
            set_by_user.setenv("TQDM_DISABLE", "1")
            assert bars.download_bar("owner/model")(total=3, unit="B").disable
        # The hub reads HF_HUB_DISABLE_PROGRESS_BARS at its import
        monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", True)
        assert bars.download_bar("owner/model")(total=3, unit="B").disable


# ---------------------------------------------------------------- whole consoles
# Processes of their own: what is tried is that nothing is written while libraries are imported, by C code, or at exit.


def console_of(script, *flags):
    """(exit code, lines of stdout and stderr) of a script as users start it."""
    env = {name: value for name, value in os.environ.items() if name not in CONSOLE_VARIABLES}
    command = [sys.executable, str(ROOT / "training" / script), *map(str, flags)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def preparation(out):
    return ["--model_id", TINY, *CLIPS, *SIZES, "--output_dir", out, "--save_latents_and_embeddings",
            "--max_sequence_length", "32"]  # fmt: skip


BUCKET_LINE = re.compile(r"bucket +clips|\d+x\d+x\d+ +\d+")  # of the table below one of the project's lines


def strange(lines):
    return [line for line in lines if not (OWN_LINE.match(line) or BUCKET_LINE.match(line))]


@pytest.mark.slow
def test_the_console_of_a_preparation_and_of_a_training_is_the_projects(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, lines = console_of("prepare_dataset.py", *preparation(tmp_path / "data"), "--dataloader_num_workers", "1")
    assert (code, strange(lines)) == (0, []) and lines[-1].endswith("6 clips, 6 prepared now, 0 left out")
    code, lines = console_of(
        "cogvideox_text_to_video_lora.py", "--pretrained_model_name_or_path", TINY, "--data_root", tmp_path / "data",
        "--load_tensors", "--output_dir", tmp_path / "run", "--rank", "4", "--max_train_steps", "2",
        "--dataloader_num_workers", "1", "--memory", "balanced", "--validation_prompt", "a red ball",
        "--num_inference_steps", "2", "--report_to", "tensorboard,wandb",
    )  # fmt: skip
    assert (code, strange(lines)) == (0, [])
    assert lines[-1] == f"INFO complete at step 2: {tmp_path / 'run'}"
    assert any(line.startswith("INFO steps 2/2 [") for line in lines)
    [console_log] = (tmp_path / "run/logs/wandb").glob("offline-run-*/files/output.log")
    assert "INFO steps 2/2 [" in console_log.read_text()


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
