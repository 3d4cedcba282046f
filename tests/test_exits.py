"""Honest exits: a sweep says how every run ended, goes on, stops in good order, and on a rerun does what is left."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from args import EPILOG
from errors import UserError
from test_scripts import BUCKET_FLAGS, ROOT, clips, prepare, prepared, status  # noqa: F401
from test_shell import SWEEP, TRAIN, output_dir_of


# In place of `accelerate launch`: a launcher that starts the run as its child and dies of SIGTERM as the real one does.
LAUNCHER = f"""#!{sys.executable}
import subprocess, sys
sys.exit(subprocess.run([{sys.executable!r}, __file__ + ".run", *sys.argv[1:]]).returncode != 0)
"""
# The run: complete at once, or where its folder is named by STALL until a signal, which takes it a while to obey.
RUN = """
import json, os, pathlib, signal, sys, time
argv = sys.argv[1:]
out = pathlib.Path(argv[argv.index("--output_dir") + 1])
out.mkdir(parents=True, exist_ok=True)
def leave(state, code, step):
    status = {"state": state, "exit_code": code, "step": step, "run": os.environ["COGVIDEOX_RUN_ID"]}
    (out / "status.json").write_text(json.dumps(status, indent=2))
    sys.exit(code)
def stop(number, frame):
    time.sleep(0.5)
    leave("interrupted", 75, 7)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if (out / "status.json").exists() and json.loads((out / "status.json").read_text())["state"] == "complete":
    sys.exit(0)  # as the scripts do, without a new status
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
    (tmp_path / "work").mkdir()

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


DONE, BAD, STOPPED, WAITING = (
    ["complete", "0", "3000"],
    ["failed", "65", "0"],
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


def test_every_exit_code_is_documented():
    codes = {0, *(error.exit_code for error in [UserError, *UserError.__subclasses__()])}
    readme = (ROOT / "README.md").read_text()
    assert codes == {0, 2, 65, 70, 74, 75}
    for code in codes:
        assert f" {code} " in EPILOG.replace(":", " ") and f"| {code} |" in readme


@pytest.mark.slow
@pytest.mark.faults
def test_a_real_sweep_reruns_what_failed(tiny, clips, prepared, tmp_path):  # noqa: F811
    """The scripts themselves: the second rate's data is damaged at first."""
    data = shutil.copytree(prepared("5b"), tmp_path / "data")
    bad = sorted((data / "video_latents").iterdir())[0]
    whole = bad.read_bytes()
    settings = {
        "MODEL": str(tiny("5b")), "DATA_ROOT": str(data), "OUTPUT_ROOT": str(tmp_path / "out"), "OPTIMIZERS": "adamw",
        "LEARNING_RATES": "1e-4 1e-3", "MAX_TRAIN_STEPS": "4", "PATH": f"{os.path.dirname(sys.executable)}:{os.defpath}",
    }  # fmt: skip

    def sweep():
        result = subprocess.run(
            [TRAIN, "--mixed_precision", "no", "--checkpointing_steps", "2"], env={**os.environ, **settings}, text=True,
            capture_output=True, timeout=400,
        )  # fmt: skip
        lines = result.stdout.split("output_dir\n")[-1].splitlines()
        return result.returncode, [line.split()[:3] for line in lines], result.stderr

    assert sweep()[:2] == (0, [["complete", "0", "4"]] * 2)
    folder = next((tmp_path / "out").glob("*1e-3"))
    shutil.rmtree(folder)
    bad.write_bytes(whole[:100])
    code, table, errors = sweep()
    assert (code, table[0], table[1][:2]) == (65, ["complete", "0", "4"], ["failed", "65"]) and "damaged" in errors
    bad.write_bytes(whole)
    assert sweep()[:2] == (0, [["complete", "0", "4"]] * 2)
    assert status(folder)["state"] == "complete" and json.loads((folder / "args.json").read_text())
