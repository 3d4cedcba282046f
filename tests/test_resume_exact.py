"""kill -9 at random moments, the same command again: the files at the end are those of an unbroken run, byte for byte.

The moments are drawn from COGVIDEOX_FAULT_SEED, or anew each time; every failure shows the seed.
"""

import itertools
import json
import multiprocessing
import os
import random
import secrets
import shutil
import socket
import threading
import time
from typing import NamedTuple

import pytest
import torch
from tqdm import tqdm

from args import parse_training_args
from base.errors import UsageError
from base.manifest import find_damage
from run import checkpoints
from run.exits import run_script
from script_runs import SCRIPTS


SEED = int(os.environ.get("COGVIDEOX_FAULT_SEED") or secrets.randbits(31))
BASE = [
    "--max_train_steps", "6", "--checkpointing_steps", "2", "--log_every", "1", "--train_batch_size", "2",
    "--text_dropout", "0.3",
]  # fmt: skip

ON_HOST = ("--mixed_precision", "bf16", "--use_cpu_offload_optimizer")


class Setting(NamedTuple):
    """One way to train; all pairs of values of the first six occur."""

    script: str
    workers: int
    accumulation: int
    data: str  # one bucket or two
    form: str
    ranks: int
    more: tuple[str, ...] = ()

    def __str__(self):
        return "-".join(map(str, self[:6]))


SETTINGS = [
    Setting("t2v_lora", 0, 1, "one", "raw", 1, ("--random_flip", "0.5")),
    Setting("t2v_lora", 2, 3, "two", "prepared", 2, ("--lr_scheduler", "cosine")),
    Setting("t2v_lora", 2, 1, "two", "raw", 1, ("--video_reshape_mode", "random")),
    Setting("t2v_sft", 0, 1, "two", "raw", 2),
    Setting("t2v_sft", 2, 3, "one", "prepared", 1, ("--mixed_precision", "bf16", "--memory", "offload")),
    Setting("t2v_sft", 0, 3, "two", "prepared", 1, ("--checkpoints_total_limit", "1", "--ema", *ON_HOST)),
    Setting("i2v_lora", 0, 1, "two", "prepared", 1, ("--stratified_timesteps",)),
    Setting("i2v_lora", 2, 3, "one", "raw", 2),
    Setting("i2v_lora", 2, 1, "two", "prepared", 2, ("--optimizer", "prodigy", "--learning_rate", "1")),
    Setting("i2v_sft", 0, 3, "one", "prepared", 2, ("--use_cpu_offload_optimizer",)),
    Setting("i2v_sft", 2, 1, "two", "raw", 1, ("--mixed_precision", "bf16", "--memory", "balanced", "--ema")),
    Setting("i2v_sft", 0, 3, "two", "prepared", 1, ("--lr_scheduler", "linear", "--optimizer", "came")),
]
# One rank on videos and two on latents with workers in `make test`; with the others each script, and accumulation
QUICK = [SETTINGS[n] for n in (0, 8)] + [pytest.param(SETTINGS[n], marks=pytest.mark.slow) for n in (5, 11)]


@pytest.fixture
def setting(request):
    return request.param


@pytest.fixture
def script(setting):
    return SCRIPTS[setting.script]


def settings(chosen):
    return pytest.mark.parametrize("setting", chosen, indirect=True, ids=str)


@pytest.fixture
def start(setting, script, module, command, tmp_path):
    """Start the setting's command in forked processes: importing everything anew would take 8 s each."""

    def begin(name):
        flags = [*BASE, "--dataloader_num_workers", str(setting.workers), *setting.more]
        flags += ["--gradient_accumulation_steps", str(setting.accumulation)]
        argv = command(name, *flags, data=setting.data, raw=setting.form == "raw")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]

        def work(rank):
            if setting.ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(setting.ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)  # renews the thread pool, which several threads may not do at once after a fork
            tqdm.set_lock(threading.RLock())  # its own is shared by all forks of this process, killed ones too
            log = os.open(tmp_path / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run_script(lambda: module.main(parse_training_args(script.key, argv)), tmp_path / name)

        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=work, args=(rank,)) for rank in range(setting.ranks)]
        for process in processes:
            process.start()
        return processes

    return begin


