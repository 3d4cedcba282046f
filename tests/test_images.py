"""Still images as clips of one frame, beside videos: which bucket they get, and training on both."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from base.errors import DataError
from data.buckets import Bucket, make_buckets
from data.clip_lists import read_clips
from data.latents import LatentDataset
from data.loader import BucketSampler
from data.videos import VideoDataset, VideoDatasetWithResizing
from engine import objective
from run import validation
from script_runs import SCRIPTS, TEXT_FILES, four_scripts, losses, prepare, result_hash
from synthetic_clips import ffmpeg, write_clip


NAMES = ["0.mp4", "a.png", "1.mp4", "b.JPG", "c.jpeg", "d.webp"]
IMAGES = [name for name in NAMES if not name.endswith("mp4")]


def write_image(path, height=80, width=120, seed=0, **options):
    """A smooth picture: JPEG would spoil noise."""
    ramps = np.linspace(40, 200, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None] * (seed % 3 + 1) / 3
    pixels = (ramps * np.array([1, 0.8, 0.6])).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def write_mixed(folder, names=NAMES):
    """Videos and images in turn, as two text files list them."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        if name.endswith("mp4"):
            write_clip(folder / name, seed=seed)
        else:
            write_image(folder / name, seed=seed)
    (folder / "prompts.txt").write_text("".join(f"clip {name}\n" for name in names))
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


@pytest.fixture(scope="session")
def mixed(once):
    """A folder of two videos and four images; read-only."""
    return once("mixed", write_mixed)


def videos_of(folder, buckets=None, kind=VideoDatasetWithResizing, **options):
    clips = read_clips(folder, None, "prompts.txt", "videos.txt")
    return kind(clips, buckets or make_buckets([9], [64], [64, 96]), fps=8, **options)


# ---------------------------------------------------------------- buckets


def test_images_get_buckets_of_one_frame_that_nobody_named(mixed, caplog):
    videos = videos_of(mixed, skip_frames_start=0)
    assert videos.clip_buckets == [(9, 64, 96) if name.endswith("mp4") else (1, 64, 96) for name in NAMES]
    assert [videos[index]["pixels"].shape[0] for index in range(len(NAMES))] == [9, 1, 9, 1, 1, 1]
    assert "frames per second" not in caplog.text  # of an image there are none


def test_what_is_skipped_of_videos_and_their_most_frames_do_not_concern_images(mixed):
    plain = videos_of(mixed, make_buckets([5], [64], [96]))
    skipped = videos_of(mixed, make_buckets([5], [64], [96]), skip_frames_start=2, skip_frames_end=2, max_num_frames=5)
    assert skipped.clip_buckets == plain.clip_buckets
    assert torch.equal(skipped[1]["pixels"], plain[1]["pixels"])
    assert not torch.equal(skipped[0]["pixels"], plain[0]["pixels"])


def test_a_video_of_one_frame_is_told_how_it_becomes_an_image(tmp_path):
    """It may as well be what a scene cutter left over, which nobody wants as a picture."""
    write_clip(tmp_path / "0.mp4", num_frames=1)
    lists = {"prompts.txt": "a\n", "videos.txt": "0.mp4\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="too short: 1 frames .* if an image is meant, list it as one") as caught:
        videos_of(tmp_path)
    flags = re.search(r"\(ffmpeg (.*)\)", str(caught.value))[1].split()
    ffmpeg(*({"IN.mp4": tmp_path / "0.mp4", "OUT.png": tmp_path / "0.png"}.get(flag, flag) for flag in flags))
    (tmp_path / "videos.txt").write_text("0.png\n")
    assert videos_of(tmp_path).clip_buckets == [(1, 64, 96)]


def test_an_image_is_read_as_it_is_shown(tmp_path):
    pixels = write_image(tmp_path / "a.png", 64, 96)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    write_image(tmp_path / "turned.jpg", 64, 96, exif=exif, quality=98, subsampling=0)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "videos.txt").write_text("a.png\nturned.jpg\n")
    videos = videos_of(tmp_path, make_buckets([9], [64, 96], [64, 96]), VideoDataset)
    assert videos.clip_buckets == [(1, 64, 96), (1, 96, 64)]
    assert torch.equal(videos[0]["pixels"][0].permute(1, 2, 0), torch.from_numpy(pixels))
    turned = videos[1]["pixels"][0].permute(1, 2, 0).numpy().astype(int)
    assert abs(turned - np.rot90(pixels, -1)).max() <= 8


def test_transparent_images_are_read_as_if_opaque_and_named(tmp_path, caplog):
    write_mixed(tmp_path, ["a.png", "b.png"])
    Image.fromarray(np.full((64, 96, 4), 100, np.uint8)).save(tmp_path / "a.png")
    videos = videos_of(tmp_path)
    assert "1 of 2 clips are transparent in part, and read as if opaque: a.png" in caplog.text
    assert (videos[0]["pixels"] == 100).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_large_images_are_known_by_their_content_whatever_the_system_calls_them(tmp_path, suffix, monkeypatch):
    """FFmpeg opens a large file by its name: as a sequence of numbered files, if nothing prevents that."""
    monkeypatch.setattr("mimetypes.guess_type", lambda path: (None, None))
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    write_mixed(tmp_path, [f"100%d.{suffix}"])
    Image.fromarray(noise).save(tmp_path / f"100%d.{suffix}", quality=95)
    assert videos_of(tmp_path, make_buckets([9], [480], [640])).clip_buckets == [(1, 480, 640)]


