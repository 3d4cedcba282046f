"""Asked to stop: the step is finished, a checkpoint written, exit code 75, and the same command ends with the same bytes."""

import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from args import parse_training_args
from base.signals import INTERRUPTION, SIGNALS, catch_signals, ignore_group_signals
from data import latents
from run.exits import run_script
from script_runs import (
    EVERY_SCRIPT,
    ROOT,
    SCRIPTS,
    checkpoints,
    metrics,
    prepare,
    result_hash,
    run_ranks,
    same_run,
    status,
)


STEPS = ["--max_train_steps", "4", "--checkpointing_steps", "100"]


@pytest.fixture(params=["t2v_lora"])
def script(request):
    return SCRIPTS[request.param]


by_script = pytest.mark.parametrize("script", EVERY_SCRIPT, indirect=True)
one_script = pytest.mark.parametrize("script", ["t2v_lora"], indirect=True)


def send_at(monkeypatch, module, call, number, name="update", rank=None):
    """This process gets the signal at the given call of `module`'s function `name`."""
    calls, original = [], getattr(module, name)

    def sending(*arguments, **options):
        calls.append(None)
        if len(calls) == call and rank in (None, int(os.environ.get("RANK", "0"))):
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, sending)


def in_child(function, timeout=60):
    """The exit code of `function` in a forked process, as multiprocessing counts."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(timeout)
    alive = process.is_alive()
    if alive:
        process.kill()
    assert not alive, "still running"
    return process.exitcode


# ---------------------------------------------------------------- one process


@by_script
def test_a_signal_finishes_the_step_saves_and_the_same_command_continues(script, train, stops, module, monkeypatch):
    number = SIGNALS[list(SCRIPTS).index(script.key) % len(SIGNALS)]
    """Between two batches: with 64 to an update, the rest of them would take longer than anybody waits."""
    flags = [*STEPS, "--gradient_accumulation_steps", "3"]
    with monkeypatch.context() as patches:
        send_at(patches, module, 5, number)  # in the second of the three batches of update 2
        line = stops(75, "broken", *flags)
    unbroken = train("unbroken", *flags)
    broken = unbroken.with_name("broken")
    step = status(broken)["step"]
    assert status(broken)["state"] == "interrupted" and checkpoints(broken) == [step] == [1]
    assert f"stopped by {number.name} after step {step} of 4" in line and len(metrics(broken)) == step
    train("broken", *flags)
    assert result_hash(broken) == result_hash(unbroken) and status(broken)["state"] == "complete"
    assert [row["loss"] for row in metrics(broken)] == [row["loss"] for row in metrics(unbroken)]


def test_signals_in_a_save_and_at_the_last_update_do_not_cut_them_short(train, stops, module, monkeypatch):
    unbroken = train("unbroken", "--max_train_steps", "3")
    with monkeypatch.context() as patches:
        send_at(patches, module.checkpoints, 2, signal.SIGTERM, "save")
        stops(75, "broken", "--max_train_steps", "3")
    broken = unbroken.with_name("broken")
    assert checkpoints(broken) == [1, 2]
    with monkeypatch.context() as patches:
        send_at(patches, module, 1, signal.SIGTERM)  # the last update: the result is as near as a checkpoint
        run_script(lambda: train("broken", "--max_train_steps", "3"), broken)
    assert same_run(broken, unbroken, 3) and status(broken)["state"] == "complete"


def test_before_the_first_step_it_leaves_at_once(stops, module, monkeypatch, tmp_path):
    send_at(monkeypatch, module.loading, 1, signal.SIGTERM, "load_transformer")
    assert "interrupted by SIGTERM" in stops(75, "out", *STEPS)
    assert status(tmp_path / "out")["state"] == "interrupted" and checkpoints(tmp_path / "out") == []


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_that_waits_for_data_saves_and_leaves(workers, command, script, module, monkeypatch, tmp_path):
    """The third clip never comes: the disk hangs. Nothing but the signal wakes the process."""
    read, reads = latents.read_tensor, multiprocessing.Value("i", 0)

    def hanging(path, name):
        with reads.get_lock():
            reads.value += name == "moments"
            stuck = reads.value == 3
        if stuck:
            # Two updates are ready; the signal may come while the second is made, or in the wait for the third
            threading.Timer(2, os.kill, (main_process.value, signal.SIGTERM)).start()
            time.sleep(1000)
        return read(path, name)

    main_process = multiprocessing.Value("i", 0)
    argv = command("out", *STEPS, "--dataloader_num_workers", workers)

    def main():
        main_process.value = os.getpid()
        monkeypatch.setattr(latents, "read_tensor", hanging)
        run_script(lambda: module.main(parse_training_args(script.key, argv)), tmp_path / "out")

    started = time.monotonic()
    assert in_child(main) == 75
    assert time.monotonic() - started < 30
    step = status(tmp_path / "out")["step"]
    assert step >= 1 and checkpoints(tmp_path / "out") == [step]


def test_a_killed_data_worker_is_one_line_and_the_same_command_continues(
    command, script, module, monkeypatch, tmp_path
):
    """As the system kills it for lack of memory."""
    read, reads = latents.read_tensor, multiprocessing.Value("i", 0, lock=False)

    def killed(path, name):
        reads.value += name == "moments"
        if reads.value == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, name)

    flags = ["--max_train_steps", "6", "--checkpointing_steps", "1", "--dataloader_num_workers", "1"]
    argv = command("out", *flags)

    def main():
        monkeypatch.setattr(latents, "read_tensor", killed)
        run_script(lambda: module.main(parse_training_args(script.key, argv)), tmp_path / "out")

    assert in_child(main) == 75
    assert status(tmp_path / "out")["state"] == "interrupted" and "killed" in status(tmp_path / "out")["message"]
    assert in_child(main) == 0 and status(tmp_path / "out")["step"] == 6


def test_a_second_ctrl_c_ends_the_process_even_in_a_call_that_never_returns(tmp_path):
    def hang():
        pid = os.getpid()
        for delay in (0.2, 0.25, 1.0):  # the second is the launcher's echo of the first
            threading.Timer(delay, os.kill, (pid, signal.SIGINT)).start()
        INTERRUPTION.raise_in_handler = False
        try:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()  # taken up again after every handler
        finally:
            os._exit(3)

    assert in_child(lambda: run_script(hang, tmp_path)) == 75
    assert status(tmp_path)["state"] == "interrupted" and "at once" in status(tmp_path)["message"]


def work(pids):
    ignore_group_signals()
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    pids.send(os.getpid())
    time.sleep(1000)


def test_workers_ignore_what_is_sent_to_the_whole_group_and_obey_their_parent():
    context = multiprocessing.get_context("fork")
    started, pids = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(pids,))
    worker.start()
    assert started.recv() == worker.pid
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0  # as a worker that has nothing left to do


def test_workers_die_with_their_parent():
    context = multiprocessing.get_context("fork")
    started, pids = context.Pipe(duplex=False)

    def parent():
        context.Process(target=work, args=(pids,)).start()
        time.sleep(1000)

    process = context.Process(target=parent)
    process.start()
    worker = os.pidfd_open(started.recv())
    process.kill()
    assert select.select([worker], [], [], 10)[0]  # readable: ended


def test_handlers_are_as_before_afterwards():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with catch_signals(lambda: None):
        INTERRUPTION.raise_in_handler = False
        os.kill(os.getpid(), signal.SIGUSR1)
        assert INTERRUPTION.reason == "SIGUSR1"
        with INTERRUPTION.interruptible():
            pass
        assert list(INTERRUPTION.until_interrupted([1, 2])) == []
        assert list(INTERRUPTION.until_interrupted([1, 2], alone=False)) == [1, 2]
    assert {number: signal.getsignal(number) for number in SIGNALS} == before and INTERRUPTION.reason is None


def test_a_body_that_may_end_is_ended():
    with catch_signals(lambda: None):
        INTERRUPTION.raise_in_handler = False
        with INTERRUPTION.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")
        assert INTERRUPTION.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # noted already


# ---------------------------------------------------------------- two processes


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_rank_stops_both_at_the_same_step(asked, script, command, module, monkeypatch, tmp_path):
    argv = {name: command(name, *STEPS) for name in ("broken", "unbroken")}

    def main(name):
        run_script(lambda: module.main(parse_training_args(script.key, argv[name])), tmp_path / name)

    with monkeypatch.context() as patches:
        send_at(patches, module, 2, signal.SIGTERM, rank=asked)
        assert run_ranks(lambda: main("broken"), 2) == [75, 75]
    broken = tmp_path / "broken"
    assert checkpoints(broken) == [2] and status(broken)["step"] == 2 and len(metrics(broken)) == 2
    assert run_ranks(lambda: main("broken"), 2) == [0, 0] and run_ranks(lambda: main("unbroken"), 2) == [0, 0]
    assert result_hash(broken) == result_hash(tmp_path / "unbroken") and len(metrics(broken)) == 4


def test_a_refused_second_run_of_two_ranks_leaves_the_first_alone(script, command, module, tmp_path):
    from base.files import lock_folder

    (tmp_path / "out").mkdir()
    lock_folder(tmp_path / "out")
    argv = command("out", *STEPS)
    main = lambda: module.main(parse_training_args(script.key, argv))  # noqa: E731
    assert run_ranks(lambda: run_script(main, tmp_path / "out"), 2) == [2, 2]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# ---------------------------------------------------------------- prepare


@one_script
def test_prepare_finishes_the_clip_in_hand_and_a_rerun_does_the_rest(script, tiny, clips, tmp_path, monkeypatch):
    import prepare_dataset

    prepare(tiny("5b"), clips["one"], tmp_path / "unbroken")
    with monkeypatch.context() as patches:
        send_at(patches, prepare_dataset, 2, signal.SIGTERM, "encode_videos")
        with pytest.raises(SystemExit) as left:
            run_script(lambda: prepare(tiny("5b"), clips["one"], tmp_path / "broken"), tmp_path / "broken")
    assert left.value.code == 75 and status(tmp_path / "broken")["state"] == "interrupted"
    done = sorted((tmp_path / "broken/video_latents").iterdir())
    assert len(done) == 2 and not list((tmp_path / "broken").rglob(".tmp-*"))
    times = [path.stat().st_mtime_ns for path in done]
    prepare(tiny("5b"), clips["one"], tmp_path / "broken")
    assert [path.stat().st_mtime_ns for path in done] == times
    files = {path.relative_to(tmp_path / "unbroken") for path in (tmp_path / "unbroken").rglob("*") if path.is_file()}
    for name in files - {".lock"}:
        if name.name not in ("status.json", ".lock"):
            assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


# ---------------------------------------------------------------- through the launcher


@pytest.mark.slow  # a real launcher, which imports torch as its script does
@one_script
def test_the_launchers_death_is_a_signal_too(script, command, tmp_path):
    """accelerate launch ends at SIGTERM and leaves its process behind, which saves and says so in status.json."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    config = ["--config_file", str(ROOT / "accelerate_configs/uncompiled_1.yaml")]
    flags = ["--max_train_steps", "100000", "--checkpointing_steps", "100000", "--log_every", "1"]
    argv = [*launch, *config, str(ROOT / "training" / f"{script.module}.py"), *command("out", *flags)]
    read, write = os.pipe()
    launcher = subprocess.Popen(argv, stderr=write, pass_fds=[write], start_new_session=True)
    os.close(write)
    text = b""
    with open(read, "rb", buffering=0) as output:
        while b"loss=" not in text:  # the bar after the first update
            piece = output.read(4096)
            assert piece, text.decode()
            text += piece
        launcher.terminate()
        launcher.wait(30)
        rest = b"".join(iter(lambda: output.read(4096), b""))  # until the script, the last to hold it, is gone
    assert b"stopped by SIGTERM after step" in rest
    out = tmp_path / "out"
    assert status(out)["exit_code"] == 75 and status(out)["state"] == "interrupted"
    assert checkpoints(out) == [status(out)["step"]] and json.loads((out / "args.json").read_text())
