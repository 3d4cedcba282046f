"""DeepSpeed trains what is trained without it, and a run without it does not know that it is there.

The quick tests share the imports, and keep to ZeRO without offload: its CPU optimizer takes two minutes to compile.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from args import parse_training_args
from base.errors import UsageError
from engine import deepspeed_zero


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "t2v_lora": ("cogvideox_text_to_video_lora", ["--rank", "4", "--lora_alpha", "4"]),
    "t2v_sft": ("cogvideox_text_to_video_sft", ["--save_dtype", "fp32"]),
}
FLAGS = ["--optimizer", "adamw", "--learning_rate", "1e-3", "--lr_warmup_steps", "0", "--seed", "0"]
FLAGS += ["--train_batch_size", "1", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "2"]


def flags(*more):
    script = "t2v_sft" if "--ema" in more else "t2v_lora"
    return parse_training_args(script, ["--pretrained_model_name_or_path", "m", "--data_root", "d", *more])


# ---------------------------------------------------------------- settings


def config_of(args, **settings):
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", **settings}
    return deepspeed_zero.complete_config(args, config, torch.bfloat16, num_ranks=2)


def test_the_flags_fill_in_what_the_config_leaves_open():
    args = flags("--train_batch_size", "3", "--gradient_accumulation_steps", "4", "--max_grad_norm", "0.5")
    config = config_of(
        args, zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}, "overlap_comm": "auto"}
    )
    assert config["train_batch_size"] == 24 and config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5 and config["bf16"] == {"enabled": True}
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": deepspeed_zero.BUCKET}
    config = config_of(args, zero_optimization={"stage": 2, "reduce_bucket_size": 1000})
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4 disagrees with the flags, which say 1"),
        ({"gradient_clipping": 0.1}, "gradient_clipping: 0.1 disagrees with the flags, which say 1.0"),
        ({"optimizer": {"type": "AdamW"}}, "a block 'optimizer'"),
        ({"zero_optimization": {"stage": 3}}, "zero_stage: 3 is not supported; use 2"),
    ],
)
def test_a_config_that_disagrees_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        config_of(flags(), **settings)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (["--use_8bit"], "--use_8bit under DeepSpeed"),
        (["--use_cpu_offload_optimizer"], "offload_optimizer_device: cpu"),
        (["--optimizer", "came"], "--optimizer came under DeepSpeed: DeepSpeed runs adam and adamw"),
        (["--mixed_precision", "fp16"], "use bf16"),
        (["--memory", "stream"], "--memory stream under DeepSpeed: .* use --memory balanced"),
        (["--ema"], "--ema under DeepSpeed: the weights to average are sharded over the ranks"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(use, message, monkeypatch):
    deepspeed_zero.check_deepspeed_from_args(flags(*use))  # without DeepSpeed all is well
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(deepspeed_zero, "installed_version", lambda: "0.19.8")
    with pytest.raises(UsageError, match=message):
        deepspeed_zero.check_deepspeed_from_args(flags(*use))
    for version, said in ((None, "is not installed; pip install"), ("0.18.2", "0.18.2, which .*; pip install")):
        monkeypatch.setattr(deepspeed_zero, "installed_version", lambda version=version: version)
        with pytest.raises(UsageError, match=said):
            deepspeed_zero.check_deepspeed_from_args(flags())


# ---------------------------------------------------------------- results


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "event" not in row]


def weights(folder):
    (path,) = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("transformer/*.safetensors")]
    return load_file(path)


def assert_same_training(under, plain):
    """Of two folders: one that DeepSpeed trained, one that was trained without."""
    assert losses(under) == pytest.approx(losses(plain), rel=1e-4)
    ours, theirs = weights(plain), weights(under)
    assert ours.keys() == theirs.keys()
    # Adam divides by tiny second moments: where a gradient is rounding alone, so is the update
    difference = sum(float((ours[name] - theirs[name]).abs().sum()) for name in ours)
    assert difference < 1e-3 * sum(float(tensor.abs().sum()) for tensor in ours.values())


# ---------------------------------------------------------------- quick: runs that share their imports


# argv: a JSON list of [module, script, flags, environment]. Each run is forked off a process that has imported all and
# run nothing; it says whether DeepSpeed is loaded at its end, and each time that DeepSpeed joined tensors to one (first
# the weights, then gradients), whether it did so in host memory.
DRIVER = """
import json, multiprocessing, os, sys
import cogvideox_text_to_video_lora, cogvideox_text_to_video_sft, prepare_dataset
from args import parse_prepare_args, parse_training_args