def test_a_video_of_one_frame_is_still_too_short(tmp_path):
    write_mixed(tmp_path, ["a.png", "short.mp4"])
    write_clip(tmp_path / "short.mp4", 1)
    with pytest.raises(DataError, match="short.mp4: too short: 1 frames"):
        videos_of(tmp_path)
    assert videos_of(tmp_path, make_buckets([1], [64], [96])).clip_buckets == [(1, 64, 96)] * 2


def test_a_size_of_other_videos_is_none_of_theirs(tmp_path):
    """The buckets of images take no video that is too short for its own."""
    write_mixed(tmp_path, ["0.mp4"])
    with pytest.raises(DataError, match="unknown bucket: 9 frames of 64x96"):
        videos_of(tmp_path, [Bucket(9, 64, 64), Bucket(17, 64, 96)], VideoDataset)


def test_images_and_videos_never_share_a_batch(mixed):
    sampler = BucketSampler(videos_of(mixed).clip_buckets, batch_size=3)
    frames = [{NAMES[key].endswith("mp4") for key in keys} for keys in sampler]
    assert all(len(kinds) == 1 for kinds in frames) and len(frames) == 3


# ---------------------------------------------------------------- image-to-video


def test_image_to_video_leaves_images_out_and_says_so(mixed, caplog):
    videos = videos_of(mixed, with_images=False)
    assert videos.sources == ["0.mp4", "1.mp4"]
    assert caplog.messages == ["4 of 6 clips are images, left out in image-to-video: a.png, b.JPG, c.jpeg, d.webp"]


def test_image_to_video_needs_a_video(tmp_path):
    with pytest.raises(DataError, match=r"only images \(a.png\), and image-to-video needs videos"):
        videos_of(write_mixed(tmp_path, ["a.png"]), with_images=False)


# ---------------------------------------------------------------- prepared


@pytest.fixture(scope="session")
def prepared_mixed(mixed, tiny, once):
    """kind -> the mixed clips, prepared with previews; read-only."""
    flags = ["--save_image_latents", "--num_image_variants", "1", "--save_previews"]
    return lambda kind: once(f"mixed-{kind}", lambda out: prepare(tiny(kind), mixed, out, *flags))


def test_images_are_prepared_as_clips_of_one_frame(prepared_mixed, mixed):
    folder = prepared_mixed("5b")
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert [row["metadata"]["num_frames"] for row in rows] == [9, 1, 9, 1, 1, 1]
    latents = LatentDataset(folder, buckets=make_buckets([9], [64], [64, 96]), with_images=False)
    assert [latents[index]["moments"].shape[1] for index in range(6)] == [3, 1, 3, 1, 1, 1]
    assert latents.prompts == [f"clip {name}" for name in NAMES]
    with Image.open(folder / rows[1]["image"]) as image:
        assert image.size == (96, 64)


def test_prepared_images_are_left_out_too(prepared_mixed, caplog):
    latents = LatentDataset(prepared_mixed("5b"))
    assert latents.prompts == ["clip 0.mp4", "clip 1.mp4"] and latents.has_image_latents
    assert caplog.text.count("4 of 6 clips are images, left out in image-to-video") == 1


# ---------------------------------------------------------------- training


@four_scripts
def test_mixed_sets_train_raw_as_prepared(script, module, train, mixed, prepared_mixed, caplog):
    is_t2v = script.key.startswith("t2v")
    # An image's noise is drawn per clip in one, per position in the other: only without the first frame are they equal
    flags = ["--max_train_steps", "6", *([] if is_t2v else ["--noised_image_dropout", "1"])]
    raw = train("raw", *flags, data=mixed, raw=True)
    latents = train("latents", *flags, data=prepared_mixed(script.kind))
    assert result_hash(raw) == result_hash(latents) and losses(raw) == losses(latents)
    assert all(0 < loss < 10 for loss in losses(raw))
    assert ("images, left out" in caplog.text) != is_t2v


def test_validation_renders_videos_even_if_most_clips_are_images(mixed):
    args = SimpleNamespace(given=set(), max_num_frames=49, height=480, width=720)
    buckets = videos_of(mixed).clip_buckets
    assert validation.sample_size(args, buckets) == (9, 64, 96)
    assert validation.sample_size(args, buckets[3:]) == (1, 64, 96)  # images alone


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-5b"])
def test_a_batch_of_images_in_every_kind(kind, tiny, tmp_path, monkeypatch):
    """1.0 sees one latent frame; 1.5, which takes them in pairs, sees it twice, and the loss counts both."""
    import cogvideox_text_to_video_lora as module
    from args import parse_training_args

    seen, shapes = [], objective.v_prediction_loss

    def watched(velocity, latents, *rest):
        seen.append((velocity.shape, latents))
        return shapes(velocity, latents, *rest)

    monkeypatch.setattr(module.objective, "v_prediction_loss", watched)
    data = write_mixed(tmp_path / "data", IMAGES)
    argv = ["--pretrained_model_name_or_path", str(tiny(kind)), "--data_root", str(data), *TEXT_FILES, "--seed", "1"]
    argv += ["--output_dir", str(tmp_path / "out"), "--height_buckets", "64", "--width_buckets", "96"]
    argv += ["--max_train_steps", "1", "--train_batch_size", "4", *SCRIPTS["t2v_lora"].flags]
    module.main(parse_training_args("t2v_lora", argv))
    [(shape, latents)] = seen
    assert shape == latents.shape and len(shape) == 5
    assert shape[:2] == (4, 2 if kind.startswith("1.5") else 1)
    assert torch.equal(latents[:, 0], latents[:, -1])
