"""The run around the loop: precision, metrics, exit codes."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError

from args import parse_training_args
from base.errors import DataError, NumbersError, StorageError, UsageError, UserError
from base.files import write_json
from base.status import RUN_ID_VARIABLE, THIS_RUN, begin_run
from data.buckets import Bucket
from engine.optimizers import make_lr_scheduler_from_args
from run import launch
from run.exits import run_script
from run.launch import check_device, check_launcher, compute_dtype, shared_seed
from run.steps import make_plan, scaled_learning_rate
from script_runs import run_ranks


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def flags(*more):
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--load_tensors"]
    return parse_training_args("t2v_lora", [*argv, *more])


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("flag", "launcher", "stored", "device", "expected"),
    [
        (None, None, FP16, CPU, FP32),
        (None, None, FP16, CUDA, BF16),
        (None, None, BF16, CUDA, BF16),
        (None, "no", BF16, CUDA, BF16),  # what the launcher exports for nothing said
        (None, "bf16", BF16, CPU, BF16),
        (None, "fp16", FP16, CUDA, FP16),
        ("no", None, BF16, CUDA, FP32),
        ("no", "no", FP32, CUDA, FP32),
        ("bf16", None, FP16, CPU, BF16),
        ("bf16", "bf16", FP16, CUDA, BF16),
        ("fp16", "fp16", FP16, CUDA, FP16),
        ("fp16", None, FP32, CUDA, FP16),
    ],
)
def test_compute_dtype(flag, launcher, stored, device, expected, monkeypatch):
    set_launcher(monkeypatch, launcher)
    args = flags(*(["--mixed_precision", flag] if flag else []))
    assert compute_dtype(args, stored, device) == expected


@pytest.mark.parametrize(
    ("flag", "launcher", "stored", "device", "message"),
    [
        ("fp16", None, FP16, CPU, "CUDA only"),
        (None, "fp16", FP16, CPU, "CUDA only"),
        ("fp16", None, BF16, CUDA, "overflows in fp16"),
        ("no", "bf16", FP32, CPU, "--mixed_precision no disagrees with mixed_precision: bf16"),
        ("bf16", "fp16", FP16, CUDA, "--mixed_precision bf16 disagrees with mixed_precision: fp16"),
        (None, "fp8", BF16, CUDA, "fp8"),
    ],
)
def test_refused_dtypes(flag, launcher, stored, device, message, monkeypatch):
    set_launcher(monkeypatch, launcher)
    with pytest.raises(UsageError, match=message):
        compute_dtype(flags(*(["--mixed_precision", flag] if flag else [])), stored, device)


def set_launcher(monkeypatch, precision):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if precision:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)


def test_a_conversion_is_said_in_one_line(caplog):
    with caplog.at_level(logging.INFO):
        compute_dtype(flags("--mixed_precision", "bf16"), BF16, CPU)
        assert not caplog.records
        compute_dtype(flags("--mixed_precision", "bf16"), FP16, CPU)
    assert len(caplog.records) == 1 and "converted once" in caplog.text


def test_a_real_model_on_a_cpu_needs_the_flag():
    with pytest.raises(UsageError, match=r"1\.7 billion.*--allow_cpu"):
        check_device(flags(), 1.7e9, CPU)
    check_device(flags("--allow_cpu"), 1.7e9, CPU)
    check_device(flags(), 1.7e9, CUDA)
    check_device(flags(), 1e6, CPU)


# ---------------------------------------------------------------- plan


def clips(count):
    """The buckets of as many clips, all of one size."""
    return [Bucket(9, 64, 96)] * count


def test_the_plan_of_the_flags():
    args = flags("--train_batch_size", "1", "--num_train_epochs", "3", "--gradient_accumulation_steps", "4")
    assert make_plan(args, clips(10), 1) == (8, 3, 30, 4, 10, args.learning_rate)
    args = flags(
        "--train_batch_size",
        "1",
        "--num_train_epochs",
        "3",
        "--gradient_accumulation_steps",
        "4",
        "--max_train_steps",
        "5",
    )
    assert make_plan(args, clips(10), 1) == (5, 2, 20, 4, 10, args.learning_rate)


def warnings_of(caplog, *more):
    """Of a plan for two processes and four batches an epoch."""
    caplog.clear()
    args = flags(*more)
    make_plan(args, clips(4 * 2 * args.train_batch_size), 2)
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max_train_steps", "20"], ["--lr_warmup_steps 500: the run has 20 updates", "3.8e-06 and never 0.0001"]),
        (["--max_train_steps", "20", "--lr_warmup_steps", "200"], ["reaches 9.5e-06 and"]),
        (["--num_train_epochs", "5", "--lr_warmup_steps", "20"], ["20: the run has 20 updates", "9.5e-05 and never"]),
        (["--max_train_steps", "1", "--lr_warmup_steps", "1"], ["reaches 0 and never"]),
        (["--max_train_steps", "20", "--scale_lr", "--train_batch_size", "3"], ["never 0.0006"]),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_told_with_the_rate_it_reaches(more, words, caplog):
    (line,) = warnings_of(caplog, "--lr_scheduler", "cosine", *more)
    assert not [word for word in words if word not in line]


def test_the_rate_that_is_told_is_the_schedules(caplog):
    args = flags("--lr_scheduler", "polynomial", "--max_train_steps", "7", "--lr_warmup_steps", "9")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=args.learning_rate)
    schedule, rates = make_lr_scheduler_from_args(args, optimizer, 7), []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    make_plan(args, clips(4 * args.train_batch_size), 1)
    assert f"reaches {max(rates):.3g} and never" in caplog.text


def test_a_warm_up_that_ends_is_not_warned_of(caplog):
    assert not warnings_of(caplog, "--lr_scheduler", "constant", "--max_train_steps", "20")  # it has none
    assert not warnings_of(caplog, "--lr_scheduler", "cosine", "--lr_warmup_steps", "19", "--max_train_steps", "20")


def test_checkpoints_and_validations_that_never_come_are_told(caplog):
    caplog.set_level("INFO")
    short = ["--max_train_steps", "20", "--validation_prompt", "a dog"]
    warnings_of(caplog, *short, "--validation_steps", "20")
    assert "no checkpoint before the end: --checkpointing_steps 500" in caplog.text
    assert "no validation between the first and the last: --validation_steps 20" in caplog.text
    warnings_of(caplog, *short, "--validation_steps", "19", "--checkpointing_steps", "20")
    assert "no checkpoint" not in caplog.text and "no validation" not in caplog.text


def test_scale_lr_counts_the_global_batch():
    args = ["--learning_rate", "1e-4", "--train_batch_size", "2", "--gradient_accumulation_steps", "3"]
    assert scaled_learning_rate(flags(*args), 4) == 1e-4
    assert scaled_learning_rate(flags(*args, "--scale_lr"), 4) == pytest.approx(24e-4)


def test_a_given_seed_is_taken_0_included_and_an_unset_one_is_new():
    assert shared_seed(flags("--seed", "0")) == 0
    assert len({shared_seed(flags()) for _ in range(5)}) > 1


# ---------------------------------------------------------------- exit codes


def leave(main, out, capsys):
    """(exit code, last line on stderr, status.json or None)"""
    with pytest.raises(SystemExit) as left:
        run_script(main, out)
    status = json.loads((out / "status.json").read_text()) if (out / "status.json").exists() else None
    return left.value.code, capsys.readouterr().err.splitlines()[-1], status


def raiser(error):
    def main():
        raise error

    return main


OUTCOMES = [
    (DataError("a.mp4: corrupt"), 65, "failed", "error: a.mp4: corrupt"),
    (NumbersError("step 3: not finite"), 70, "failed", "error: step 3: not finite"),
    (UserError("a worker was killed"), 70, "failed", "error: a worker was killed"),
    (StorageError("disk"), 74, "failed", "error: disk"),
    (OSError(errno.ENOSPC, "No space left on device", "x"), 74, "failed", "No space left on device"),
    (OSError(errno.EFBIG, "File too large", "x"), 74, "failed", "File too large"),
    (OSError(errno.EROFS, "Read-only file system", "x"), 74, "failed", "Read-only file system"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), 74, "failed", "No space left on device"),
    (KeyboardInterrupt(), 75, "interrupted", "the same command continues"),
    (
        torch.cuda.OutOfMemoryError("out of memory\nsecond line"),
        70,
        "failed",
        "the GPU's memory is full: out of memory",
    ),
    (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        75,
        "interrupted",
        "a data worker was killed",
    ),
    (RuntimeError("a defect"), 70, "failed", "RuntimeError('a defect')"),
    (OSError(errno.ENOENT, "No such file or directory", "x"), 70, "failed", "No such file"),
    (SafetensorError("header too large"), 70, "failed", "header too large"),
]


@pytest.mark.parametrize(
    ("error", "code", "state", "line"), OUTCOMES, ids=[f"{type(row[0]).__name__}-{row[1]}" for row in OUTCOMES]
)
def test_each_error_has_its_code_and_line(error, code, state, line, tmp_path, capsys):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    got_code, got_line, status = leave(raiser(error), tmp_path, capsys)
    assert (got_code, status["exit_code"], status["state"], status["step"]) == (code, code, state, 12)
    assert got_line.startswith("error: ") and line in got_line and status["message"] in got_line


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError(errno.ENOENT, "No such file", "x")])
def test_only_a_defect_shows_a_traceback(error, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_script(raiser(error), tmp_path)
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script(raiser(DataError("bad")), tmp_path)
    assert capsys.readouterr().err == "error: bad\n"


def test_a_refused_command_leaves_the_status_alone(tmp_path, capsys):
    code, line, status = leave(raiser(UsageError("other flags")), tmp_path / "new", capsys)
    assert (code, line, status) == (2, "error: other flags", None)
    write_json(tmp_path / "status.json", {"state": "complete"})
    assert leave(raiser(UsageError("other flags")), tmp_path, capsys)[2] == {"state": "complete"}


def test_success_just_returns(tmp_path):
    done = []
    run_script(lambda: done.append(True), tmp_path)
    assert done and not list(tmp_path.iterdir())


by_clock = pytest.mark.parametrize("clock", [-600, 0, 600])  # of a file server, in seconds, against this machine's


@by_clock
def test_the_first_rank_that_fails_is_heard(tmp_path, capsys, monkeypatch, clock):
    """A rank with bad data ends; the others then lose their connection, which is no news."""
    monkeypatch.setenv(RUN_ID_VARIABLE, "this-run")
    write_json(tmp_path / "status.json", {"state": "interrupted", "run": "an earlier run"})

    def main():
        with pytest.raises(SystemExit):
            run_script(raiser(DataError("a.mp4: corrupt")), tmp_path)  # the other rank
        os.utime(tmp_path / "status.json", (time.time() + clock, time.time() + clock))
        raise RuntimeError("connection closed by peer")

    code, _, status = leave(main, tmp_path, capsys)
    assert code == 70 and status["exit_code"] == 65 and status["message"] == "a.mp4: corrupt"


@by_clock
@pytest.mark.parametrize("earlier", [{"state": "failed", "run": "another"}, {"state": "interrupted"}, {}])
def test_a_failure_replaces_what_an_earlier_run_said(tmp_path, capsys, clock, earlier):
    write_json(tmp_path / "status.json", earlier)
    os.utime(tmp_path / "status.json", (time.time() + clock, time.time() + clock))
    _, _, status = leave(raiser(DataError("a.mp4: corrupt")), tmp_path, capsys)
    assert (status["state"], status["exit_code"]) == ("failed", 65) and status["run"] not in ("another", None)


@pytest.mark.parametrize("by_wrapper", [False, True])
@pytest.mark.parametrize("refused_rank", [0, 1])
def test_a_rank_that_is_stopped_because_another_was_refused_says_nothing(
    tmp_path, monkeypatch, by_wrapper, refused_rank
):
    """The launcher sends the others SIGTERM as soon as one has left."""
    if by_wrapper:
        monkeypatch.setenv(RUN_ID_VARIABLE, "this-run")
    write_json(tmp_path / "status.json", {"state": "complete", "run": "an earlier run"})

    def main():
        if int(os.environ["RANK"]) == refused_rank:
            raise UsageError("other flags")
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    codes = run_ranks(lambda: run_script(main, tmp_path), 2)
    assert (codes[refused_rank], codes[1 - refused_rank]) == (2, 75)
    status = json.loads((tmp_path / "status.json").read_text())
    refused = {"refused": {"run": "this-run", "exit_code": 2, "message": "other flags"}} if by_wrapper else {}
    assert status == {"state": "complete", "run": "an earlier run", **refused}


def test_ranks_that_are_stopped_once_they_have_begun_say_so(tmp_path):
    def main():
        begin_run(tmp_path, is_main_process=os.environ["RANK"] == "0")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    assert run_ranks(lambda: run_script(main, tmp_path), 2) == [75, 75]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "interrupted"


def test_the_ranks_of_one_launcher_have_one_id_and_those_of_another_another(tmp_path, monkeypatch):
    assert launch.launch_id() is None  # the tests' own parent starts no ranks
    monkeypatch.setattr(launch, "LAUNCHERS", {Path(word).name for word in psutil.Process().cmdline()[:4]})

    def main(name):
        (tmp_path / f"{name}{os.environ['RANK']}").write_text(launch.launch_id())

    assert run_ranks(lambda: main("first"), 2) == [0, 0]
    child = multiprocessing.get_context("fork").Process(target=lambda: run_ranks(lambda: main("second"), 2))
    child.start()
    child.join()
    ids = [(tmp_path / name).read_text() for name in ("first0", "first1", "second0", "second1")]
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_ranks_without_a_common_launcher_agree_as_soon_as_they_meet(tmp_path):
    """Of several machines, or started by mpirun."""

    def main():
        THIS_RUN.__init__(f"launched for rank {os.environ['RANK']}")
        torch.distributed.init_process_group("gloo")
        launch.agree_on_run()
        (tmp_path / os.environ["RANK"]).write_text(THIS_RUN.id)
        torch.distributed.barrier()  # the store is rank 0's

    assert run_ranks(main, 2) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["launched for rank 0"] * 2


def test_a_status_that_cannot_be_written_hides_nothing(tmp_path, capsys):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(SystemExit) as left:
        run_script(raiser(DataError("a.mp4: corrupt")), tmp_path / "out")
    assert left.value.code == 65
    error, note = capsys.readouterr().err.splitlines()
    assert error == "error: a.mp4: corrupt" and "status.json not written" in note


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("variable", "value", "flag"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "--max_grad_norm"),
    ],
)
def test_a_config_that_disagrees_with_a_flag_stops_the_run(monkeypatch, variable, value, flag):
    name = variable.removeprefix("ACCELERATE_").lower()
    for agreeing in ("auto", "none", "1" if "steps" in flag else "1.0"):
        monkeypatch.setenv(variable, agreeing)
        check_launcher(flags())
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=rf"{flag} 1.* disagrees with {name}: {value} of the accelerate config"):
        check_launcher(flags())
    check_launcher(flags(flag, value))


FULL = {"ENOSPC", "EFBIG", "EDQUOT"}


@pytest.mark.parametrize("number", [*sorted(FULL), "EIO", "EACCES", "EPERM", "EROFS", "ESTALE"])
def test_a_disk_is_said_to_be_full_only_when_it_is(tmp_path, capsys, number):
    def failing():
        raise OSError(getattr(errno, number), "no", "/data/clip.mp4")

    with pytest.raises(SystemExit) as left:
        run_script(failing, tmp_path)
    line = capsys.readouterr().err.splitlines()[-1]
    words = "cannot write" if number in FULL else "cannot read or write"
    assert left.value.code == 74 and line.startswith(f"error: {words}: ")
    assert ("GiB are free" in line) == (number in FULL)
