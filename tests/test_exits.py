"""Honest exits: a sweep reports how every run ended, continues, stops in order, and on a rerun does what is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import prepare_dataset
from args import parse_training_args
from base.errors import DataError, UserError
from base.files import release_locks
from base.flag_parser import EPILOG
from base.status import RUN_ID_VARIABLE, write_status
from run.exits import run_script
from script_runs import ROOT, SCRIPTS, prepare, run_ranks, status
from test_shell import PREPARE, SWEEP, TRAIN, by_training, output_dir_of
from test_signals import send_at


# In place of `accelerate launch`: a launcher that starts the run as its child and dies of SIGTERM as the real one does.
LAUNCHER = f"""#!{sys.executable}
import subprocess, sys
sys.exit(subprocess.run([{sys.executable!r}, __file__ + ".run", *sys.argv[1:]]).returncode != 0)
"""
# The run: complete at once, or where its folder is named by STALL until a signal, which takes it a while to obey; named
# by KILL it dies at once. The clock of its disk differs by CLOCK seconds.
RUN = """
import json, os, pathlib, signal, sys, time
argv = sys.argv[1:]
out = pathlib.Path(argv[argv.index("--output_dir") + 1])
out.mkdir(parents=True, exist_ok=True)
def leave(state, code, step):
    status = {"state": state, "exit_code": code, "step": step, "run": os.environ["COGVIDEOX_RUN_ID"]}
    (out / "status.json").write_text(json.dumps(status, indent=2))
    now = time.time() + int(os.environ.get("CLOCK", "0"))
    os.utime(out / "status.json", (now, now))
    sys.exit(code)
def stop(number, frame):
    time.sleep(0.5)
    leave("interrupted", 75, 7)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if (out / "status.json").exists() and json.loads((out / "status.json").read_text())["state"] == "complete":
    sys.exit(0)  # as the scripts do, without a new status
if os.environ.get("KILL", "no run") in out.name:
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("STALL", "no run") in out.name:
    print("training", flush=True)
    time.sleep(60)
if os.environ.get("FAIL", "no run") in out.name:
    leave("failed", 65, 0)
leave("complete", 0, 3000)
"""


@pytest.fixture
def start(tmp_path):
    """Start a wrapper in its own process group, with the launcher above first on PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/accelerate").write_text(LAUNCHER)
    (tmp_path / "bin/accelerate").chmod(0o755)
    (tmp_path / "bin/accelerate.run").write_text(RUN)
    (tmp_path / "work/prepared/video_latents").mkdir(parents=True)

    def begin(**settings):
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), **SWEEP, **settings}
        return subprocess.Popen(
            [TRAIN], env=env, cwd=tmp_path / "work", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run behind a `&`
        )  # fmt: skip

    return begin


def table_of(process):
    output = process.communicate(timeout=60)[0]
    return [line.split() for line in output.split("output_dir\n")[1].splitlines()]


def rows(*ends):
    runs = [("1e-4", "adamw"), ("1e-4", "adam"), ("1e-3", "adamw"), ("1e-3", "adam")]
    return [[*end, output_dir_of(*run)] for end, run in zip(ends, runs, strict=True)]


DONE, BAD, LOST, STOPPED, WAITING = (
    ["complete", "0", "3000"],
    ["failed", "65", "0"],
    ["failed", "1", "-"],
    ["interrupted", "75", "7"],
    ["not", "started", "-", "-"],
)


