"""What only a CUDA device can show: its precisions, its scaler, and that it trains what the CPU trains."""

import gc
import hashlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import prepare_dataset
from args import parse_prepare_args, parse_training_args
from engine.lora_file import WEIGHTS_NAME
from engine.master_weights import HostMasters, Masters
from engine.state_ring import StateRing
from engine.update import average_gradients
from memory.host import HostCopy, to_device
from random_dataset import write_dataset
from run import checkpoints
from run.checkpoints import write_checkpoint
from script_runs import make_loss_nan
from test_optimizers import COMBINATIONS, PLAIN, PROVENANCE, ROWS, grid_loss, make_state, masters_of, states_of
from test_optimizers import train as train_tiny
from test_scripts import DROPOUTS, STEPS_THAT_COUNT, between_logs
from test_update import five_updates


pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
KINDS = {"t2v_lora": "5b", "t2v_sft": "2b", "i2v_lora": "1.5-5b-i2v", "i2v_sft": "5b-i2v"}
RAW = ["--caption_column", "prompts.txt", "--video_column", "videos.txt", "--height_buckets", "64"]
RAW += ["--width_buckets", "96", "--frame_buckets", "9"]
MODULES = {"t2v": "cogvideox_text_to_video", "i2v": "cogvideox_image_to_video"}


@pytest.fixture
def train(tiny, sample_data, tmp_path):
    """Run a script for a few steps on random latents, or on the sample clips; returns its losses."""
    write_dataset(tmp_path / "data", num_clips=4, frames=9, height=64, width=96, text_shape=(226, 32))

    def run(script, *flags, kind=None, name="out", raw=False):
        task, form = script.split("_")
        argv = ["--pretrained_model_name_or_path", str(tiny(kind or KINDS[script])), "--output_dir"]
        argv += [str(tmp_path / name), *(RAW if raw else ["--load_tensors"])]
        argv += ["--data_root", str(sample_data if raw else tmp_path / "data")]
        argv += [
            "--train_batch_size",
            "2",
            "--max_train_steps",
            "6",
            "--learning_rate",
            "1e-3",
            "--optimizer",
            "adamw",
        ]
        argv += ["--lr_warmup_steps", "0", "--seed", "0", *flags]
        importlib.import_module(f"{MODULES[task]}_{form}").main(parse_training_args(script, argv))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "event" not in row]

    return run


@pytest.mark.parametrize("script", KINDS)
def test_every_script_trains_in_bf16_near_fp32(script, train):
    """Draws do not depend on the device or precision, so that the losses of two runs can be compared step by step."""
    exact = train(script, "--mixed_precision", "no", name="fp32")
    rounded = train(script, "--mixed_precision", "bf16", "--gradient_checkpointing", "--pin_memory", name="bf16")
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_the_gpu_trains_what_the_cpu_trains(train, monkeypatch):
    on_gpu = train("t2v_lora", "--mixed_precision", "no", name="gpu")
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first run's device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu == pytest.approx(train("t2v_lora", "--mixed_precision", "no", name="cpu"), rel=1e-4)


