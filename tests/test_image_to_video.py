"""What image-to-video training does with the first frame, and what it leaves for inference to know."""

import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open

from base.errors import UsageError
from cogvideox.config import check_sizes, read_config
from cogvideox.encoding import encode_captions, encode_videos, pixels_to_unit
from cogvideox.loading import load_vae
from data.decode import read_frames
from engine import objective
from test_parity import SIZES, clips, record_training  # noqa: F401


def first_frame_channels(inputs):
    """[B, F, C, H, W] of the image's half of the transformer's input."""
    return inputs["hidden_states"].chunk(2, dim=2)[1]


@pytest.fixture
def record(monkeypatch, tiny, clips, tmp_path):  # noqa: F811
    def run(kind, *flags, size="base", num_clips=2, script="image_to_video_lora"):
        root = clips(num_clips, *SIZES[size])
        return record_training(
            monkeypatch, script, tiny(kind), root, tmp_path / "out", SIZES[size], num_clips, list(flags)
        )

    return run


def test_the_image_sits_in_the_first_frame_alone(record):
    inputs, _ = record("1.5-5b-i2v")
    channels = first_frame_channels(inputs)
    assert channels.shape[1] == 4  # three latent frames, padded to patch_size_t 2
    assert channels[:, 0].abs().max() > 0.1
    assert channels[:, 1:].abs().max() == 0


@pytest.mark.parametrize("script", ["image_to_video_lora", "image_to_video_sft"])
def test_each_sample_draws_its_own_dropouts(script, record, tiny, monkeypatch):
    """The image of the sample at position 0 is dropped, and the text of the one at position 1."""
    dropped = {"image_dropout": 0, "text_dropout": 1}

    def one_of_two(seed, name, sample_ids, device):
        return torch.tensor([0.1 if position == dropped[name] else 0.9 for position in sample_ids])

    monkeypatch.setattr(objective, "draw_uniform", one_of_two)
    inputs, _ = record("5b-i2v", "--noised_image_dropout", "0.5", "--text_dropout", "0.5", script=script)
    channels, texts = first_frame_channels(inputs), inputs["encoder_hidden_states"]
    assert channels[0].abs().max() == 0 and channels[1, 0].abs().max() > 0.1
    (empty,) = encode_captions(tiny("5b-i2v"), [""], torch.float32, torch.device("cpu"), texts.shape[1])
    assert torch.equal(texts[1], empty) and not torch.equal(texts[0], empty)


def test_raw_image_latents_are_the_vaes_own(record, tiny, tmp_path):
    inputs, draws = record("1.5-5b-i2v", "--image_latent_scale", "raw", num_clips=1)
    frame = torch.from_numpy(read_frames(tmp_path / "clips" / "0.mp4", [0.0]).copy()).permute(0, 3, 1, 2)
    moments = encode_videos(load_vae(tiny("1.5-5b-i2v"), torch.float32), pixels_to_unit(frame)[None])
    mean, logvar = moments.chunk(2, dim=1)
    expected = mean.transpose(1, 2) + (logvar.clamp(-30, 20) / 2).exp().transpose(1, 2) * draws["image_posterior"]
    torch.testing.assert_close(first_frame_channels(inputs)[:, :1], expected)
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", framework="pt") as lora:
        assert json.loads(lora.metadata()["training"]) == {"image_latent_scale": "raw"}


def test_other_sizes_than_the_learned_positions_name_the_way_out(record):
    with pytest.raises(
        UsageError, match="9 frames of 64x64; prepare it at that size or pass --drop_learned_positions"
    ):
        record("5b-i2v", size="square")


def test_other_frame_counts_are_refused_as_well(tiny):
    """diffusers would replace the learned positions by others without a word."""
    config = read_config(tiny("5b-i2v"), "transformer")
    check_sizes(config, [(9, 64, 96)])
    with pytest.raises(UsageError, match="17 frames of 64x96"):
        check_sizes(config, [(9, 64, 96), (17, 64, 96)])
    check_sizes(config, [(17, 64, 96)], drop_learned_positions=True)
    with pytest.raises(UsageError, match="has no learned positions"):
        check_sizes(read_config(tiny("1.5-5b-i2v"), "transformer"), [(17, 64, 96)], drop_learned_positions=True)


@pytest.mark.parametrize(("kind", "good", "odd"), [("5b", 17, 13), ("1.5-5b", 33, 25)])
def test_frame_counts_that_the_pipeline_does_not_give_back_are_said(tiny, caplog, kind, good, odd):
    config = read_config(tiny(kind), "transformer")
    check_sizes(config, [(good, 64, 96)])
    assert not caplog.records
    check_sizes(config, [(odd, 64, 96)])
    assert f"{odd} frames: this checkpoint was made for" in caplog.text


def test_dropped_positions_are_recorded_in_the_lora(record, tmp_path):
    record("5b-i2v", "--drop_learned_positions", size="square", num_clips=1)
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", framework="pt") as lora:
        assert json.loads(lora.metadata()["training"]) == {"drop_learned_positions": True}


def test_dropped_positions_are_kept_in_the_config_of_a_fine_tuned_model(record, tmp_path):
    record("5b-i2v", "--drop_learned_positions", size="square", num_clips=1, script="image_to_video_sft")
    loaded = CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer", dtype=torch.float32
    )
    assert loaded.config.use_learned_positional_embeddings is False
    assert not any("pos_embedding" in name for name in loaded.state_dict())


def test_a_plain_lora_carries_no_facts(record, tmp_path):
    record("5b-i2v", num_clips=1)
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", framework="pt") as lora:
        assert "training" not in lora.metadata()
