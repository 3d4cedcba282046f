"""The same command writes the same bytes, whatever the process's hash seed, time, folder or environment."""

import os
import subprocess
import sys

import pytest

from script_runs import ROOT, SCRIPTS, result_hash


@pytest.fixture(params=["t2v_lora"])
def script(request):
    return SCRIPTS[request.param]


def hashes(script, command, tmp_path, seeds):
    """Of the results of runs in processes of their own, at the same time, each with its PYTHONHASHSEED."""
    path = ROOT / "training" / f"{script.module}.py"
    processes = []
    for seed in seeds:
        argv = [sys.executable, path, *command(f"out-{seed}", "--max_train_steps", "2")]
        env = {**os.environ, "PYTHONHASHSEED": str(seed), "TZ": f"UTC{seed}", "USER": f"user{seed}"}
        processes.append(subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    return [result_hash(tmp_path / f"out-{seed}") for seed in seeds]


@pytest.mark.slow  # a hash seed is set before Python starts: whole scripts
def test_a_lora_file_has_the_same_hash_whatever_the_hash_seed(script, command, tmp_path):
    first, *others = hashes(script, command, tmp_path, (1, 2))
    assert first and all(other == first for other in others)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_every_scripts_result_has(script, command, tmp_path):
    first, *others = hashes(script, command, tmp_path, (1, 2, 3))
    assert first and all(other == first for other in others)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        files = [tmp_path / f"out-{seed}/checkpoint-2" / name for seed in (1, 2, 3)]
        assert len({file.read_bytes() for file in files if file.exists()}) <= 1, name
