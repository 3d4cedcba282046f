"""`make real` on tiny kinds and the small pretrained model: conventions hold, the LoRA learns its clip, the report says so."""

import re

import pytest
import torch

import real_model


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["2b", "5b-i2v", "1.5-5b"])
def test_the_report_of_a_tiny_kind(tiny, tmp_path, monkeypatch, kind):
    out = tmp_path / "out"
    size = ["--size", "17", "64", "64"] if kind.startswith("1.5") else []
    flags = ["--steps", "15", "--learning_rate", "3e-3", "--num_inference_steps", "2"]
    code = real_model.main(["--model", str(tiny(kind)), "--out", str(out), *flags, *size])
    values = values_of(out / "report.md")
    assert code == 0
    assert values["difference of prompt embeddings"] < 1e-4
    assert ("difference of rotary positions" in values) == (kind != "2b")
    assert values["loss with the LoRA"] < values["loss without the LoRA"]

    # The same folder, read with a convention broken
    pipe = real_model.load_pipeline(real_model.inference_args(["--prompt", "a", "--model_path", str(tiny(kind))]))
    batch = real_model.read_prepared(out / "prepared")
    batch["prompt_embeds"] = torch.roll(batch["prompt_embeds"], 1, dims=1)
    frames, height, width = real_model.base_size(pipe.transformer.config) if not size else (17, 64, 64)
    options = {"num_frames": frames, "height": height, "width": width}
    if "image_moments" in batch:
        options["image"] = real_model.Image.new("RGB", (width, height), "red")
    found = real_model.differences(pipe, batch, real_model.load_vae_config(tiny(kind)), options)
    assert found["prompt embeddings"] > real_model.MAX_DIFFERENCES["prompt embeddings"]


@pytest.mark.parametrize("name", ["tiny-cogvideox", "tiny-cogvideox-i2v"])
def test_a_pretrained_model_knows_its_inputs_and_learns_the_clip(tmp_path, name):
    """What random weights cannot say: its loss is low before training, and a sample comes closer to the clip."""
    out, model = tmp_path / "out", real_model.ROOT / "assets" / name
    flags = ["--steps", "80", "--learning_rate", "1e-3", "--num_inference_steps", "10"]
    assert real_model.main(["--model", str(model), "--out", str(out), *flags]) == 0
    values = values_of(out / "report.md")
    assert values["loss without the LoRA"] < 0.5
    assert values["loss with the LoRA"] < 0.5 * values["loss without the LoRA"]
    assert values["PSNR of a sample with the LoRA, dB"] > values["PSNR of a sample without the LoRA, dB"] + 3


def values_of(report):
    pairs = re.findall(r"^\| ([^|\d]+) \| (-?[\d.]+) \|$", report.read_text(), re.M)
    return {name.strip(): float(value) for name, value in pairs}