def watch_joining(zero):
    join, joined = zero.flatten_dense_tensors_aligned, []
    def watched(*values, use_cpu_data=False, **more):
        joined.append(use_cpu_data)
        return join(*values, use_cpu_data=use_cpu_data, **more)
    zero.flatten_dense_tensors_aligned = watched
    return joined

def run(module, script, flags, environment):
    os.environ.update(environment)
    joined = []
    if environment:
        import deepspeed
        joined = watch_joining(deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute; gloo does the same
    sys.modules[module].main(parse_prepare_args(flags) if script is None else parse_training_args(script, flags))
    free = None
    if environment:
        free = deepspeed.accelerator.get_accelerator().available_memory()
    print(json.dumps({"deepspeed": "deepspeed" in sys.modules, "on_host": joined, "free": free}), flush=True)

for values in json.loads(sys.argv[1]):
    process = multiprocessing.get_context("fork").Process(target=run, args=values)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
"""
RAW = ["--caption_column", "prompts.txt", "--video_column", "videos.txt"]
RAW += ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "9"]


@pytest.fixture(scope="session")
def quick(tiny, sample_data, prepared_data, once):
    """(folder of the runs, what each said at its end); made once for all workers."""
    folder = once("deepspeed", lambda folder: make_quick_runs(folder, tiny("5b"), sample_data, prepared_data))
    return folder, json.loads((folder / "ends.json").read_text())


def make_quick_runs(folder, model, sample_data, prepared_data):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    launched |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    launched |= {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}

    def run(script, name, steps, *more, **environment):
        module, own = SCRIPTS[script]
        flags = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(folder / name), *FLAGS, *own]
        flags += ["--data_root", str(prepared_data), "--load_tensors", "--mixed_precision", "no"]
        return module, script, [*flags, "--max_train_steps", str(steps), *more], environment

    prepare = [
        "--model_id",
        str(model),
        "--data_root",
        str(sample_data),
        "--output_dir",
        str(folder / "prepared"),
    ]
    without = ["--validation_prompt", "a red circle", "--num_inference_steps", "1", "--enable_model_cpu_offload"]
    runs = [
        ("prepare_dataset", None, [*prepare, *RAW, "--save_latents_and_embeddings"], {}),
        run("t2v_lora", "plain_t2v_lora", 3, *without),
        run("t2v_sft", "plain_t2v_sft", 3),
        run("t2v_lora", "t2v_lora", 3, **launched),
        run("t2v_sft", "t2v_sft", 3, **launched),
        run("t2v_lora", "stopped", 2, **launched),
        run("t2v_lora", "stopped", 3, **launched),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "training"), "DS_ACCELERATOR": "cpu"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", DRIVER, json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"deepspeed"')]
    (folder / "ends.json").write_text(json.dumps(ends))


def test_deepspeed_is_loaded_where_it_is_asked_for_alone(quick):
    """Preparing and training with validation, at which libraries might import it wherever it is installed."""
    assert importlib.util.find_spec("deepspeed")
    assert [end["deepspeed"] for end in quick[1]] == [False] * 3 + [True] * 4


def test_deepspeed_joins_the_weights_in_host_memory(quick):
    """Not on the GPU, where that takes their size a second time; also where it has room, which is asked for again after."""
    assert [end["on_host"][:1] for end in quick[1]] == [[]] * 3 + [[True]] * 4
    assert all(end["free"] > 0 for end in quick[1][3:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_updates_are_those_of_adamw(script, quick):
    """Two micro-steps an update."""
    assert_same_training(quick[0] / script, quick[0] / f"plain_{script}")


def test_a_longer_run_continues_bit_for_bit(quick):
    resumed, unbroken = quick[0] / "stopped", quick[0] / "t2v_lora"
    assert losses(resumed) == losses(unbroken) and len(losses(resumed)) == 3
    ours, theirs = weights(unbroken), weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- slow: as users launch it


@pytest.fixture
def launch(tiny, prepared_data, tmp_path):
    """Run a script by `accelerate launch`, under DeepSpeed or not; returns its folder."""

    def run(script, name, *more, deepspeed=True, num_processes=1, offload="cpu", device="cpu"):
        module, own = SCRIPTS[script]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
        command += ["--main_process_port", str(port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if device == "cpu":  # also where there is a GPU
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if deepspeed:
            command += ["--use_deepspeed", "--zero_stage", "2", "--offload_optimizer_device", offload]
        command += [str(ROOT / "training" / f"{module}.py"), "--pretrained_model_name_or_path", str(tiny("5b"))]
        command += ["--data_root", str(prepared_data), "--load_tensors", "--output_dir", str(tmp_path / name)]
        done = subprocess.run([*command, *FLAGS, *own, *more], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / name

    return run


@pytest.mark.slow  # launched: DeepSpeed reads its settings from the launcher's environment
@pytest.mark.parametrize("offload", ["cpu", "none"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_deepspeed_trains_what_is_trained_without(script, offload, launch):
    plain = launch(script, "plain", "--mixed_precision", "no", "--max_train_steps", "4", deepspeed=False)
    under = launch(script, "under", "--mixed_precision", "no", "--max_train_steps", "4", offload=offload)
    assert_same_training(under, plain)


@pytest.mark.slow  # as above
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupted_run_continues_bit_for_bit(script, launch, tmp_path):
    run = ["--mixed_precision", "bf16", "--max_train_steps", "4"]
    unbroken = launch(script, "unbroken", *run)
    assert losses(unbroken)[-1] != losses(unbroken)[0]
    shutil.copytree(unbroken, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    (tmp_path / "again" / "status.json").unlink()
    resumed = launch(script, "again", *run)
    assert losses(resumed) == losses(unbroken)
    ours, theirs = weights(unbroken), weights(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow  # as above
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_one_bad_clip_costs_its_update_alone(script, precision, launch, prepared_data, tmp_path):
    """Also in the very first update, after which a checkpoint has no state of the optimizer to hold."""
    poisoned = shutil.copytree(prepared_data, tmp_path / "poisoned")
    for path in sorted((poisoned / "video_latents").iterdir())[1:]:
        tensors = load_file(path)
        save_file({"moments": torch.full_like(tensors["moments"], 1e30)}, path)  # finite; its square is not
    run = ["--data_root", str(poisoned), "--mixed_precision", precision, "--gradient_accumulation_steps", "1"]
    run += ["--max_bad_steps", "100"]
    out = launch(script, "out", *run, "--max_train_steps", "8", "--checkpointing_steps", "1", offload="none")
    found = losses(out)
    assert found.count(None) == 7 and len(found) == 8
    assert all(torch.isfinite(tensor).all() for tensor in weights(out).values())


@pytest.mark.slow  # as above
@pytest.mark.parametrize(
    ("device", "num_processes"),
    [
        ("cpu", 1),
        pytest.param("cuda", 1, marks=pytest.mark.gpu),
        pytest.param("cuda", 2, marks=pytest.mark.multi_gpu),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_deepspeed_lowers_the_loss_on_fixed_noise(script, device, num_processes, launch, prepared_data):
    """With clipping, accumulation and a cosine schedule; the script itself compares its result with what it trained."""
    run = ["--mixed_precision", "bf16", "--max_train_steps", "20", "--gradient_accumulation_steps", "3"]
    run += ["--lr_scheduler", "cosine", "--max_grad_norm", "0.05", "--learning_rate", "3e-3"]
    run += ["--validation_data_root", str(prepared_data)]
    out = launch(script, "out", *run, device=device, num_processes=num_processes)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["loss"] for row in rows if row.get("event") == "held_out_loss"]
    learning_rates = [row["lr"] for row in rows if "event" not in row]
    assert held_out[-1] < 0.95 * held_out[0]
    assert learning_rates[-1] < 0.05 * learning_rates[0] and any(row.get("grad_norm", 0) > 0.05 for row in rows)