def test_fp16_scales_its_gradients_and_keeps_fp32_adapters(train, tmp_path):
    from safetensors.torch import load_file

    exact = train("t2v_lora", "--mixed_precision", "no", kind="2b", name="fp32")
    scaled = train("t2v_lora", "--mixed_precision", "fp16", "--checkpointing_steps", "6", kind="2b", name="fp16")
    assert scaled == pytest.approx(exact, rel=0.02)
    state = json.loads((tmp_path / "fp16" / "checkpoint-6" / "state.json").read_text())
    assert state["scaler"]["scale"] > 1
    weights = load_file(tmp_path / "fp16" / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


def test_full_fine_tuning_that_cannot_fit_is_refused():
    from base.errors import UsageError
    from run.levels import check_sft_fits

    args = parse_training_args("t2v_sft", ["--pretrained_model_name_or_path", "m", "--data_root", "d"])
    with pytest.raises(UsageError, match="needs .* GiB for fp32 weights"):
        check_sft_fits(args, 1e12, torch.bfloat16, torch.device("cuda"))


# ---------------------------------------------------------------- the host runs ahead


class Unsynchronised:
    """torch raises where the host would wait for the GPU."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "level",
    [[], ["--gradient_checkpointing"], ["--memory", "balanced"], ["--memory", "stream", "--no_compile_blocks"]],
    ids=["", "checkpointing", "balanced", "stream"],
)
@pytest.mark.parametrize("raw", [False, True], ids=["latents", "raw"])
@pytest.mark.parametrize("script", KINDS)
def test_no_step_between_logs_waits_for_the_gpu(script, raw, level, train, monkeypatch):
    """Five updates, whole: data, copies, draws, forward, backward, update, and what follows it."""
    task, form = script.split("_")
    if form == "sft" and "stream" in level:
        pytest.skip("streams frozen weights alone")
    guard = Unsynchronised()
    calls = between_logs(monkeypatch, guard)
    flags = [*STEPS_THAT_COUNT, *DROPOUTS, "--stratified_timesteps", *level]
    flags += ["--noised_image_dropout", "0.5"] if task == "i2v" else []
    try:
        train(script, *flags, *(["--pin_memory"] if raw else []), "--mixed_precision", "bf16", raw=raw)
    finally:
        guard.__exit__()
    assert len(calls) == 7


def test_the_guard_sees_copies_that_wait():
    with Unsynchronised():
        pageable = torch.ones(1000)
        copied = to_device({"x": pageable, "prompt": ["a"]}, CUDA)
        for waiting in (lambda: pageable.to(CUDA), lambda: copied["x"].sum().item(), lambda: copied["x"].cpu()):
            with pytest.raises(RuntimeError, match="synchroniz"):
                waiting()
    assert copied["x"].device == CUDA and torch.equal(copied["x"].cpu(), pageable) and copied["prompt"] == ["a"]


@pytest.mark.parametrize("bad", [(1,), (2, 3), ()])
@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_what_is_skipped_on_the_gpu_is_as_if_decided_on_the_host(optimizer_class, bad, monkeypatch):
    assert five_updates(optimizer_class, bad, CUDA, True, monkeypatch) == five_updates(
        optimizer_class, bad, CUDA, False, monkeypatch
    )


def test_a_bad_update_of_a_script_is_skipped_on_the_gpu(train, tmp_path, monkeypatch, caplog):
    """Found at the next transfer; the checkpoint before it and that of it hold the same weights."""
    make_loss_nan(monkeypatch, lambda call: call == 3)
    losses = train("t2v_lora", "--mixed_precision", "bf16", "--checkpointing_steps", "1", "--log_every", "4")
    assert [loss is None for loss in losses] == [False, False, True, False, False, False]
    assert [line for line in caplog.messages if line.startswith("step 3 skipped, gradient norm nan")]
    names = [tmp_path / "out" / f"checkpoint-{step}" / WEIGHTS_NAME for step in (2, 3, 4)]
    before, same, after = (name.read_bytes() for name in names)
    assert before == same != after


def test_an_updates_seconds_are_the_gpus(train, tmp_path):
    """Though the host is through with an update long before: measured by events, without checkpoints and validation."""
    began = time.perf_counter()
    train("t2v_lora", "--mixed_precision", "bf16", "--checkpointing_steps", "2", "--log_every", "100")
    whole = time.perf_counter() - began
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "event" not in row]
    for row in updates:
        assert 0 < row["copy_seconds"] < row["seconds"] and row["data_seconds"] >= 0
    assert sum(row["seconds"] for row in updates) < whole
    [start] = [row for row in rows if row.get("event") == "start"]
    assert {"imports", "loading", "first update"} <= start["parts"].keys()
    assert start["parts"]["first update"] == pytest.approx(updates[0]["seconds"], rel=0.5, abs=0.3)


# ---------------------------------------------------------------- optimizers, and masters in host memory


@pytest.mark.parametrize(("row", "place"), COMBINATIONS)
def test_every_optimizer_trains_and_resumes_on_the_gpu(row, place, tmp_path):
    """As on the CPU: clipping, accumulation 3, a cosine schedule; low-bit states; four updates are two and two."""
    if row.endswith("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs Ada or newer")
    state = make_state(row, place, torch.bfloat16, CUDA)
    engine = state.engine
    with torch.no_grad():
        before = grid_loss(engine.transformer)
    first = train_tiny(state, 0, 2)
    path = write_checkpoint(tmp_path, 2, state, PROVENANCE)
    unbroken = train_tiny(state, 2, 4)

    other = make_state(row, place, torch.bfloat16, CUDA)
    checkpoints.load(path, other, PROVENANCE)
    assert train_tiny(other, 2, 4) == unbroken
    assert all(map(torch.equal, masters_of(engine), masters_of(other.engine)))

    updates = train_tiny(state, 4, ROWS[row].num_steps)
    assert updates[-1].lr < 0.01 * ROWS[row].learning_rate
    assert any(made.grad_norm > 0.5 for made in first)
    with torch.no_grad():
        assert grid_loss(engine.transformer) < 0.9 * before
    assert states_of(state.optimizer) == {ROWS[row].state}
    on_gpu = place == "device" or isinstance(engine.masters, StateRing)
    assert {param.device.type for param in engine.params} == {"cuda" if on_gpu else "cpu"}
    assert {param.device.type for param in engine.transformer.parameters()} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", PLAIN)
def test_masters_in_host_memory_train_what_those_on_the_gpu_train(row, dtype):
    """Two kernels of one optimizer round differently; when gradients travel changes nothing at all."""
    ends, losses = [], []
    for place in ("device", "host", "host, gradients too"):
        state = make_state(row, place, dtype, CUDA)
        start = flat_masters(state)
        updates = train_tiny(state, 0, 10)
        ends.append(flat_masters(state))
        losses.append([float(made.grad_norm) for made in updates])
    on_gpu, on_host, gradients_too = ends
    assert torch.equal(on_host, gradients_too) and losses[1] == losses[2]
    assert (on_gpu - on_host).norm() < 0.05 * (on_gpu - start).norm()
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def flat_masters(state):
    return torch.cat([weight.cpu().flatten() for weight in masters_of(state.engine)])


def test_masters_in_host_memory_are_page_locked():
    engine = make_state("came", "host", torch.bfloat16, CUDA).engine
    assert all(param.is_pinned() for param in engine.params)
    assert all(grad.is_pinned() for grad in engine.masters.host_grads)


def peak_bytes_per_weight(make_masters):
    """Of an update of 64 bf16 layers with 2**20 weights each, activations included."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(64)]
    model = torch.nn.Sequential(*layers)
    masters = make_masters(list(model.parameters()))
    model.to(CUDA, torch.bfloat16)
    inputs = torch.randn(8, 1024, device=CUDA, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        model(inputs).float().square().mean().backward()
    masters.gradients()
    masters.deliver_gradients()
    assert all(master.grad is not None for master in masters.params)
    return (torch.cuda.max_memory_allocated() - before) / (64 * 2**20)


def test_what_lies_on_the_gpu():
    """Weights 2 bytes, fp32 gradients 4, fp32 masters 4; with gradients on the host a few on their way."""
    offloaded = peak_bytes_per_weight(lambda copies: HostMasters(copies, CUDA, torch.bfloat16, True))
    fetched = peak_bytes_per_weight(lambda copies: HostMasters(copies, CUDA, torch.bfloat16))
    on_gpu = peak_bytes_per_weight(lambda copies: Masters(copies, CUDA))
    assert 2 <= offloaded < 3 < 6 <= fetched < 7 < 10 <= on_gpu < 11


@pytest.mark.parametrize("script", ["t2v_lora", "t2v_sft"])
@pytest.mark.parametrize("more", [[], ["--offload_gradients"]], ids=["", "gradients"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_scripts_train_with_masters_in_host_memory(script, more, precision, train):
    """fp16 scales gradients on the GPU and unscales them on the host."""
    flags = ["--mixed_precision", precision, "--gradient_accumulation_steps", "2"]
    on_gpu = train(script, *flags, kind="2b", name="gpu")
    on_host = train(script, *flags, "--use_cpu_offload_optimizer", *more, kind="2b", name="host")
    assert on_host == pytest.approx(on_gpu, rel=0.02)


def test_full_fine_tuning_resumes_from_host_masters_and_their_average(train, tmp_path):
    from safetensors.torch import load_file

    flags = ["--mixed_precision", "bf16", "--use_cpu_offload_optimizer", "--offload_gradients", "--ema"]
    train("t2v_sft", *flags, "--checkpointing_steps", "3", name="out")
    saved = [tmp_path / "out" / f"checkpoint-{step}" / "ema.safetensors" for step in (3, 6)]
    start, unbroken = (flat(load_file(path)) for path in saved)
    train("t2v_sft", *flags, "--resume_from_checkpoint", "checkpoint-3", "--checkpointing_steps", "6", name="out")
    # Not bit for bit: backward kernels of the GPU add in an order of their own
    assert (flat(load_file(saved[1])) - unbroken).norm() < 0.1 * (unbroken - start).norm()


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_dora_trains_in_bf16_near_fp32(train):
    flags = ["--use_dora", "--use_rslora", "--lora_target_modules", "to_q", "ff.net.0.proj"]
    exact = train("t2v_lora", *flags, "--mixed_precision", "no", name="fp32")
    rounded = train("t2v_lora", *flags, "--mixed_precision", "bf16", "--gradient_checkpointing", name="bf16")
    assert rounded == pytest.approx(exact, rel=0.02)


def average_on_rank(rank, port):
    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=2)
    grads = [torch.full((1000,), float(rank + n)).pin_memory() for n in range(3)]
    on_gpu = torch.full((10,), float(rank), device="cuda")
    average_gradients(grads)
    average_gradients([on_gpu])
    for n, grad in enumerate(grads):
        assert torch.equal(grad, torch.full((1000,), n + 0.5))
    assert torch.equal(on_gpu, torch.full_like(on_gpu, 0.5))
    torch.distributed.destroy_process_group()


@pytest.mark.multi_gpu
def test_nccl_averages_gradients_in_host_memory():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(average_on_rank, (port,), nprocs=2)


OFFLOADS = {"resident": [], "offloaded": ["--enable_model_cpu_offload", "--enable_tiling", "--enable_slicing"]}


@pytest.mark.parametrize("script", ["t2v_lora", "i2v_lora", "t2v_sft", "i2v_sft"])
def test_validation_leaves_the_models_where_they_were(script, train, tmp_path, monkeypatch):
    """The transformer back on the GPU, its parameters the same objects, the VAE on the CPU; and training goes on alike."""
    from run import validation

    seen, validate = [], validation.validate

    def watched(args, run, meter, engine, samples, *rest):
        params = list(engine.transformer.parameters())
        validate(args, run, meter, engine, samples, *rest)
        assert all(a is b for a, b in zip(params, engine.transformer.parameters(), strict=True))
        assert not [part for part in engine.transformer.modules() if hasattr(part, "_hf_hook")]
        vae = samples.make_pipeline(engine.transformer).vae
        seen.append(({param.device.type for param in params}, vae.device.type))

    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "first.png")
    flags = ["--validation_prompt", "a red square", "--validation_steps", "2", "--num_inference_steps", "2"]
    flags += ["--validation_images", str(tmp_path / "first.png")] if script.startswith("i2v") else []
    plain = train(script, "--mixed_precision", "bf16", name="plain")
    monkeypatch.setattr(validation, "validate", watched)
    for name, offload in OFFLOADS.items():
        assert train(script, "--mixed_precision", "bf16", *flags, *offload, name=name) == pytest.approx(
            plain, rel=1e-3
        )
        videos = sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*.mp4"))
        assert videos == [f"samples/step_{step}/0_0.mp4" for step in (0, 2, 4, 6)]
    assert seen == [({"cuda"}, "cpu")] * 8
    rows = [json.loads(line) for line in (tmp_path / "offloaded" / "metrics.jsonl").read_text().splitlines()]
    assert all(
        row["peak_reserved_gib"] >= row["peak_allocated_gib"] > 0 for row in rows if row.get("event") == "memory"
    )


def test_validation_videos_do_not_depend_on_the_offload(train, tmp_path):
    flags = ["--validation_prompt", "a red square", "--num_inference_steps", "2", "--mixed_precision", "no"]
    for name, offload in (("resident", []), ("offloaded", ["--enable_model_cpu_offload"])):
        train("t2v_lora", *flags, *offload, name=name)
    first, second = ((tmp_path / name / "samples/step_0/0_0.mp4").read_bytes() for name in ("resident", "offloaded"))
    assert first == second


# ---------------------------------------------------------------- preparing

PREPARE = Path(prepare_dataset.__file__)
ON_ITS_OWN_GPU = """
import os, runpy, sys, torch
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    used = [number for number in range(torch.cuda.device_count()) if torch.cuda.max_memory_allocated(number)]
    assert used == [int(os.environ["LOCAL_RANK"])], used
"""


def prepare_argv(model, data, out, *flags):
    argv = ["--model_id", str(model), "--data_root", str(data), "--output_dir", str(out), *RAW, "--target_fps", "8"]
    return [*argv, "--save_latents_and_embeddings", "--save_image_latents", "--num_image_variants", "2", *flags]


def hashes(out):
    paths = [path for path in out.rglob("*") if path.is_file() and path.name not in ("status.json", ".lock")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_processes_prepare_the_files_of_one_each_on_its_own_gpu(dtype, tiny, sample_data, tmp_path):
    (tmp_path / "on_its_own_gpu.py").write_text(ON_ITS_OWN_GPU)
    script = [str(tmp_path / "on_its_own_gpu.py"), str(PREPARE)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
    search = os.pathsep.join([str(PREPARE.parent), os.environ.get("PYTHONPATH", "")])
    for name, command, ranks in (("two", launch, {}), ("one", [sys.executable, *script], {"LOCAL_RANK": "0"})):
        argv = prepare_argv(tiny("5b"), sample_data, tmp_path / name, "--dtype", dtype)
        environment = os.environ | {"PYTHONPATH": search} | ranks
        done = subprocess.run([*command, *argv], env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
    assert len(hashes(tmp_path / "one")) > 15 and hashes(tmp_path / "two") == hashes(tmp_path / "one")


def test_encoding_clips_never_waits_for_the_gpu(tiny, sample_data, tmp_path, monkeypatch):
    """So the next clip is queued while the GPU is at this one; writers wait for their own copy alone."""
    make_moments, copies = prepare_dataset.make_moments, []

    def guarded(*values):
        if not copies:  # what is compiled and chosen in the first call
            list(make_moments(*values))
        with Unsynchronised():
            made = list(make_moments(*values))
        copies.extend(made)
        return made

    monkeypatch.setattr(prepare_dataset, "make_moments", guarded)
    argv = prepare_argv(tiny("5b"), sample_data, tmp_path / "out", "--dtype", "bf16", "--pin_memory")
    prepare_dataset.main(parse_prepare_args(argv))
    assert copies and all(copied.copy.is_pinned() for _, copied, _ in copies)
    rows = [json.loads(line) for line in (tmp_path / "out/data.jsonl").read_text().splitlines()]
    assert len(rows) == len({item["index"] for *_, item in copies})


def test_a_copy_to_the_host_is_whole_when_it_was_waited_for():
    """Behind a second of other work, asked for in another thread."""
    with ThreadPoolExecutor(4) as pool:
        expected = torch.arange(2**20, dtype=torch.float32)
        waits = []
        for number in range(8):
            torch.cuda._sleep(10**8)
            waits.append(pool.submit(HostCopy(expected.to(CUDA, non_blocking=True) + number).wait))
        for number, waited in enumerate(waits):
            assert torch.equal(waited.result(), expected + number)
