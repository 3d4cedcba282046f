import errno
import gc
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from PIL import Image
from safetensors.torch import load_file

import prepare_dataset
from args import parse_prepare_args
from base import bars, tensor_file
from base.errors import DataError, UsageError
from base.hashes import HashCache
from cogvideox import encoding
from data import artifacts, decode
from data.buckets import Bucket, frame_times, make_buckets
from data.clip_lists import read_clips
from data.decode import read_frames
from data.latents import LatentDataset
from data.layouts import read_text_rows
from data.videos import VideoDataset, VideoDatasetWithResizeAndRectangleCrop
from engine.objective import draw_generator
from run import exits
from run.exits import run_script
from script_runs import run_ranks
from synthetic_clips import draw_case, probe, write_case, write_clip
from tiny_pipeline import make_tiny_pipeline


SCRIPT = Path(prepare_dataset.__file__)
BUCKET = ["--height_buckets", "32", "--width_buckets", "48", "--frame_buckets", "5"]
LATENTS = ["--save_latents_and_embeddings"]
EVERYTHING = [*LATENTS, "--save_image_latents", "--num_image_variants", "2", "--save_previews"]
CAPTIONS = ["A red circle rises.", "A blue square falls.", "A white cat walks."]
PIXELS, EMBEDS = {"video_latents", "image_latents", "videos", "images"}, {"prompt_embeds"}
LISTS = {"data.jsonl", "prompts.txt", "videos.txt"}


# ---------------------------------------------------------------- helpers


def arguments(model, data, out, *flags):
    lists = [] if "--dataset_file" in flags else ["--caption_column", "prompts.txt", "--video_column", "videos.txt"]
    buckets = [] if "--frame_buckets" in flags else BUCKET
    return ["--model_id", str(model), "--data_root", str(data), "--output_dir", str(out), *buckets, *lists, *flags]


def write_lists(data, captions, videos):
    (data / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions))
    (data / "videos.txt").write_text("".join(f"{video}\n" for video in videos))