@pytest.fixture
def finish(start, tmp_path):
    """Run to the end; returns how long it took."""

    def run(name):
        started = time.monotonic()
        processes = start(name)
        for process in processes:
            process.join(180)
            process.kill()
        codes = [process.exitcode for process in processes]
        assert set(codes) == {0}, f"seed {SEED}: {codes} {(tmp_path / f'{name}.log').read_text()[-3000:]}"
        return time.monotonic() - started

    return run


def kill_after(processes, seconds, rank):
    """kill -9 to one process after `seconds`, then to the others, as a launcher does. False if they had all ended."""
    processes[rank].join(seconds)
    running = processes[rank].is_alive()
    for process in (processes[rank], *processes):
        process.kill()
        process.join()
    return running


def final_files(folder):
    """All that a run leaves, without what tells the time of day or, as the loss picture, the folder's name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [
        path for path in files if path.name not in (".lock", "args.json", "status.json", "metrics.jsonl", "loss.png")
    ]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "event" not in row]  # memory in use, at moments of one process
    content = {str(path.relative_to(folder)): path.read_bytes() for path in kept}
    content = {name: data.replace(folder.name.encode(), b"run") for name, data in content.items()}  # the model card's
    return content | {"metrics": [{name: row[name] for name in row if "seconds" not in name} for row in rows]}


def killed_and_continued(name, kills, folder, start, finish, random_moment):
    """Kill a run so many times, anew from the beginning whenever it got to its end, and let it finish."""
    done = 0
    while done < kills:
        seconds, rank = random_moment()
        if kill_after(start(name), seconds, rank):
            done += 1
            damaged = [path for path in folder.glob("checkpoint-*") if find_damage(path)]
            assert not damaged, f"seed {SEED}: kill {done} after {seconds:.3f} s left {damaged}"
        else:
            assert json.loads((folder / "status.json").read_text())["state"] == "complete", f"seed {SEED}"
            shutil.rmtree(folder)
    finish(name)


def check(setting, kills, start, finish, tmp_path):
    draw = random.Random(f"{SEED} {setting}")
    seconds = finish("unbroken")
    random_moment = lambda: (draw.uniform(0.05, 0.95) * seconds, draw.randrange(setting.ranks))  # noqa: E731
    print(f"\n{setting}: {kills} kills at moments of seed {SEED} within {seconds:.1f} s", flush=True)
    killed_and_continued("killed", kills, tmp_path / "killed", start, finish, random_moment)
    unbroken, killed = final_files(tmp_path / "unbroken"), final_files(tmp_path / "killed")
    assert len(unbroken) > 4 and [row["step"] for row in unbroken["metrics"]] == list(range(1, 7))
    assert unbroken.keys() == killed.keys(), f"seed {SEED}"
    assert [name for name in unbroken if unbroken[name] != killed[name]] == [], f"seed {SEED}"


def test_all_pairs_of_values_occur():
    values = [sorted({setting[place] for setting in SETTINGS}, key=str) for place in range(6)]
    for (i, ours), (j, theirs) in itertools.combinations(enumerate(values), 2):
        seen = {(setting[i], setting[j]) for setting in SETTINGS}
        assert seen == set(itertools.product(ours, theirs))
    assert [len(value) for value in values] == [4, 2, 2, 2, 2, 2]


@settings(QUICK)
def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(setting, start, finish, tmp_path):
    check(setting, 2, start, finish, tmp_path)


@pytest.mark.slow
@pytest.mark.faults
@settings(SETTINGS)
def test_three_kills_in_every_setting(setting, start, finish, tmp_path):
    check(setting, 3, start, finish, tmp_path)


@pytest.mark.slow
@pytest.mark.faults
@settings([SETTINGS[n] for n in (2, 4, 6, 10)])
def test_thirty_kills_of_each_script(setting, start, finish, tmp_path):
    check(setting, 30, start, finish, tmp_path)


@settings([SETTINGS[0]])
def test_another_number_of_processes_is_refused(setting, finish, tmp_path):
    """The batches could be cut anew, but sums over them would round in another way: it would not be the same run."""
    finish("out")
    with pytest.raises(UsageError, match="its num_processes was 1, now it is 2"):
        checkpoints.load(tmp_path / "out/checkpoint-4", None, {"num_processes": 2})
