"""What only a CUDA device can show: its precisions, its scaler, and that it trains what the CPU trains."""

import importlib
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from args import parse_training_args
from lora import WEIGHTS_NAME
from random_dataset import write_dataset


pytestmark = pytest.mark.gpu
KINDS = {"t2v_lora": "5b", "t2v_sft": "2b", "i2v_lora": "1.5-5b-i2v", "i2v_sft": "5b-i2v"}
MODULES = {"t2v": "cogvideox_text_to_video", "i2v": "cogvideox_image_to_video"}


@pytest.fixture
def train(tiny, tmp_path):
    """Run a script for a few steps on random latents; returns its losses."""
    write_dataset(tmp_path / "data", num_clips=4, frames=9, height=64, width=96, text_shape=(226, 32))

    def run(script, *flags, kind=None, name="out"):
        task, form = script.split("_")
        argv = ["--pretrained_model_name_or_path", str(tiny(kind or KINDS[script]))]
        argv += ["--data_root", str(tmp_path / "data"), "--load_tensors", "--output_dir", str(tmp_path / name)]
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
    from engine import check_sft_fits
    from errors import UsageError

    with pytest.raises(UsageError, match="needs .* GiB for fp32 weights"):
        check_sft_fits(1e12, torch.bfloat16, torch.device("cuda"))


OFFLOADS = {"resident": [], "offloaded": ["--enable_model_cpu_offload", "--enable_tiling", "--enable_slicing"]}


@pytest.mark.parametrize("script", ["t2v_lora", "i2v_lora", "t2v_sft", "i2v_sft"])
def test_validation_leaves_the_models_where_they_were(script, train, tmp_path, monkeypatch):
    """The transformer back on the GPU, its parameters the same objects, the VAE on the CPU; and training goes on alike."""
    import validation

    seen = []

    def watched(args, accelerator, meter, engine, samples, *rest):
        params = list(engine.transformer.parameters())
        validation.validate_from_args(args, accelerator, meter, engine, samples, *rest)
        assert all(a is b for a, b in zip(params, engine.transformer.parameters(), strict=True))
        assert not [part for part in engine.transformer.modules() if hasattr(part, "_hf_hook")]
        vae = samples.make_pipeline(engine.transformer).vae
        seen.append(({param.device.type for param in params}, vae.device.type))

    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "first.png")
    flags = ["--validation_prompt", "a red square", "--validation_steps", "2", "--num_inference_steps", "2"]
    flags += ["--validation_images", str(tmp_path / "first.png")] if script.startswith("i2v") else []
    plain = train(script, "--mixed_precision", "bf16", name="plain")
    task, form = script.split("_")
    monkeypatch.setattr(importlib.import_module(f"{MODULES[task]}_{form}"), "validate_from_args", watched)
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