def rows_of(out):
    return [json.loads(line) for line in (out / "data.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def files_of(out):
    return sorted(path for path in out.rglob("*") if path.is_file() and path.name not in ("status.json", ".lock"))


def contents(out):
    """Everything written, byte for byte."""
    return {str(path.relative_to(out)): path.read_bytes() for path in files_of(out)}


def stamps(out):
    """What changes when a file is written again, if with the same content."""
    return {str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files_of(out)}


def rewritten(out, before):
    """The files made or made again since `before`, without the lists, which every run writes."""
    return {path for path, stamp in stamps(out).items() if before.get(path) != stamp} - LISTS


def folders(paths):
    return {path.split("/")[0] for path in paths}


def damage(path):
    """Overwrite most of the pictures and leave header and index whole: only decoding can tell."""
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 100, data.index(b"moov") - 50
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def refusal(capsys, args):
    """(exit code, last line on stderr) of a run that ends with an error."""
    with pytest.raises(SystemExit) as left:
        exits.run_script(lambda: prepare_dataset.main(args), args.output_dir)
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return left.value.code, stderr.splitlines()[-1]


def in_child(function, log=None):
    """Run in a forked process, which has everything imported; returns it. Its stderr goes to `log`."""

    def run():
        with open(log or os.devnull, "w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            torch.set_num_threads(1)  # makes torch's pool anew: threads that do so at once get "Invalid thread pool"
            function()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def wait_for(child):
    child.join(60)
    assert child.exitcode is not None, "hangs"
    return child.exitcode


@pytest.fixture(scope="session")
def three_clips(once):
    """Three clips of 32x48 with captions: 5 frames, 5 frames, and 12, of which a drawn part is used."""

    def build(data):
        names = ["a.mp4", "b.mp4", "c.mp4"]
        for seed, (name, num_frames) in enumerate(zip(names, (5, 5, 12), strict=True)):
            write_clip(data / name, num_frames, 32, 48, seed=seed)
        write_lists(data, CAPTIONS, names)

    return once("three-clips", build)


@pytest.fixture
def data(three_clips, tmp_path):
    """A copy of the three clips that a test may change."""
    return shutil.copytree(three_clips, tmp_path / "data")


@pytest.fixture
def prepare(tiny, data, tmp_path):
    """Prepare the three clips, or with flags something else, in `out`; returns the folder."""

    def run(*flags, out="out", model=None):
        prepare_dataset.main(parse_prepare_args(arguments(model or tiny("5b"), data, tmp_path / out, *flags)))
        return tmp_path / out

    return run


@pytest.fixture(scope="session")
def prepared_once(once, tiny, three_clips):
    build = lambda out: prepare_dataset.main(parse_prepare_args(arguments(tiny("5b"), three_clips, out, *EVERYTHING)))  # noqa: E731
    return once("three-clips-prepared", build)


@pytest.fixture
def prepared(prepared_once, tmp_path):
    """The three clips prepared with EVERYTHING, as `prepare(*EVERYTHING)` leaves them in `out`."""
    return shutil.copytree(prepared_once, tmp_path / "out")


@pytest.fixture
def info(caplog):
    caplog.set_level("INFO")
    return caplog


def stems(out):
    return [Path(row["video_latent"] or row["video"]).stem for row in rows_of(out)]


# ---------------------------------------------------------------- what is written


def stock_moments(model, pixels):
    """Moments [2C, F, H, W] of uint8 pixels [F', 3, h, w] by diffusers alone."""
    vae = AutoencoderKLCogVideoX.from_pretrained(model, subfolder="vae", dtype=torch.float32)
    with torch.no_grad():
        return vae.encode((pixels.float() / 127.5 - 1.0).movedim(1, 0)[None]).latent_dist.parameters[0]


def test_moments_equal_the_stock_vae(tiny, sample_data, tmp_path):
    """Clips of a bucket's own size from their first frame on: read without any code of data/videos.py."""
    flags = ["--height_buckets", "64", "--width_buckets", "64", "96", "--frame_buckets", "9", "13", "17", *LATENTS]
    prepare_dataset.main(parse_prepare_args(arguments(tiny("5b"), sample_data, tmp_path, *flags)))
    sizes = {tuple(row["metadata"][name] for name in ("num_frames", "height", "width")) for row in rows_of(tmp_path)}
    assert sizes == {(9, 64, 96), (13, 64, 96), (17, 64, 96), (9, 64, 64), (17, 64, 64)}
    for row in rows_of(tmp_path)[:5]:
        times = frame_times(row["metadata"]["num_frames"], 8, 0.0)
        frames = read_frames(sample_data / row["video"], times)
        expected = stock_moments(tiny("5b"), torch.from_numpy(frames).permute(0, 3, 1, 2))
        assert torch.equal(load_file(tmp_path / row["video_latent"])["moments"], expected)


def equal_to_stock(model, data, out, fps, flip=None):
    """True for each clip of `out` whose moments are the stock VAE's for the frames that data/videos.py cuts in epoch 0."""
    clips = read_clips(data, None, "prompts.txt", "videos.txt")
    bucket = Bucket(*(rows_of(out)[0]["metadata"][name] for name in ("num_frames", "height", "width")))
    videos = VideoDatasetWithResizeAndRectangleCrop(clips, [bucket], fps=fps, seed=42, random_flip=flip)
    pairs = zip(rows_of(out), range(len(clips)), strict=True)
    stored = [(load_file(out / row["video_latent"])["moments"], videos[index]["pixels"]) for row, index in pairs]
    return [torch.equal(moments, stock_moments(model, pixels)) for moments, pixels in stored]


def test_moments_of_resized_flipped_and_drawn_parts_equal_the_stock_vae(prepare, tiny, data):
    flags = ["--height_buckets", "32", "--width_buckets", "32", "--frame_buckets", "5", "--random_flip", "0.5"]
    assert equal_to_stock(tiny("2b"), data, prepare(*flags, *LATENTS, model=tiny("2b")), 8, 0.5) == [True] * 3


def test_the_real_clips_equal_the_stock_vae(tiny, real_clips, tmp_path):
    flags = ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "9", *LATENTS]
    prepare_dataset.main(parse_prepare_args(arguments(tiny("5b"), real_clips, tmp_path, *flags)))
    assert equal_to_stock(tiny("5b"), real_clips, tmp_path, 8) == [True] * 6


@pytest.mark.parametrize("id_token", [None, "TOK"])
def test_embeddings_equal_the_stock_pipeline(prepare, tiny, id_token):
    out = prepare(*LATENTS, *(["--id_token", id_token] if id_token else []))
    pipeline = CogVideoXPipeline.from_pretrained(tiny("5b"), dtype=torch.float32)
    prompts = {
        row["prompt_embed"]: f"{id_token} {row['prompt']}" if id_token else row["prompt"] for row in rows_of(out)
    }
    for path, prompt in {**prompts, "prompt_embeds/_empty.safetensors": ""}.items():
        with torch.no_grad():
            expected = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0]
        assert torch.equal(load_file(out / path)["prompt_embeds"], expected), prompt
    assert [row["prompt"] for row in rows_of(out)] == CAPTIONS
    assert {row["metadata"]["id_token"] for row in rows_of(out)} == {id_token}


def test_image_latents_are_noised_before_the_vae(prepared, tiny, data):
    """Drawn here again: log sigma from N(-3, 0.5), the noise in pixels, one draw per clip and variant."""
    clip = VideoDataset(read_clips(data, None, "prompts.txt", "videos.txt"), [Bucket(5, 32, 48)], fps=8, seed=42)
    seen = []
    for index, (row, stem) in enumerate(zip(rows_of(prepared), stems(prepared), strict=True)):
        stored = load_file(prepared / row["image_latent"])["moments"]
        assert stored.shape == (2, 32, 1, 4, 6)
        generator = draw_generator(42, f"image_noise/{stem}")
        sigma = (torch.randn(2, generator=generator) * 0.5 - 3).exp()
        frame = clip[index]["pixels"][0]
        for variant, moments in enumerate(stored):
            noise = torch.randn(frame.shape, generator=generator) * sigma[variant]
            noisy = (frame / 127.5 - 1.0 + noise + 1.0) * 127.5  # undone by stock_moments, up to rounding
            assert torch.allclose(moments, stock_moments(tiny("5b"), noisy[None]), atol=1e-4)
            assert not torch.allclose(moments, stock_moments(tiny("5b"), frame[None]), atol=1e-2)
        seen += list(stored)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_eight_image_variants_by_default(prepare):
    out = prepare(*LATENTS, "--save_image_latents")
    assert {len(load_file(out / row["image_latent"])["moments"]) for row in rows_of(out)} == {8}


def test_the_manifest(prepared, data):
    stem = stems(prepared)[1]
    assert rows_of(prepared)[1] == {
        "prompt": "A blue square falls.",
        "prompt_embed": f"prompt_embeds/{stem}.safetensors",
        "image": f"images/{stem}.png",
        "image_latent": f"image_latents/{stem}.safetensors",
        "video": f"videos/{stem}.mp4",
        "video_latent": f"video_latents/{stem}.safetensors",
        "metadata": {
            "num_frames": 5, "height": 32, "width": 48, "fps": 8, "source": "b.mp4", "id_token": None,
            "scaling_factor": 0.7,
        },
    }  # fmt: skip
    named = {row[name] for row in rows_of(prepared) for name in row if name not in ("prompt", "metadata")}
    assert {*named, "prompt_embeds/_empty.safetensors", *LISTS} == set(contents(prepared))
    assert [row["metadata"]["source"] for row in rows_of(prepared)] == ["a.mp4", "b.mp4", "c.mp4"]


def test_without_previews_the_manifest_names_the_source(prepare):
    out = prepare(*LATENTS)
    assert [row["video"] for row in rows_of(out)] == ["a.mp4", "b.mp4", "c.mp4"]
    assert {(row["image"], row["image_latent"]) for row in rows_of(out)} == {(None, None)}
    assert folders(contents(out)) == {"video_latents", "prompt_embeds", *LISTS}


def test_captions_are_kept_as_written(prepare, data):
    captions = ['He said "go", twice', "one\ntwo\r\nthree\rfour, five", "  caf\u00e9 \u2028 \U0001f600\tNA\u0085 "]
    table = ["video,caption"] + [
        f'{video}.mp4,"{caption}"'
        for video, caption in zip("abc", [caption.replace('"', '""') for caption in captions], strict=True)
    ]
    (data / "metadata.csv").write_bytes("\n".join(table).encode())
    flags = ["--dataset_file", str(data / "metadata.csv"), "--caption_column", "caption"]
    out = prepare(*flags)
    assert [row["prompt"] for row in rows_of(out)] == captions
    rows = read_text_rows(out, "prompts.txt", "videos.txt")
    assert [row.prompt for row in rows] == [captions[0], "one two three four, five", captions[2]]
    assert [row.source for row in rows] == [row["video"] for row in rows_of(out)]


def test_one_video_with_two_captions_is_two_clips(prepare, data):
    write_lists(data, ["A cat.", "A dog.", "A cat."], ["a.mp4", "a.mp4", "b.mp4"])
    out = prepare(*LATENTS)
    first, second, third = [load_file(out / row["prompt_embed"])["prompt_embeds"] for row in rows_of(out)]
    assert torch.equal(first, third) and not torch.equal(first, second)
    moments = [load_file(out / row["video_latent"])["moments"] for row in rows_of(out)]
    assert len(set(stems(out))) == 3 and torch.equal(moments[0], moments[1])


def test_latent_dataset_reads_the_folder_back(prepared):
    latents = LatentDataset(prepared, text_dropout=True, buckets=make_buckets([5], [32], [48]))
    latents.require_image_latents()
    assert latents.prompts == CAPTIONS and latents.clip_buckets == [Bucket(5, 32, 48)] * 3
    for index, row in enumerate(rows_of(prepared)):
        sample = latents[index]
        assert torch.equal(sample["moments"], load_file(prepared / row["video_latent"])["moments"])
        assert torch.equal(sample["prompt_embeds"], load_file(prepared / row["prompt_embed"])["prompt_embeds"])
        assert any(
            torch.equal(sample["image_moments"], k) for k in load_file(prepared / row["image_latent"])["moments"]
        )


@pytest.mark.parametrize(("flags", "dtype"), [([], torch.float32), (["--dtype", "bf16"], torch.bfloat16)])
def test_tensors_have_the_dtype_asked_for(prepare, flags, dtype):
    out = prepare(*LATENTS, *flags)
    assert {t.dtype for path in out.rglob("*.safetensors") for t in load_file(path).values()} == {dtype}


# ---------------------------------------------------------------- previews


@pytest.fixture
def configs_only(tiny, tmp_path):
    """A model of real size without any weights, as a download for previews leaves it."""
    model = tmp_path / "model"
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny("5b") / name, model / name)
    config = json.loads((model / "transformer/config.json").read_text())
    config |= {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64, "time_embed_dim": 512}
    (model / "transformer/config.json").write_text(json.dumps(config))
    return model