def test_a_failing_run_does_not_stop_the_others_and_a_rerun_does_only_it(start, tmp_path):
    process = start(FAIL="adam__steps_3000__lr-schedule_cosine_with_restarts__learning-rate_1e-4")
    assert table_of(process) == rows(DONE, BAD, DONE, DONE) and process.returncode == 65
    folders = [tmp_path / "work" / row[-1] for row in rows(DONE, DONE, DONE, DONE)]
    times = [(folder / "status.json").stat().st_mtime_ns for folder in folders]
    process = start()
    assert table_of(process) == rows(DONE, DONE, DONE, DONE) and process.returncode == 0
    again = [(folder / "status.json").stat().st_mtime_ns for folder in folders]
    assert [before != after for before, after in zip(times, again, strict=True)] == [False, True, False, False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_sweep_alone_reaches_the_run_which_saves_first(number, start):
    """As a container or a job manager sends it: to the first process only."""
    process = start(STALL="optimizer_adam__")
    while "training" not in process.stdout.readline():
        pass
    process.send_signal(number)
    assert table_of(process) == rows(DONE, STOPPED, WAITING, WAITING) and process.returncode == 75
    process = start()
    assert table_of(process) == rows(DONE, DONE, DONE, DONE) and process.returncode == 0


def test_ctrl_c_reaches_all_and_the_sweep_waits_for_the_run(start):
    process = start(STALL="optimizer_adam__")
    while "training" not in process.stdout.readline():
        pass
    os.killpg(process.pid, signal.SIGINT)
    assert table_of(process) == rows(DONE, STOPPED, WAITING, WAITING) and process.returncode == 75


by_clock = pytest.mark.parametrize("clock", ["-600", "0", "600"])  # of the disk, in seconds, against this machine's


@by_clock
def test_the_clock_of_the_disk_decides_nothing(start, clock):
    process = start(FAIL="adam__", CLOCK=clock)
    assert table_of(process) == rows(DONE, BAD, DONE, BAD) and process.returncode == 65
    process = start(KILL="adam__", CLOCK=clock)
    assert table_of(process) == rows(DONE, LOST, DONE, LOST) and process.returncode == 1
    process = start(FAIL="adam__", CLOCK=clock)
    assert table_of(process) == rows(DONE, BAD, DONE, BAD) and process.returncode == 65
    process = start(CLOCK=clock)
    assert table_of(process) == rows(DONE, DONE, DONE, DONE) and process.returncode == 0


@by_clock
def test_a_copied_status_is_of_another_run(start, tmp_path, clock):
    process = start(FAIL="adam__", LEARNING_RATES="1e-4", CLOCK=clock)
    table_of(process)
    failed, copy = (tmp_path / "work" / output_dir_of(rate, "adam") for rate in ("1e-4", "1e-3"))
    shutil.copytree(failed, copy)
    process = start(KILL="learning-rate_1e-3", CLOCK=clock)
    assert table_of(process) == rows(DONE, DONE, LOST, LOST) and process.returncode == 1


@by_clock
def test_a_status_of_an_older_version_is_of_another_run(start, tmp_path, clock):
    for rate, state, code in (("1e-4", "complete", 0), ("1e-3", "interrupted", 75)):
        path = tmp_path / "work" / output_dir_of(rate) / "status.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"state": state, "exit_code": code, "step": 3000}, indent=2))
        now = time.time() + int(clock)
        os.utime(path, (now, now))
    process = start(KILL="optimizer_adamw__", CLOCK=clock)
    assert table_of(process) == rows(DONE, DONE, LOST, DONE) and process.returncode == 1


# ---------------------------------------------------------------- refused

# In place of the launchers: the scripts themselves, as RANKS processes, and exit code 1 where one fails.
RANKS_LAUNCHER = f"""#!{sys.executable}
import os, subprocess, sys
place = next(place for place, word in enumerate(sys.argv) if word.endswith(".py"))
ranks = [{{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": os.environ["RANKS"]}} for rank in range(int(os.environ["RANKS"]))]
processes = [subprocess.Popen([{sys.executable!r}, *sys.argv[place:]], env=os.environ | rank) for rank in ranks]
sys.exit(any([process.wait() for process in processes]))
"""


@pytest.fixture
def launch_ranks(tmp_path):
    """Run a wrapper with launchers that start the scripts themselves."""
    (tmp_path / "bin").mkdir()
    for name in ("accelerate", "torchrun"):
        (tmp_path / "bin" / name).write_text(RANKS_LAUNCHER)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / "d").mkdir()

    def run(wrapper, *arguments, **settings):
        env = {"PATH": f"{tmp_path / 'bin'}:{os.defpath}", "HOME": str(tmp_path), "DATA_ROOT": "d", **settings}
        return subprocess.run([wrapper, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("wrong", [["--rankk", "3"], ["--seed", "x"], ["--frame_buckets", "50"]], ids=" ".join)
@by_training
def test_a_refused_run_is_a_row_of_the_table_and_the_one_before_stands(launch_ranks, tmp_path, training, wrong, ranks):
    out = tmp_path / output_dir_of(training.learning_rate, name=training.output_name)
    out.mkdir(parents=True)
    earlier = {"state": "complete", "exit_code": 0, "step": 3000}
    (out / "status.json").write_text(json.dumps(earlier, indent=2))
    result = launch_ranks(training.wrapper, *wrong, RANKS=ranks, OUTPUT_ROOT="out")
    table = result.stdout.split("output_dir\n")[1].split()
    assert (result.returncode, table) == (2, ["refused", "2", "-", str(out.relative_to(tmp_path))]), result.stderr
    left = status(out)
    assert left.pop("refused")["message"] in result.stderr and left == earlier


@pytest.mark.parametrize("gpus", ["0", "0,1"])
def test_a_refused_preparation_is_exit_code_2_under_torchrun_too(launch_ranks, tmp_path, gpus):
    result = launch_ranks(PREPARE, "--batch_sizee", "2", GPU_IDS=gpus, RANKS="2")
    assert result.returncode == 2 and "did you mean --batch_size?" in result.stderr
    result = launch_ranks(PREPARE, "--batch_size", "0", "--output_dir=elsewhere", GPU_IDS=gpus, RANKS="2")
    assert result.returncode == 2 and status(tmp_path / "elsewhere")["refused"]["exit_code"] == 2


@pytest.fixture(params=["t2v_lora"])
def script(request):
    return SCRIPTS[request.param]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_refused_after_parsing_leaves_the_one_before(ranks, script, command, module, tmp_path, monkeypatch):
    def run(*more):
        argv = command("out", "--max_train_steps", "2", *more)
        main = lambda: module.main(parse_training_args(script.key, argv))  # noqa: E731
        return run_ranks(lambda: run_script(main, tmp_path / "out"), ranks)

    assert run() == [0] * ranks
    before = contents(tmp_path / "out")
    assert run("--lora_alpha", "1") == [2] * ranks  # by hand
    assert contents(tmp_path / "out") == before
    monkeypatch.setenv(RUN_ID_VARIABLE, "of-a-wrapper")
    assert run("--lora_alpha", "1") == [2] * ranks
    after = status(tmp_path / "out")
    refused = after.pop("refused")
    assert (refused["run"], refused["exit_code"]) == ("of-a-wrapper", 2) and "--lora_alpha" in refused["message"]
    assert after == json.loads(before.pop(tmp_path / "out/status.json"))
    monkeypatch.delenv(RUN_ID_VARIABLE)
    assert run() == [0] * ranks  # complete: nothing to do
    assert status(tmp_path / "out") == after
    assert {path: content for path, content in contents(tmp_path / "out").items() if path in before} == before


@pytest.mark.parametrize("clock", [-600, 600])
def test_a_killed_run_leaves_nothing_of_what_an_earlier_one_said(
    clock, script, command, module, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "status.json").write_text(json.dumps({"state": "interrupted", "exit_code": 75, "step": 1}))
    os.utime(out / "status.json", (time.time() + clock, time.time() + clock))
    send_at(monkeypatch, module, 2, signal.SIGKILL)
    argv = command("out", "--max_train_steps", "3")
    main = lambda: module.main(parse_training_args(script.key, argv))  # noqa: E731
    assert run_ranks(lambda: run_script(main, out), 1) == [-signal.SIGKILL]
    assert (out / "args.json").exists() and not (out / "status.json").exists()


def test_a_killed_preparation_is_not_complete_as_the_one_before_was(tiny, clips, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(tiny("5b"), clips["one"], out)
    release_locks()
    assert status(out)["state"] == "complete"
    shutil.rmtree(out / "video_latents")
    send_at(monkeypatch, prepare_dataset, 2, signal.SIGKILL, "encode_videos")
    killed = run_ranks(lambda: run_script(lambda: prepare(tiny("5b"), clips["one"], out), out), 1)
    assert killed == [-signal.SIGKILL] and not (out / "status.json").exists()


def test_a_preparation_of_two_ranks_that_is_refused_leaves_the_folder_alone(tiny, clips, tmp_path):
    out = tmp_path / "out"
    prepare(tiny("5b"), clips["one"], out)  # and holds the folder from now on
    before = contents(out)
    refused = run_ranks(lambda: run_script(lambda: prepare(tiny("5b"), clips["one"], out), out), 2)
    assert refused == [2, 2] and contents(out) == before


def test_every_exit_code_is_documented():
    codes = {0, *(error.exit_code for error in [UserError, *UserError.__subclasses__()])}
    page = (ROOT / "assets/running.md").read_text()
    assert codes == {0, 2, 65, 70, 74, 75}
    for code in codes:
        assert f" {code} " in EPILOG.replace(":", " ") and f"| {code} |" in page


@pytest.mark.slow
@pytest.mark.faults
def test_a_real_sweep_reruns_what_failed(tiny, clips, prepared, tmp_path):
    """The scripts themselves: the second rate's data is damaged at first."""
    data = shutil.copytree(prepared("5b"), tmp_path / "data")
    bad = sorted((data / "video_latents").iterdir())[0]
    whole = bad.read_bytes()
    settings = {
        "MODEL": str(tiny("5b")), "DATA_ROOT": str(data), "OUTPUT_ROOT": str(tmp_path / "out"), "OPTIMIZERS": "adamw",
        "LEARNING_RATES": "1e-4 1e-3", "MAX_TRAIN_STEPS": "4", "PATH": f"{os.path.dirname(sys.executable)}:{os.defpath}",
    }  # fmt: skip

    def sweep(*more):
        result = subprocess.run(
            [TRAIN, "--mixed_precision", "no", "--checkpointing_steps", "2", *more], env={**os.environ, **settings}, text=True,
            capture_output=True, timeout=400,
        )  # fmt: skip
        lines = result.stdout.split("output_dir\n")[-1].splitlines()
        return result.returncode, [line.split()[:3] for line in lines], result.stderr

    assert sweep()[:2] == (0, [["complete", "0", "4"]] * 2)
    folder = next((tmp_path / "out").glob("*1e-3"))
    shutil.rmtree(folder)
    bad.write_bytes(whole[:100])
    code, table, errors = sweep()
    # The first rate's result was trained on other files: it is not called complete with these
    assert (code, table[0][:2], table[1][:2]) == (2, ["refused", "2"], ["failed", "65"]) and "damaged" in errors
    bad.write_bytes(whole)
    code, table, errors = sweep()  # what was begun on the damaged files is another run
    assert (code, table[0], table[1][:2]) == (2, ["complete", "0", "4"], ["refused", "2"]) and "--overwrite" in errors
    shutil.rmtree(folder)
    assert sweep()[:2] == (0, [["complete", "0", "4"]] * 2)
    for wrong in (["--rankk", "3"], ["--rank", "3"]):  # at once, and when the folder is opened
        assert sweep(*wrong)[:2] == (2, [["refused", "2", "-"]] * 2)
        assert (status(folder)["state"], status(folder)["refused"]["exit_code"]) == ("complete", 2)
    assert sweep()[:2] == (0, [["complete", "0", "4"]] * 2)
    assert "refused" not in status(folder)
    assert status(folder)["state"] == "complete" and json.loads((folder / "args.json").read_text())


@pytest.mark.parametrize("from_a_wrapper", [False, True])
def test_what_fails_before_it_begins_leaves_a_finished_run_finished(tmp_path, monkeypatch, capsys, from_a_wrapper):
    """A mistyped --data_root, say: the next command would else take the folder for a new one and train over the result."""
    monkeypatch.delenv(RUN_ID_VARIABLE, raising=False)
    run_script(lambda: write_status(tmp_path, "complete", 0, step=4), tmp_path)
    if from_a_wrapper:
        monkeypatch.setenv(RUN_ID_VARIABLE, "second")

    def failing():
        raise DataError("no such folder (--data_root)")

    with pytest.raises(SystemExit) as left:
        run_script(failing, tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert left.value.code == 65 and (status["state"], status["exit_code"], status["step"]) == ("complete", 0, 4)
    assert status.get("refused", {}).get("exit_code") == (65 if from_a_wrapper else None)