def test_previews_need_no_weights_and_no_gpu(prepare, configs_only, data):
    flags = ["--height_buckets", "32", "--width_buckets", "32", "--frame_buckets", "5"]
    out = prepare(*flags, model=configs_only)
    assert folders(contents(out)) == {"videos", "images", *LISTS}
    videos = VideoDatasetWithResizeAndRectangleCrop(
        read_clips(data, None, "prompts.txt", "videos.txt"), [Bucket(5, 32, 32)], fps=8, seed=42
    )
    for index, row in enumerate(rows_of(out)):
        expected = videos[index]["pixels"].permute(0, 2, 3, 1)
        assert probe(out / row["video"]) == (5, 8.0, 32, 32)
        frames = torch.from_numpy(read_frames(out / row["video"], frame_times(5, 8, 0.0)))
        assert (frames.float() - expected.float()).abs().mean() < 4  # colour at half resolution, as videos have it
        with Image.open(out / row["image"]) as image:
            assert image.size == (32, 32) and image.tobytes() == expected[0].numpy().tobytes()
        assert row["video_latent"] is row["prompt_embed"] is row["image_latent"] is None


def test_previews_are_a_data_set_themselves(prepare, configs_only):
    out = prepare(model=configs_only)
    clips = read_clips(out, None, "prompts.txt", "videos.txt")
    assert [clip.prompt for clip in clips] == CAPTIONS
    assert len(VideoDataset(clips, [Bucket(5, 32, 48)], fps=8)) == 3


def test_latents_of_a_model_of_real_size_want_a_gpu(configs_only, tiny, data, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny("5b") / name, configs_only / name)
    with pytest.raises(UsageError, match="--allow_cpu"):
        prepare_dataset.main(parse_prepare_args(arguments(configs_only, data, tmp_path / "out", *LATENTS)))


def test_the_rate_is_the_checkpoints_unless_given(prepare, tiny, info, data, write_clip):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_clip(data / name, 20, 32, 48, fps=16)
    flags = ["--max_num_frames", "5"]
    assert {row["metadata"]["fps"] for row in rows_of(prepare(*flags, model=tiny("1.5-5b")))} == {16}
    assert "16 frames per second" in info.text
    assert {row["metadata"]["fps"] for row in rows_of(prepare(*flags))} == {8}
    info.clear()
    out = prepare(*flags, "--target_fps", "16")
    assert "this checkpoint was made for 8" in info.text
    assert {probe(out / row["video"]).fps for row in rows_of(out)} == {16.0}


# ---------------------------------------------------------------- a second run


def forbidden(*_, **__):
    raise AssertionError("not needed a second time")


def test_a_second_run_does_nothing(prepare, prepared, monkeypatch, info):
    before, texts = stamps(prepared), contents(prepared)
    for name in ("load_vae", "load_text_encoder", "tolerant_loader", "write_tensors", "write_preview"):
        monkeypatch.setattr(prepare_dataset, name, forbidden)
    assert prepare(*EVERYTHING) == prepared
    assert rewritten(prepared, before) == set() and contents(prepared) == texts
    assert "3 clips, 0 prepared now, 0 left out" in info.text


@pytest.mark.parametrize("folder", sorted(PIXELS | EMBEDS))
def test_a_missing_file_is_made_again_and_only_it(prepare, prepared, folder, info, monkeypatch):
    name = next(path for path in contents(prepared) if path.startswith(f"{folder}/b-"))
    texts = contents(prepared)
    (prepared / name).unlink()
    if folder not in ("video_latents", "image_latents"):
        monkeypatch.setattr(prepare_dataset, "load_vae", forbidden)
    if folder != "prompt_embeds":
        monkeypatch.setattr(prepare_dataset, "load_text_encoder", forbidden)
    before = stamps(prepared)
    prepare(*EVERYTHING)
    pair = {"videos", "images"} if folder in ("videos", "images") else {folder}
    assert folders(rewritten(prepared, before)) == pair and len(rewritten(prepared, before)) == len(pair)
    assert contents(prepared) == texts
    assert "3 clips, 1 prepared now" in info.text


def test_a_missing_embedding_of_the_empty_prompt_is_made_again(prepare, prepared):
    texts = contents(prepared)
    (prepared / "prompt_embeds/_empty.safetensors").unlink()
    before = stamps(prepared)
    prepare(*EVERYTHING)
    assert rewritten(prepared, before) == {"prompt_embeds/_empty.safetensors"} and contents(prepared) == texts


@pytest.mark.parametrize("folder", ["video_latents", "image_latents", "prompt_embeds", "images"])
@pytest.mark.parametrize("kept", [0.0, 0.7])
def test_a_cut_off_file_is_made_again(prepare, prepared, folder, kept, caplog):
    name = next(path for path in contents(prepared) if path.startswith(f"{folder}/a-"))
    texts = contents(prepared)
    (prepared / name).write_bytes(texts[name][: int(len(texts[name]) * kept)])
    prepare(*EVERYTHING)
    assert contents(prepared) == texts
    assert f"{name}: not readable" in caplog.text


def test_a_changed_caption_costs_its_embedding_alone(prepare, prepared, data, monkeypatch):
    write_lists(data, [CAPTIONS[0], "A green square falls.", CAPTIONS[2]], ["a.mp4", "b.mp4", "c.mp4"])
    monkeypatch.setattr(prepare_dataset, "load_vae", forbidden)
    before, old = stamps(prepared), load_file(prepared / rows_of(prepared)[1]["prompt_embed"])
    prepare(*EVERYTHING)
    row = rows_of(prepared)[1]
    assert rewritten(prepared, before) == {row["prompt_embed"]} and row["prompt"] == "A green square falls."
    assert not torch.equal(load_file(prepared / row["prompt_embed"])["prompt_embeds"], old["prompt_embeds"])


def test_a_replaced_video_costs_its_pixels_alone(prepare, prepared, data, write_clip):
    old = load_file(prepared / rows_of(prepared)[1]["video_latent"])["moments"]
    write_clip(data / "b.mp4", 5, 32, 48, seed=9)
    before = stamps(prepared)
    prepare(*EVERYTHING)
    row = rows_of(prepared)[1]
    assert rewritten(prepared, before) == {row[name] for name in ("video", "image", "video_latent", "image_latent")}
    assert not torch.equal(load_file(prepared / row["video_latent"])["moments"], old)


LATENT_FILES = {"video_latents", "image_latents"}


@pytest.mark.parametrize(
    ("flags", "touched"),
    [
        (["--dtype", "bf16"], LATENT_FILES | EMBEDS),
        (["--use_tiling"], LATENT_FILES),
        (["--num_image_variants", "3"], {"image_latents"}),
        (["--id_token", "TOK"], EMBEDS),
        (["--max_sequence_length", "64"], EMBEDS),
        (["--random_flip", "1.0"], PIXELS),
        (["--seed", "7"], PIXELS),
        (["--target_fps", "4", "--frame_buckets", "1", "--height_buckets", "32", "--width_buckets", "48"], PIXELS),
        (["--height_buckets", "32", "--width_buckets", "32", "--frame_buckets", "5"], PIXELS),
        (["--video_reshape_mode", "random"], PIXELS),
        (["--batch_size", "2", "--use_slicing", "--num_artifact_workers", "1", "--num_decode_threads", "1"], set()),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_another_setting_costs_what_it_touches(prepare, prepared, flags, touched):
    before = stamps(prepared)
    prepare(*EVERYTHING, *flags)
    assert folders(rewritten(prepared, before)) == touched
    kept = {"prompt_embeds/_empty.safetensors"} if "--id_token" in flags else set()
    assert rewritten(prepared, before) == {path for path in before if path.split("/")[0] in touched} - kept


def test_another_model_costs_latents_and_embeddings(prepare, prepared, tmp_path):
    make_tiny_pipeline(tmp_path / "other", "5b", seed=1)
    before = stamps(prepared)
    out = prepare(*EVERYTHING, model=tmp_path / "other")
    assert folders(rewritten(prepared, before)) == LATENT_FILES | EMBEDS
    assert contents(out) == contents(prepare(*EVERYTHING, model=tmp_path / "other", out="fresh"))


def test_another_tokenizer_costs_the_embeddings(prepare, prepared, tiny, tmp_path):
    model = shutil.copytree(tiny("5b"), tmp_path / "other")
    (model / "tokenizer/added_tokens.json").write_text("{}")
    before = stamps(prepared)
    prepare(*EVERYTHING, model=model)
    assert folders(rewritten(prepared, before)) == EMBEDS


def test_a_new_clip_costs_its_own_files(prepare, prepared, data, write_clip, info):
    write_clip(data / "d.mp4", 5, 32, 48, seed=5)
    write_lists(data, [*CAPTIONS, "A new clip."], ["a.mp4", "b.mp4", "c.mp4", "d.mp4"])
    before = stamps(prepared)
    prepare(*EVERYTHING)
    assert len(rewritten(prepared, before)) == 5 and all("/d-" in path for path in rewritten(prepared, before))
    assert "4 clips, 1 prepared now" in info.text


def test_previews_and_image_latents_can_be_added_later(prepare, prepared):
    out = prepare(*LATENTS, out="later")
    before = stamps(out)
    prepare(*EVERYTHING, out="later")
    assert folders(rewritten(out, before)) == {"image_latents", "videos", "images"}
    assert contents(out) == contents(prepared)


# ---------------------------------------------------------------- interruptions


def test_an_interrupted_run_is_continued(prepare, prepared, monkeypatch):
    """Every clip once over the two runs, and the same files as a run without a break."""
    encoded, encode = [], prepare_dataset.encode_videos

    def interrupted(vae, pixels):
        if len(encoded) == 1:
            raise KeyboardInterrupt
        encoded.append(pixels)
        return encode(vae, pixels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_dataset, "encode_videos", interrupted)
        prepare(*LATENTS, out="broken")
    monkeypatch.setattr(prepare_dataset, "load_text_encoder", forbidden)  # its part was done
    monkeypatch.setattr(prepare_dataset, "encode_videos", lambda *values: (encoded.append(values), encode(*values))[1])
    prepare(*LATENTS, out="broken")
    assert len(encoded) == 3
    monkeypatch.undo()
    assert contents(prepare(*LATENTS, out="broken")) == contents(prepare(*LATENTS, out="unbroken"))


@pytest.mark.parametrize("fatal", [2, 6, 9, 11])
def test_a_killed_run_leaves_no_half_files_and_is_continued(prepare, prepared, tmp_path, fatal):
    """SIGKILL in the middle of the n-th file: 4 embeddings, 6 latents, the manifest."""
    writes = []

    def fatal_after(write):
        def write_half(path, *content, **options):
            if tmp_path in path.parents:  # not the memory of hashes, which other tests may have filled
                writes.append(path)
            is_last = writes[-1:] == [path] and len(writes) == fatal
            write(path, *content, **options)
            if is_last:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return write_half

    def run():
        tensor_file.write_file, Path.write_text = fatal_after(tensor_file.write_file), fatal_after(Path.write_text)
        prepare(*EVERYTHING[:-1], "--num_artifact_workers", "1", out="killed")  # one file at a time

    child = in_child(run, tmp_path / "log")
    assert wait_for(child) == -signal.SIGKILL, (tmp_path / "log").read_text()
    out = tmp_path / "killed"
    left = [path for path in files_of(out) if path.name.startswith(".tmp-")]
    assert len(left) == 1 and not (out / "data.jsonl").exists()
    whole = prepare(*EVERYTHING[:-1], out="whole")
    assert all(
        path in left or path.read_bytes() == contents(whole)[str(path.relative_to(out))] for path in files_of(out)
    )
    prepare(*EVERYTHING[:-1], out="killed")
    assert not left[0].exists()
    assert contents(out) == contents(whole)


def test_a_signal_while_captions_are_encoded_leaves_whole_files_and_no_process(
    data, tiny, tmp_path, prepare, monkeypatch
):
    """Workers are at the clips by then; the same command goes on with the third caption."""
    argv = [*arguments(tiny("5b"), data, tmp_path / "out", *LATENTS), "--dataloader_num_workers", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv])

    def interrupted(*values, encode=encoding.encode_by_passes):
        for number, embeds in enumerate(encode(*values)):
            if number == 2:
                workers = [child.pid for child in multiprocessing.active_children()]
                (tmp_path / "workers").write_text(json.dumps(workers))
                os.kill(os.getpid(), signal.SIGTERM)
            yield embeds

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_by_passes", interrupted)
        child = in_child(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"), tmp_path / "log")
        assert wait_for(child) == 75
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-1] == "error: interrupted by SIGTERM; the same command does what is missing"
    workers = json.loads((tmp_path / "workers").read_text())
    assert len(workers) == 2 and not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    partly, whole = contents(tmp_path / "out"), contents(prepare(*LATENTS, out="whole"))
    assert partly.items() <= whole.items() and folders(partly) == EMBEDS
    assert contents(prepare(*LATENTS)) == whole


def test_an_unfinished_folder_has_no_manifest(prepare, prepared, monkeypatch):
    """The old one would give the new latents the old sizes."""
    monkeypatch.setattr(prepare_dataset, "load_vae", forbidden)
    with pytest.raises(AssertionError, match="not needed"):
        prepare(*LATENTS, "--height_buckets", "32", "--width_buckets", "32", "--frame_buckets", "5")
    with pytest.raises(DataError):
        LatentDataset(prepared)


# ---------------------------------------------------------------- batches, workers, ranks


def test_batches_change_nothing_but_rounding(prepare):
    """One by one in the VAE (--use_slicing) not even that; together 1e-4 of values around 6."""
    alone, together = prepare(*LATENTS, out="1"), prepare(*LATENTS, "--batch_size", "3", out="3")
    sliced = prepare(*LATENTS, "--batch_size", "3", "--use_slicing", out="sliced")
    assert contents(alone) == contents(sliced)
    assert contents(alone).keys() == contents(together).keys()
    for path in alone.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            other = load_file(together / path.relative_to(alone))[name]
            assert (tensor - other).abs().max() < 1e-4


def test_workers_change_nothing(prepare, prepared):
    out = prepare(*EVERYTHING, "--dataloader_num_workers", "2", out="workers")
    assert contents(out) == contents(prepared)


def test_clips_are_decoded_while_captions_are_encoded(prepare, data, tmp_path, monkeypatch):
    """As many as the worker prefetches and no more: they wait in host memory."""
    write_lists(data, CAPTIONS * 4, ["a.mp4", "b.mp4", "c.mp4"] * 4)
    read, encode, log = VideoDataset.read, prepare_dataset.encode_by_passes, tmp_path / "decoded"
    log.touch()

    def noted(*values):
        with open(log, "a") as file:
            file.write("one\n")
        return read(*values)

    def num_decoded():
        return len(log.read_text().splitlines())

    def waiting(*values):
        deadline = time.monotonic() + 20
        while num_decoded() < 2:
            assert time.monotonic() < deadline, "no worker decodes while T5 is at work"
            time.sleep(0.01)
        time.sleep(0.3)
        assert num_decoded() == 2
        yield from encode(*values)

    monkeypatch.setattr(VideoDataset, "read", noted)
    monkeypatch.setattr(prepare_dataset, "encode_by_passes", waiting)
    out = prepare(*LATENTS, "--dataloader_num_workers", "1")
    assert num_decoded() == len(rows_of(out)) == 12


def test_a_worker_killed_while_captions_are_encoded_is_one_line(data, tiny, tmp_path, capsys, monkeypatch):
    def waiting(*values):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(20)
        yield "never: torch raises its error from the signal of the worker's death"

    monkeypatch.setattr(prepare_dataset, "encode_by_passes", waiting)
    flags = [*LATENTS, "--dataloader_num_workers", "1"]
    code, line = refusal(capsys, parse_prepare_args(arguments(tiny("5b"), data, tmp_path / "out", *flags)))
    assert code == 75 and "a data worker was killed" in line


def test_each_phase_ends_with_its_files_written(prepare, monkeypatch):
    """Slow writers: what comes next waits for them."""
    write, load_vae, write_manifest = (
        getattr(prepare_dataset, name) for name in ("write_tensors", "load_vae", "write_manifest")
    )
    written, seen = [], []

    def slowly(path, *values):
        time.sleep(0.1)
        write(path, *values)
        written.append(path.parent.name)

    monkeypatch.setattr(prepare_dataset, "write_tensors", slowly)
    monkeypatch.setattr(prepare_dataset, "load_vae", lambda *v, **n: seen.append(sorted(written)) or load_vae(*v, **n))
    monkeypatch.setattr(
        prepare_dataset, "write_manifest", lambda *v: seen.append(sorted(written)) or write_manifest(*v)
    )
    out = prepare(*LATENTS, "--num_artifact_workers", "1")
    assert seen == [["prompt_embeds"] * 4, ["prompt_embeds"] * 4 + ["video_latents"] * 3]
    assert len(rows_of(out)) == 3


def test_captions_and_clips_go_on_while_files_are_written(prepare, monkeypatch):
    """No write is waited for until the writers' queue is full: T5 and the VAE are through before any file is there."""
    write, encode, passes = (
        getattr(prepare_dataset, name) for name in ("write_tensors", "encode_videos", "encode_by_passes")
    )
    begun = []

    def at_the_end(path, *values):
        deadline = time.monotonic() + 20
        while len(begun) < (7 if "video_latents" in str(path) else 4):
            assert time.monotonic() < deadline, "the next one waits for the file of the one before"
            time.sleep(0.01)
        write(path, *values)

    def counted(*values):
        for embeds in passes(*values):
            begun.append("caption")
            yield embeds

    monkeypatch.setattr(prepare_dataset, "write_tensors", at_the_end)
    monkeypatch.setattr(prepare_dataset, "encode_by_passes", counted)
    monkeypatch.setattr(prepare_dataset, "encode_videos", lambda *v: begun.append("clip") or encode(*v))
    assert len(rows_of(prepare(*LATENTS))) == 3


def free_port():
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return probe_socket.getsockname()[1]


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_ranks_share_the_clips_whoever_comes_first(prepare, tmp_path, slow_rank):
    """A rank that starts late sees files of the other: the split must not depend on them."""
    port = free_port()

    def run(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        build_videos = prepare_dataset.build_videos_from_args

        def late(*values):
            time.sleep(1.5 if rank == slow_rank else 0.0)
            return build_videos(*values)

        prepare_dataset.build_videos_from_args = late
        prepare(*EVERYTHING, out="ranks")

    children = [in_child(lambda rank=rank: run(rank), tmp_path / f"{rank}.log") for rank in (0, 1)]
    assert [wait_for(child) for child in children] == [0, 0], [
        (tmp_path / f"{rank}.log").read_text() for rank in (0, 1)
    ]
    assert contents(tmp_path / "ranks") == contents(prepare(*EVERYTHING, out="alone"))


# ---------------------------------------------------------------- bad input


@pytest.fixture
def five_clips(data, write_clip):
    """The three clips, the second damaged inside, then one cut off and one too short."""
    write_clip(data / "long.mp4", 60, 32, 48, seed=3)
    write_clip(data / "short.mp4", 3, 32, 48, seed=4)
    (data / "cut.mp4").write_bytes((data / "long.mp4").read_bytes()[:2000])
    damage(shutil.copy(data / "long.mp4", data / "b.mp4"))
    write_lists(data, [*CAPTIONS, "Cut.", "Short."], ["a.mp4", "b.mp4", "c.mp4", "cut.mp4", "short.mp4"])
    return data


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_bad_clips_are_named_and_left_out_and_the_rest_is_finished(
    five_clips, tiny, tmp_path, capsys, info, num_workers
):
    flags = [*EVERYTHING, "--batch_size", "2", "--use_slicing", "--dataloader_num_workers", num_workers]
    args = parse_prepare_args(arguments(tiny("5b"), five_clips, tmp_path / "out", *flags))
    code, line = refusal(capsys, args)
    assert code == 65 and line.startswith("error: 3 of 5 clips left out, the others are in ")
    for name in ("b.mp4: ", "cut.mp4: ", "short.mp4: too short"):
        assert name in line and sum(name in record.getMessage() for record in info.records) == 1
    assert "2 clips, 2 prepared now, 3 left out" in info.text
    assert [row["metadata"]["source"] for row in rows_of(tmp_path / "out")] == ["a.mp4", "c.mp4"]
    assert json.loads((tmp_path / "out/status.json").read_text())["exit_code"] == 65
    assert not [path for path in contents(tmp_path / "out") if path.startswith("video_latents/b-")]


def spoil(data, rng):
    """The bytes of a file as downloads, disks and people leave them."""
    size = len(data)
    start = rng.randrange(size)
    hole = data[:start] + bytes(min(300, size - start)) + data[start + 300 :]
    flipped = bytearray(data)
    for _ in range(20):
        flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
    kinds = [data[:start], data[start:], hole, bytes(flipped), data + data, b"", data[:100] + rng.randbytes(size)]
    return rng.choice(kinds)


def test_100_good_and_spoilt_files_are_all_prepared_or_named(tiny, sample_data, tmp_path, capsys, info):
    rng = random.Random(0)
    data = tmp_path / "mixed"
    data.mkdir()
    originals = [write_case(tmp_path, draw_case(rng), rng) for _ in range(16)]
    originals += sorted((sample_data / "videos").iterdir())
    names = []
    for number in range(100):
        original = rng.choice(originals)
        names.append(f"{number:03d}{original.suffix}")
        content = original.read_bytes()
        (data / names[-1]).write_bytes(content if rng.random() < 0.4 else spoil(content, rng))
    (data / names[7]).write_text("<!DOCTYPE html><title>404</title>")
    write_lists(data, [f"Clip {name}." for name in names], names)
    code, line = refusal(capsys, parse_prepare_args(arguments(tiny("5b"), data, tmp_path / "out", *LATENTS)))
    prepared = [row["metadata"]["source"] for row in rows_of(tmp_path / "out")]
    named = [record.getMessage() for record in info.records if record.getMessage().startswith("left out: ")]
    assert code == 65 and line.startswith(f"error: {len(named)} of 100 clips left out")
    assert len(prepared) >= 30 and len(named) >= 20
    for name in names:
        assert (name in prepared) + sum(f"/{name}: " in line for line in named) == 1, name
    assert not (tmp_path / "out/errors.log").exists()  # nothing that nobody foresaw


def test_an_error_that_nobody_foresaw_costs_its_clip_alone(tiny, sample_data, data, tmp_path, capsys, monkeypatch):
    def show(frame, picture, to_rgb, show=decode.show):
        if frame.width == 64:
            raise ValueError("31 is not a valid Type")
        return show(frame, picture, to_rgb)

    monkeypatch.setattr(decode, "show", show)
    shutil.copy(sample_data / "videos/square_falls.mp4", data / "b.mp4")
    code, line = refusal(capsys, parse_prepare_args(arguments(tiny("5b"), data, tmp_path / "out", *LATENTS)))
    assert code == 65 and "1 of 3 clips left out" in line and "b.mp4: cannot be read (ValueError: 31 is not" in line
    assert [row["metadata"]["source"] for row in rows_of(tmp_path / "out")] == ["a.mp4", "c.mp4"]
    assert "in show" in (tmp_path / "out/errors.log").read_text()


def test_a_clip_that_cannot_be_hashed_costs_itself_alone(tiny, data, tmp_path, capsys, monkeypatch):
    def of(self, path, algorithm="blake2b", of=HashCache.hash):
        if path.name == "b.mp4":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return of(self, path, algorithm)

    monkeypatch.setattr(HashCache, "hash", of)
    code, line = refusal(capsys, parse_prepare_args(arguments(tiny("5b"), data, tmp_path / "out", *LATENTS)))
    assert code == 65 and "1 of 3 clips left out" in line and "b.mp4: cannot be read (Input/output error)" in line
    assert [row["metadata"]["source"] for row in rows_of(tmp_path / "out")] == ["a.mp4", "c.mp4"]


def test_a_mended_clip_joins_at_its_place(five_clips, tiny, tmp_path, capsys, info, three_clips):
    args = parse_prepare_args(arguments(tiny("5b"), five_clips, tmp_path / "out", *LATENTS))
    assert refusal(capsys, args)[0] == 65
    shutil.copy(three_clips / "b.mp4", five_clips / "b.mp4")
    write_lists(five_clips, CAPTIONS, ["a.mp4", "b.mp4", "c.mp4"])
    info.clear()
    prepare_dataset.main(args)
    assert "3 clips, 1 prepared now, 0 left out" in info.text
    assert [row["metadata"]["source"] for row in rows_of(tmp_path / "out")] == ["a.mp4", "b.mp4", "c.mp4"]
    status = json.loads((tmp_path / "out/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("complete", 0)


@pytest.mark.parametrize(
    ("captions", "videos", "expected"),
    [
        ([], [], "videos.txt: no clips"),
        (CAPTIONS, ["a.mp4", "gone.mp4", "c.mp4"], "'gone.mp4' (row 2) not found"),
        (CAPTIONS, ["a.mp4", "b.mp4"], "has 3 captions and "),
    ],
    ids=["empty", "missing", "counts"],
)
def test_a_list_that_does_not_match_is_refused(data, tiny, tmp_path, capsys, captions, videos, expected):
    write_lists(data, captions, videos)
    code, line = refusal(capsys, parse_prepare_args(arguments(tiny("5b"), data, tmp_path / "out", *LATENTS)))
    assert code == 65 and expected in line
    assert json.loads((tmp_path / "out/status.json").read_text())["exit_code"] == 65


def test_the_data_folder_is_never_written(prepare, data, tiny):
    before = stamps(data)
    for out in (data, data / ".", data / "prompts.txt"):
        with pytest.raises(UsageError, match="--output_dir"):
            prepare_dataset.main(parse_prepare_args(arguments(tiny("5b"), data, out)))
    assert stamps(data) == before
    prepare(*LATENTS)
    assert stamps(data) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_end_the_run(data, tiny, tmp_path, capsys, monkeypatch, bad):
    encode, clips = prepare_dataset.encode_videos, []

    def encode_badly(vae, pixels):
        clips.append(pixels)
        moments = encode(vae, pixels)
        moments[..., -1, -1] *= bad if len(clips) == 2 else 1
        return moments

    monkeypatch.setattr(prepare_dataset, "encode_videos", encode_badly)
    code, line = refusal(capsys, parse_prepare_args(arguments(tiny("5b"), data, tmp_path / "out", *LATENTS)))
    assert code == 70 and "video_latents/b-" in line and "moments is not finite" in line
    assert not list((tmp_path / "out/video_latents").glob("*b-*"))


# ---------------------------------------------------------------- disk


def test_a_full_disk_ends_the_run_soon_and_a_rerun_completes(prepare, data, tiny, tmp_path, capsys, monkeypatch):
    write_lists(data, CAPTIONS * 4, ["a.mp4", "b.mp4", "c.mp4"] * 4)
    save, encode, latents, encoded = artifacts.save_tensors, prepare_dataset.encode_videos, [], []

    def disk_full(path, tensors, metadata):
        latents.extend(name for name in tensors if name == "moments")
        if len(latents) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(path, tensors, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "save_tensors", disk_full)
        patch.setattr(prepare_dataset, "encode_videos", lambda *values: (encoded.append(1), encode(*values))[1])
        code, line = refusal(capsys, parse_prepare_args(arguments(tiny("5b"), data, tmp_path / "out", *LATENTS)))
    assert code == 74 and "No space left on device" in line
    assert len(encoded) <= 5  # the third fails; not all twelve are encoded for nothing
    assert contents(prepare(*LATENTS)) == contents(prepare(*LATENTS, out="whole"))


def test_files_that_the_system_refuses_leave_nothing_half_written(prepare, prepared, data, tiny, tmp_path, write_clip):
    """A limit of 16 KB per file: the embeddings of 29 KB fail; of previews those that are larger."""
    for flags, out in ((LATENTS, "latents"), ([], "previews")):
        args = parse_prepare_args(arguments(tiny("5b"), data, tmp_path / out, *flags))

        def run(args=args, limit=16384 if flags else 1500):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            exits.run_script(lambda: prepare_dataset.main(args), args.output_dir)

        assert wait_for(in_child(run, tmp_path / f"{out}.log")) == 74
        lines = (tmp_path / f"{out}.log").read_text()
        assert "Traceback" not in lines and lines.splitlines()[-1].startswith("error: cannot write")
        whole = contents(prepare(*flags, out=f"whole-{out}"))
        partly = contents(tmp_path / out)
        assert partly.items() <= whole.items() and len(partly) < len(whole)
        assert contents(prepare(*flags, out=out)) == whole


# ---------------------------------------------------------------- memory and progress


def test_the_text_encoder_is_gone_before_the_vae_comes(prepare, monkeypatch):
    load_vae, load_text_encoder, encoders = prepare_dataset.load_vae, prepare_dataset.load_text_encoder, []

    def watched(*values):
        tokenizer, text_encoder = load_text_encoder(*values)
        encoders.append(weakref.ref(text_encoder))
        return tokenizer, text_encoder

    def checked(*values, **options):
        assert encoders[0]() is None, "both in memory"
        return load_vae(*values, **options)

    monkeypatch.setattr(prepare_dataset, "load_text_encoder", watched)
    monkeypatch.setattr(prepare_dataset, "load_vae", checked)
    gc.disable()  # not merely by luck
    try:
        prepare(*LATENTS)
    finally:
        gc.enable()
    assert encoders


def test_progress_counts_clips_and_captions(five_clips, tiny, tmp_path, monkeypatch):
    counts = {}

    class Recorded(bars.LogLines):
        def close(self):
            counts[self.desc] = (self.n, self.total)
            super().close()

    monkeypatch.setattr(bars, "LogLines", Recorded)
    with pytest.raises(DataError):
        prepare_dataset.main(parse_prepare_args(arguments(tiny("5b"), five_clips, tmp_path / "out", *LATENTS)))
    # Two of five clips are out by their headers; one of three cannot be decoded. A caption and the empty prompt each.
    assert counts["clips"] == (3, 3) and counts["captions"] == (4, 4)


# ---------------------------------------------------------------- processes


def test_the_script_itself(five_clips, tiny, tmp_path, monkeypatch):
    """Its exit code, its last line and status.json; run in a forked process, which saves 10 s of imports."""
    argv = [str(SCRIPT), *arguments(tiny("5b"), five_clips, tmp_path / "out", *LATENTS)]
    monkeypatch.setattr(sys, "argv", argv)
    child = in_child(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"), tmp_path / "log")
    assert wait_for(child) == 65
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-1].startswith("error: 3 of 5 clips left out") and not any("Traceback" in line for line in lines)
    status = json.loads((tmp_path / "out/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 65) and len(rows_of(tmp_path / "out")) == 2


def test_ctrl_c_says_what_the_same_command_does_then(data, tiny, tmp_path, monkeypatch):
    argv = [str(SCRIPT), *arguments(tiny("5b"), data, tmp_path / "out", *LATENTS)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr("data.dataset.build_videos_from_args", lambda *values: os.kill(os.getpid(), signal.SIGINT))
    child = in_child(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"), tmp_path / "log")
    assert wait_for(child) == 75
    line = (tmp_path / "log").read_text().splitlines()[-1]
    assert line == "error: interrupted by SIGINT; the same command does what is missing"


def test_two_ranks_equal_one(five_clips, tiny, tmp_path):
    """Also where clips are left out: the other rank has time to finish."""

    def main(out):
        prepare_dataset.main(parse_prepare_args(arguments(tiny("5b"), five_clips, out, *EVERYTHING)))

    assert run_ranks(lambda: run_script(lambda: main(tmp_path / "two"), tmp_path / "two"), 2) == [65, 0]
    assert json.loads((tmp_path / "two/status.json").read_text())["exit_code"] == 65
    with pytest.raises(DataError):
        main(tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow  # torchrun and two scripts that import torch: one error is shown, whoever meets it
def test_two_processes_equal_one(five_clips, tiny, tmp_path):
    """Also where clips are left out: the other process has time to finish, and one error is shown."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command = [*launch, *arguments(tiny("5b"), five_clips, tmp_path / "two", *EVERYTHING)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 1 and result.stderr.count("error: 3 of 5 clips left out") == 1, result.stderr
    assert json.loads((tmp_path / "two/status.json").read_text())["exit_code"] == 65
    with pytest.raises(DataError):
        prepare_dataset.main(parse_prepare_args(arguments(tiny("5b"), five_clips, tmp_path / "one", *EVERYTHING)))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert [row["metadata"]["source"] for row in rows_of(tmp_path / "two")] == ["a.mp4", "c.mp4"]


def test_each_process_works_on_its_own_gpu(monkeypatch):
    """Triton's kernels and new streams go to the current device, whatever device the tensors are on."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    _, _, device = prepare_dataset.init_processes()
    assert chosen == [device] == [torch.device("cuda:3")]
