import argparse
import json
import logging
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_clips import encode_video
from safetensors.torch import save_file

from base.errors import DataError, Interrupted, UsageError, UserError
from cogvideox.config import TEXT_TO_VIDEO_PIPELINE
from data import loader
from data import videos as videos_module
from data.buckets import Bucket, make_buckets, pack_batches
from data.clip_lists import Clip, read_clips
from data.dataset import build_dataset_from_args, build_videos_from_args
from data.latents import LatentDataset
from data.loader import BucketSampler, make_loader, tolerant_loader
from data.videos import VideoDataset, VideoDatasetWithResizeAndRectangleCrop, VideoDatasetWithResizing, cover_resize
from test_decode import numbered_clip, numbers


NUMBERED = Bucket(9, 32, 128)  # the size of numbered clips


def as_clips(paths):
    return [Clip(path, f"caption {i}", i + 1, path.name) for i, path in enumerate(paths)]


def shown(sample):
    return numbers(sample["pixels"].permute(0, 2, 3, 1).numpy())


def error_of(function, *arguments, **options):
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Clips of 9, 20 and 97 frames at 16 fps that show their frame numbers."""
    folder = tmp_path_factory.mktemp("numbered")
    return as_clips([numbered_clip(folder / f"{count}.mp4", count, fps=16) for count in (9, 20, 97)])


# ---------------------------------------------------------------- videos


def test_sample_is_pixels_prompt_and_index(numbered):
    videos = VideoDataset(numbered, [NUMBERED], fps=16)
    assert len(videos) == 3 and videos.clip_buckets == [NUMBERED] * 3 and videos.prompts[2] == "caption 2"
    sample = videos[0]
    assert sample["pixels"].shape == (9, 3, 32, 128) and sample["pixels"].dtype == torch.uint8
    assert sample["pixels"].is_contiguous()
    assert (sample["prompt"], sample["index"]) == ("caption 0", 0)
    assert shown(sample) == list(range(9))


def test_a_longer_clip_starts_at_a_place_drawn_per_epoch(numbered):
    videos = VideoDataset(numbered, [NUMBERED], fps=16, seed=3)
    starts = [shown(videos[epoch * 3 + 2])[0] for epoch in range(40)]
    assert len(set(starts)) > 20 and min(starts) < 20 and 68 < max(starts) <= 88
    assert all(shown(videos[epoch * 3 + 2]) == list(range(s, s + 9)) for epoch, s in enumerate(starts[:5]))
    again = VideoDataset(numbered, [NUMBERED], fps=16, seed=3)
    assert [shown(again[epoch * 3 + 2])[0] for epoch in range(5)] == starts[:5]
    other = VideoDataset(numbered, [NUMBERED], fps=16, seed=4)
    assert [shown(other[epoch * 3 + 2])[0] for epoch in range(5)] != starts[:5]


def test_motion_speed_does_not_depend_on_the_length(tmp_path):
    bucket = Bucket(49, 32, 128)
    clips = as_clips([numbered_clip(tmp_path / f"{count}.mp4", count, fps=16) for count in (97, 98, 146, 195)])
    videos = VideoDataset(clips, [bucket], fps=8)
    for index in range(4):
        assert set(np.diff(shown(videos[index]))) == {2}


def test_frames_are_skipped_at_both_ends(numbered):
    videos = VideoDataset(numbered[1:2], [NUMBERED], fps=16, skip_frames_start=6, skip_frames_end=3)
    seen = [shown(videos[epoch]) for epoch in range(40)]
    assert min(map(min, seen)) == 6 and max(map(max, seen)) == 16
    exact = VideoDataset(numbered[1:2], [NUMBERED], fps=16, skip_frames_start=6, skip_frames_end=5)
    assert shown(exact[0]) == list(range(6, 15))
    message = error_of(VideoDataset, numbered[1:2], [NUMBERED], fps=16, skip_frames_start=6, skip_frames_end=6)
    assert "too short: 8 frames" in message and "20 in the file" in message


def test_a_clip_that_is_too_short_at_this_rate_alone_is_told_the_flag(tmp_path, write_clip):
    clips = [Clip(write_clip(tmp_path / "a.mp4", 49, 32, 48, fps=24), "", 1, "a.mp4")]
    bucket = [Bucket(49, 32, 48)]
    message = error_of(VideoDataset, clips, bucket, fps=8, fps_flag="--target_fps")
    assert "too short: 17 frames at 8 fps (49 in the file at 24 fps)" in message
    assert "(--target_fps 24 takes every frame), add a smaller one to --frame_buckets" in message
    assert "--fps 24" in error_of(VideoDataset, clips, bucket, fps=8)
    assert VideoDataset(clips, bucket, fps=24).clip_buckets == bucket
    assert "rate" not in error_of(VideoDataset, clips, [Bucket(57, 32, 48)], fps=8)


def test_max_num_frames_caps_the_bucket(numbered):
    buckets = [NUMBERED, Bucket(17, 32, 128), Bucket(49, 32, 128)]
    assert VideoDataset(numbered, buckets, fps=16).clip_buckets == [buckets[0], buckets[1], buckets[2]]
    assert VideoDataset(numbered, buckets, fps=16, max_num_frames=20).clip_buckets[2] == buckets[1]
    with pytest.raises(UsageError, match="--max_num_frames"):
        VideoDataset(numbered, buckets, fps=16, max_num_frames=8)


def test_one_flip_per_clip(numbered):
    plain = VideoDataset(numbered, [NUMBERED], fps=16)
    flipping = VideoDataset(numbered, [NUMBERED], fps=16, random_flip=0.5)
    flips = 0
    for key in range(60):
        same = (flipping[key]["pixels"] == plain[key]["pixels"]).all()
        mirrored = (flipping[key]["pixels"] == plain[key]["pixels"].flip(-1)).all()
        assert same != mirrored
        flips += int(mirrored)
    assert 15 < flips < 45


def test_slow_clips_are_warned_of_once(numbered, caplog):
    VideoDataset(numbered[1:], [NUMBERED], fps=24)
    assert len(caplog.records) == 1 and "2 of 2 clips have less than 24" in caplog.text


def test_unknown_bucket_names_file_size_and_flags(numbered):
    message = error_of(VideoDataset, numbered[:1], [Bucket(9, 48, 64)], fps=16)
    assert "9.mp4: unknown bucket" in message and "32x128" in message
    assert "--height_buckets" in message and "--video_reshape_mode center" in message


def bad_clips(folder, numbered):
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video\n" * 100)
    cut = numbered[2].video.read_bytes()[:1000]
    (folder / "cut.mp4").write_bytes(cut)
    short = numbered_clip(folder / "short.mp4", 5, fps=16)
    names = ["empty.mp4", "text.mp4", "cut.mp4", short.name, "missing1.mp4", "missing2.mp4", "missing3.mp4"]
    return as_clips([folder / name for name in names])


def test_all_problems_come_in_one_line(tmp_path, numbered):
    message = error_of(VideoDataset, [*numbered, *bad_clips(tmp_path, numbered)], [NUMBERED], fps=16)
    assert message.startswith("7 of 10 clips cannot be used: ") and message.endswith("; and 2 more")
    for part in ("empty.mp4: empty file", "text.mp4: a text, not a video", "short.mp4: too short: 5 frames"):
        assert part in message


def test_collected_problems_leave_the_good_clips(tmp_path, numbered):
    clips = [*numbered[:1], *bad_clips(tmp_path, numbered), *numbered[1:]]
    videos = VideoDataset(clips, [NUMBERED], fps=16, on_problem="collect")
    assert videos.clips == numbered and len(videos) == 3
    assert len(videos.problems) == 7 and "empty file" in videos.problems[0]
    assert shown(videos[0]) == list(range(9))


def test_fingerprint_follows_clips_captions_and_sizes(numbered):
    videos = VideoDataset(numbered, [NUMBERED], fps=16)
    assert videos.fingerprint() == VideoDataset(numbered, [NUMBERED], fps=16).fingerprint()
    others = [
        VideoDataset(numbered[::-1], [NUMBERED], fps=16),
        VideoDataset([numbered[0]._replace(prompt="other"), *numbered[1:]], [NUMBERED], fps=16),
        VideoDataset(numbered, [Bucket(5, 32, 128)], fps=16),
    ]
    assert len({videos.fingerprint(), *(other.fingerprint() for other in others)}) == 4


# ---------------------------------------------------------------- resizing


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """A white disc of radius 40 in the middle of 120 x 200 pixels."""
    y, x = np.mgrid[:120, :200]
    disc = ((y - 59.5) ** 2 + (x - 99.5) ** 2 < 40**2)[None, :, :, None] * np.uint8(255)
    path = tmp_path_factory.mktemp("circle") / "circle.mp4"
    encode_video(path, disc.repeat(9, 0).repeat(3, 3), 8)
    return as_clips([path])


@pytest.mark.parametrize("size", [(64, 64), (240, 240), (64, 160), (96, 64)])
def test_a_circle_stays_round_and_in_the_middle(circle, size):
    pixels = VideoDatasetWithResizing(circle, [Bucket(9, *size)], fps=8)[0]["pixels"]
    assert pixels.shape[-2:] == size
    disc = pixels[0, 0] > 127
    radius = 40 * max(size[0] / 120, size[1] / 200)
    rows, columns = disc.any(1).nonzero().flatten(), disc.any(0).nonzero().flatten()
    for places, extent in ((rows, size[0]), (columns, size[1])):
        assert abs(len(places) - min(2 * radius, extent)) <= 2
        assert abs(places.float().mean() - (extent - 1) / 2) <= 1


def test_cover_resize_clips_what_bicubic_overshoots():
    step = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    step[..., 16:] = 255
    wide = cover_resize(step, Bucket(1, 64, 64))[0, 0, 0].int()
    assert wide.shape == (64,)
    assert (wide[:28] == 0).all() and (wide[36:] == 255).all() and (wide.diff() >= 0).all()


def test_cover_resize_covers_every_bucket_with_the_least():
    for height, width in [(480, 720), (333, 777), (100, 30), (1, 1), (721, 479)]:
        for bucket in make_buckets([1], [16, 48, 256], [16, 80, 256]):
            resized = cover_resize(torch.zeros(1, 3, height, width, dtype=torch.uint8), bucket)
            spare = resized.shape[-2] - bucket.height, resized.shape[-1] - bucket.width
            assert min(spare) == 0


def test_random_crops_are_drawn_per_epoch_and_cover_the_range(circle):
    options = {"fps": 8, "crop": "random"}
    videos = VideoDatasetWithResizeAndRectangleCrop(circle, [Bucket(9, 64, 64)], **options)
    lefts = [videos.crop_corner(0, 40, epoch, 0)[1] for epoch in range(200)]
    assert min(lefts) == 0 and max(lefts) == 40
    first, second = videos[0]["pixels"], videos[1]["pixels"]
    assert not (first == second).all()
    again = VideoDatasetWithResizeAndRectangleCrop(circle, [Bucket(9, 64, 64)], **options)
    assert (again[1]["pixels"] == second).all()
    assert (first == first[:1]).float().mean() > 0.95  # one place for all frames of the still


def test_the_crop_is_in_the_middle_unless_asked(circle):
    middle = VideoDatasetWithResizing(circle, [Bucket(9, 64, 64)], fps=8)
    unset = VideoDatasetWithResizeAndRectangleCrop(circle, [Bucket(9, 64, 64)], fps=8)
    assert (middle[0]["pixels"] == unset[5]["pixels"]).all()


def test_enlarging_is_warned_of_and_then_refused(circle, caplog):
    VideoDatasetWithResizing(circle, [Bucket(9, 176, 176)], fps=8)
    assert not caplog.records
    VideoDatasetWithResizing(circle * 3, [Bucket(9, 256, 256)], fps=8)
    assert len(caplog.records) == 1 and "3 of 3 clips are enlarged" in caplog.text
    message = error_of(VideoDatasetWithResizing, circle, [Bucket(9, 496, 496)], fps=8)
    assert "circle.mp4" in message and "4.1 times" in message and "--height_buckets" in message


# ---------------------------------------------------------------- draws


@pytest.fixture
def drawn(numbered):
    """(clips -> {(source, repeat, epoch): pixels}) with start, crop and flip drawn."""

    def samples(clips):
        options = {"fps": 16, "seed": 3, "crop": "random", "random_flip": 0.5}
        videos = VideoDatasetWithResizeAndRectangleCrop(clips, [Bucket(9, 32, 64)], **options)
        assert videos.is_random()
        found = {}
        for epoch in range(3):
            for index, clip in enumerate(clips):
                repeat = sum(other.source == clip.source for other in clips[:index])
                found[clip.source, repeat, epoch] = videos[epoch * len(clips) + index]["pixels"]
        return found

    return samples


def changed(before, after):
    return [key for key in before if not torch.equal(before[key], after[key])]


@pytest.mark.parametrize(
    "other",
    [
        lambda clips: clips[::-1],
        lambda clips: [clips[0]._replace(source="new.mp4"), *clips],
        lambda clips: [*clips, *clips],
        lambda clips: [clips[2], clips[0], clips[2], clips[1]],
        lambda clips: [clip._replace(prompt="another", row=9) for clip in clips],
    ],
    ids=["reversed", "one in front", "twice", "a repeat between", "captions"],
)
def test_other_rows_of_the_list_change_no_draw(numbered, drawn, other):
    assert changed(drawn(numbered), drawn(other(numbered))) == []


def test_a_moved_folder_changes_no_draw_and_another_source_does(numbered, drawn, tmp_path):
    moved = [clip._replace(video=shutil.copy(clip.video, tmp_path / f"x{clip.row}.mp4")) for clip in numbered]
    assert changed(drawn(numbered), drawn(moved)) == []
    renamed = [clip._replace(source=clip.source.replace(".mp4", ".MP4")) for clip in numbered]
    before = {(source.upper(), *rest): pixels for (source, *rest), pixels in drawn(numbered).items()}
    after = {(source.upper(), *rest): pixels for (source, *rest), pixels in drawn(renamed).items()}
    assert len(changed(before, after)) > 4


def test_repeats_of_a_clip_are_drawn_apart(numbered, drawn):
    samples = drawn([numbered[2]] * 3)
    assert len({pixels.numpy().tobytes() for pixels in samples.values()}) == 9


def test_skipped_frames_leave_the_other_clips_draws(numbered, tmp_path):
    """A clip that is left out, as too short, moves those behind it up."""
    short = as_clips([numbered_clip(tmp_path / "short.mp4", 3, fps=16)])
    whole, rest = [
        VideoDataset(clips, [NUMBERED], fps=16, on_problem="collect") for clips in (short + numbered, numbered)
    ]
    assert [whole.start_time(0, index) for index in range(3)] == [rest.start_time(0, index) for index in range(3)]


@pytest.mark.parametrize(
    ("clip", "options", "expected"),
    [(0, {}, False), (1, {}, True), (0, {"random_flip": 0.1}, True), (1, {"skip_frames_end": 11}, False)],
)
def test_a_dataset_knows_whether_it_draws(numbered, clip, options, expected):
    assert VideoDataset(numbered[clip : clip + 1], [NUMBERED], fps=16, **options).is_random() is expected
    for width, has_room in ((128, False), (64, True)):
        options |= {"crop": "random"}
        cut = VideoDatasetWithResizeAndRectangleCrop(
            numbered[clip : clip + 1], [Bucket(9, 32, width)], fps=16, **options
        )
        assert cut.is_random() is (expected or has_room)


# ---------------------------------------------------------------- prepared latents


def tensors_of(number, frames=3, height=4, width=6):
    generator = torch.Generator().manual_seed(number)
    return {
        "moments": torch.randn(32, frames, height, width, generator=generator),
        "prompt_embeds": torch.randn(7, 16, generator=generator).bfloat16(),
        "image": torch.randn(8, 32, 1, height, width, generator=generator),
    }


def write_prepared(root, count=3, images=True, id_token=None):
    rows = []
    for folder in ("video_latents", "prompt_embeds", "image_latents"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        tensors = tensors_of(number)
        save_file({"moments": tensors["moments"]}, root / f"video_latents/{number}.safetensors")
        save_file({"prompt_embeds": tensors["prompt_embeds"]}, root / f"prompt_embeds/{number}.safetensors")
        save_file({"moments": tensors["image"]}, root / f"image_latents/{number}.safetensors")
        rows.append(
            {
                "prompt": f"caption\n{number}",
                "prompt_embed": f"prompt_embeds/{number}.safetensors",
                "video": f"videos/{number}.mp4",
                "video_latent": f"video_latents/{number}.safetensors",
                "image_latent": f"image_latents/{number}.safetensors" if images else None,
                "metadata": {"num_frames": 9, "height": 32, "width": 48, "id_token": id_token},
            }
        )
    write_manifest(root, rows)
    return rows


def write_manifest(root, rows):
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_original(root, names):
    for folder in ("video_latents", "prompt_embeds", "image_latents"):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate(names):
        tensors = tensors_of(number)
        stem = name.split(".")[0]  # up to the first dot
        torch.save(tensors["moments"], root / f"video_latents/{stem}.pt")
        torch.save(tensors["prompt_embeds"], root / f"prompt_embeds/{stem}.pt")
        torch.save(tensors["image"][0], root / f"image_latents/{stem}.pt")
    (root / "prompts.txt").write_text("".join(f"caption {number}\n" for number in range(len(names))))
    (root / "videos.txt").write_text("".join(f"videos/{name}\n" for name in names))


def test_prepared_tensors_come_as_stored(tmp_path):
    write_prepared(tmp_path)
    latents = LatentDataset(tmp_path, buckets=[Bucket(9, 32, 48)])
    assert latents.clip_buckets == [Bucket(9, 32, 48)] * 3 and latents.prompts[1] == "caption\n1"
    for index in range(3):
        sample, stored = latents[index], tensors_of(index)
        assert sample["index"] == index
        for name in ("moments", "prompt_embeds"):
            assert torch.equal(sample[name], stored[name]) and sample[name].dtype == stored[name].dtype


def test_image_variants_are_drawn_per_epoch(tmp_path):
    write_prepared(tmp_path)
    latents = LatentDataset(tmp_path, seed=1)
    stored = tensors_of(0)["image"]
    variants = []
    for epoch in range(40):
        image = latents[3 * epoch]["image_moments"]
        assert image.shape == (32, 1, 4, 6)
        variants.append([torch.equal(image, variant) for variant in stored].index(True))
    assert set(variants) == set(range(8))
    assert torch.equal(LatentDataset(tmp_path, seed=1)[6]["image_moments"], latents[6]["image_moments"])


@pytest.mark.parametrize("has_source", [False, True])
def test_image_variants_follow_the_clip(tmp_path, has_source):
    """Whatever its row, and with previews, which change the path in the row but not that of the source."""
    rows = write_prepared(tmp_path, count=4)
    for row in rows if has_source else []:
        row["metadata"]["source"] = row["video"]
    write_manifest(tmp_path, rows)
    before = LatentDataset(tmp_path, seed=1)
    for row in rows if has_source else []:
        row["video"] = row["video"].replace("videos", "other")
    write_manifest(tmp_path, rows[:0:-1])
    after = LatentDataset(tmp_path, seed=1)
    for epoch in range(8):
        for index in (1, 2, 3):
            ours, theirs = after[3 * epoch + 3 - index], before[4 * epoch + index]
            assert torch.equal(ours["image_moments"], theirs["image_moments"])


def test_latents_know_whether_they_draw(tmp_path):
    write_prepared(tmp_path / "eight")
    write_original(tmp_path / "one", ["a.mp4"])
    assert LatentDataset(tmp_path / "eight").is_random() and not LatentDataset(tmp_path / "one").is_random()
    text_to_video = LatentDataset(tmp_path / "eight", with_images=False)
    assert not text_to_video.is_random() and "image_moments" not in text_to_video[0]


def test_without_image_latents_there_are_none(tmp_path):
    write_prepared(tmp_path, images=False)
    assert "image_moments" not in LatentDataset(tmp_path)[0]


def test_the_originals_folder_is_read_with_one_warning(tmp_path, caplog):
    names = ["a.mp4", "b.v1.mp4", "c.mp4"]
    write_original(tmp_path, names)
    latents = LatentDataset(tmp_path, caption_column="text", video_column="video")
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert latents.clip_buckets == [Bucket(9, 32, 48)] * 3 and latents.prompts == [f"caption {i}" for i in range(3)]
    for index in range(3):
        assert torch.equal(latents[index]["moments"], tensors_of(index)["moments"])
        assert torch.equal(latents[index]["prompt_embeds"], tensors_of(index)["prompt_embeds"])
        assert torch.equal(latents[index]["image_moments"], tensors_of(index)["image"][0])


def test_full_stems_win_over_cut_ones(tmp_path):
    write_original(tmp_path, ["a.mp4", "a.v1.mp4"])
    for folder, name in (("video_latents", "moments"), ("prompt_embeds", "prompt_embeds")):
        torch.save(tensors_of(0)[name], tmp_path / folder / "a.pt")
        torch.save(tensors_of(1)[name], tmp_path / folder / "a.v1.pt")
    latents = LatentDataset(tmp_path)
    assert all(torch.equal(latents[i]["moments"], tensors_of(i)["moments"]) for i in range(2))


@pytest.mark.parametrize(
    "names",
    [
        ["a.1.mp4", "b.mp4", "a.2.mp4"],
        ["one/a.mp4", "b.mp4", "two/a.mp4"],
        ["a.mp4", "b.mp4", "a.mp4"],  # with another caption, whose embedding cannot be there too
    ],
)
def test_two_clips_that_the_original_calls_alike_are_refused(tmp_path, names):
    write_original(tmp_path, [Path(name).name for name in names])
    (tmp_path / "videos.txt").write_text("".join(f"{name}\n" for name in names))
    message = error_of(LatentDataset, tmp_path)
    assert "rows 1 and 3" in message and names[0] in message and names[2] in message and "a.pt" in message


def test_a_clip_that_is_listed_twice_counts_twice(tmp_path):
    write_original(tmp_path, ["a.mp4", "b.mp4"])
    (tmp_path / "prompts.txt").write_text("one\ntwo\none\n")
    (tmp_path / "videos.txt").write_text("a.mp4\nb.mp4\na.mp4\n")
    assert LatentDataset(tmp_path).prompts == ["one", "two", "one"]


def test_a_pt_file_never_runs_code(tmp_path):
    write_original(tmp_path, ["a.mp4"])

    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    with open(tmp_path / "video_latents/a.pt", "wb") as file:
        pickle.dump(Canary(), file)
    assert "a.pt" in error_of(LatentDataset, tmp_path)
    assert not (tmp_path / "canary").exists()


def test_unknown_bucket_of_latents_names_file_size_and_flags(tmp_path):
    write_prepared(tmp_path)
    message = error_of(LatentDataset, tmp_path, buckets=[Bucket(49, 480, 720)])
    assert "unknown bucket" in message and "0.safetensors (9 frames of 32x48)" in message
    assert "--frame_buckets" in message


def test_missing_files_are_listed_at_once(tmp_path):
    write_prepared(tmp_path, count=9)
    for number in range(7):
        (tmp_path / f"video_latents/{number}.safetensors").unlink()
    message = error_of(LatentDataset, tmp_path)
    assert "7 in all" in message and "video_latents/4.safetensors" in message and "video_latents/5" not in message
    assert "prepare_dataset.py" in message


@pytest.mark.parametrize("damage", ["cut", "zero", "renamed"])
def test_a_damaged_file_says_what_to_do(tmp_path, damage):
    write_prepared(tmp_path)
    path = tmp_path / "video_latents/1.safetensors"
    if damage == "renamed":
        save_file({"other": torch.zeros(1)}, path)
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"")
    latents = LatentDataset(tmp_path)
    message = error_of(latents.__getitem__, 1)
    assert str(path) in message and "delete it and run prepare_dataset.py again" in message


def test_the_empty_prompt(tmp_path):
    write_prepared(tmp_path)
    message = error_of(LatentDataset, tmp_path, text_dropout=True)
    assert "_empty.safetensors" in message and "prepare_dataset.py" in message
    save_file({"prompt_embeds": torch.ones(7, 16)}, tmp_path / "prompt_embeds/_empty.safetensors")
    assert LatentDataset(tmp_path, text_dropout=True).empty_prompt_embeds().shape == (7, 16)


def test_latents_of_another_vae_are_refused(tmp_path):
    write_prepared(tmp_path)
    manifest = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[1]["metadata"]["scaling_factor"] = 1.15258426
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    LatentDataset(tmp_path, scaling_factor=1.15258426)
    assert "data.jsonl:2: prepared with another model's VAE" in error_of(LatentDataset, tmp_path, scaling_factor=0.7)


def test_image_to_video_needs_image_latents(tmp_path, caplog):
    write_prepared(tmp_path / "with")
    write_prepared(tmp_path / "without", images=False)
    LatentDataset(tmp_path / "with").require_image_latents()
    assert not caplog.records
    assert "again with --save_image_latents" in error_of(LatentDataset(tmp_path / "without").require_image_latents)


def test_another_id_token_is_refused(tmp_path):
    write_prepared(tmp_path, id_token="BW_STYLE")
    LatentDataset(tmp_path, id_token="BW_STYLE")
    LatentDataset(tmp_path)
    assert "--id_token BW_STYLE, not OTHER" in error_of(LatentDataset, tmp_path, id_token="OTHER")


def test_broken_manifests_name_the_line(tmp_path):
    rows = write_prepared(tmp_path)
    (tmp_path / "data.jsonl").write_text(json.dumps(rows[0]) + "\n{broken\n")
    assert "data.jsonl:2" in error_of(LatentDataset, tmp_path)
    for change in ({"video_latent": "../x.safetensors"}, {"metadata": {}}, {"video_latent": None}):
        write_manifest(tmp_path, [rows[0], rows[1] | change])
        assert "data.jsonl:2" in error_of(LatentDataset, tmp_path)


# ---------------------------------------------------------------- sampler and loader


def test_nothing_is_decoded_in_the_sampler(numbered, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr(videos_module, "read_frames", refuse)
    videos = VideoDataset(numbered, [NUMBERED], fps=16)
    sampler = BucketSampler(videos.clip_buckets, 2, seed=0, num_epochs=3)
    assert sum(map(len, sampler)) == 9
    with pytest.raises(AssertionError):
        videos[0]


def test_sampler_runs_on_through_the_epochs():
    clip_buckets = [Bucket(9, 32, 48)] * 5 + [Bucket(9, 48, 32)] * 3
    sampler = BucketSampler(clip_buckets, 2, seed=4, num_epochs=3)
    batches = list(sampler)
    assert batches == list(sampler) and len(sampler) == len(batches) == 15
    expected = [
        [8 * epoch + i for i in batch[0]] for epoch in range(3) for batch in pack_batches(clip_buckets, 2, 1, 4, epoch)
    ]
    assert batches == expected
    for epoch in range(3):
        assert sorted(key for batch in batches[5 * epoch : 5 * epoch + 5] for key in batch) == [
            8 * epoch + i for i in range(8)
        ]


def test_set_epoch_continues_where_the_loop_stood():
    clip_buckets = [Bucket(9, 32, 48)] * 5 + [Bucket(9, 48, 32)] * 3
    batches = list(BucketSampler(clip_buckets, 2, seed=4, num_epochs=3))
    sampler = BucketSampler(clip_buckets, 2, seed=4, num_epochs=3)
    for epoch in range(3):
        for consumed in range(6):
            sampler.set_epoch(epoch, consumed)
            assert list(sampler) == batches[5 * epoch + consumed :]
            assert len(sampler) == len(batches) - 5 * epoch - consumed


def test_an_epoch_of_fewer_batches_than_were_counted_is_no_endless_loop(monkeypatch):
    monkeypatch.setattr(loader, "pack_batches", lambda *arguments: pack_batches(*arguments)[:-1])
    with pytest.raises(IndexError):
        list(BucketSampler([(9, 64, 96)] * 5, 2, num_epochs=2))


def test_ranks_share_each_batch_and_repeats_are_logged_once(caplog):
    caplog.set_level(logging.INFO)
    clip_buckets = [Bucket(9, 32, 48)] * 5 + [Bucket(9, 48, 32)] * 3
    ranks = [list(BucketSampler(clip_buckets, 2, rank, 2, seed=4)) for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        assert len(first) == len(second) and clip_buckets[first[0]] == clip_buckets[second[0]]
    assert {key for batches in ranks for batch in batches for key in batch} == set(range(8))
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 8 clips are used twice per epoch, to fill 2 processes",
        "a bucket holds 3 clips, fewer than a batch of 4: its batches are smaller, no clip is left out",
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_the_workers(numbered, num_workers):
    videos = VideoDataset(numbered * 2, [NUMBERED], fps=16, random_flip=0.5, seed=1)
    sampler = BucketSampler(videos.clip_buckets, 2, seed=1, num_epochs=2)
    loader = make_loader(videos, sampler, num_workers, pin_memory=False)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    for batch, keys in zip(batches, sampler, strict=True):
        assert set(batch) == {"pixels", "prompt", "index"}
        assert batch["index"] == [key % 6 for key in keys]
        assert batch["prompt"] == [videos.prompts[index] for index in batch["index"]]
        assert torch.equal(batch["pixels"], torch.stack([videos[key]["pixels"] for key in keys]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_workers_error_arrives_as_one_line(tmp_path, num_workers):
    write_prepared(tmp_path)
    (tmp_path / "video_latents/1.safetensors").write_bytes(b"")
    latents = LatentDataset(tmp_path)
    message = error_of(latents.__getitem__, 1)
    assert error_of(list, make_loader(latents, [[0, 2], [1, 0]], num_workers)) == message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tolerant_loader_leaves_out_what_cannot_be_read(tmp_path, numbered, num_workers):
    damaged = bytearray(numbered[2].video.read_bytes())
    start = damaged.index(b"mdat") + 200
    size = damaged.index(b"moov") - start - 100
    damaged[start : start + size] = bytes(size)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    tall = tmp_path / "tall.mp4"
    encode_video(tall, np.zeros((9, 128, 32, 3), np.uint8), 16)
    clips = as_clips([numbered[0].video, tmp_path / "damaged.mp4", tall, numbered[1].video])
    videos = VideoDataset(clips, [NUMBERED, Bucket(9, 128, 32)], fps=16, on_problem="collect")
    assert not videos.problems
    batches = list(tolerant_loader(videos, [3, 2, 1, 0], 2, num_workers))
    assert [batch["index"] for batch in batches] == [[3], [0], [2]]
    problems = [line for batch in batches for line in batch["problems"]]
    assert len(problems) == 1 and "damaged.mp4" in problems[0] and "frames readable" in problems[0]


class Suicidal(torch.utils.data.Dataset):
    def __getitem__(self, key):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told_in_one_line():
    with pytest.raises(UserError, match="data worker was killed") as caught:
        list(make_loader(Suicidal(), [[0], [1]], 1))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- real and sample clips


def test_the_sample_data_loads(sample_data):
    clips = read_clips(sample_data, None, "prompts.txt", "videos.txt")
    videos = VideoDatasetWithResizing(clips, make_buckets([9], [32, 64], [32, 48, 64, 96]), fps=8)
    batches = list(make_loader(videos, BucketSampler(videos.clip_buckets, 2), 0))
    assert sorted(index for batch in batches for index in batch["index"]) == list(range(len(clips)))


def test_the_real_clips_load(real_clips):
    clips = read_clips(real_clips, None, "prompts.txt", "videos.txt")
    buckets = make_buckets([17, 49], [240, 480], [320, 432, 720])
    videos = VideoDatasetWithResizing(clips, buckets, fps=8)
    assert videos.clip_buckets[:3] == [Bucket(49, 480, 720)] * 3
    assert videos.clip_buckets[3] == Bucket(49, 240, 432) and videos.clip_buckets[5] == Bucket(49, 240, 432)
    sampler = BucketSampler(videos.clip_buckets, 2, seed=0)
    inside, workers = [list(make_loader(videos, sampler, count)) for count in (0, 2)]
    for one, other in zip(inside, workers, strict=True):
        assert torch.equal(one["pixels"], other["pixels"]) and one["prompt"] == other["prompt"]


# ---------------------------------------------------------------- from the flags


def training_args(**changes):
    values = {
        "data_root": None, "dataset_file": None, "caption_column": "text", "video_column": "video", "id_token": None,
        "load_tensors": False, "allow_outside_root": False, "text_dropout": 0.0, "frame_buckets": [9], "height_buckets": [32],
        "width_buckets": [128], "fps": 8, "skip_frames_start": 0, "skip_frames_end": 0, "random_flip": None,
        "max_num_frames": 49, "video_backend": "auto", "video_reshape_mode": None, "repeats": 1, "windows": None, "num_decode_threads": 0, "seed": 0,
        "verify": False,
    }  # fmt: skip
    return argparse.Namespace(**values | changes, given=sorted(changes))


def as_data_root(folder, clips):
    (folder / "prompts.txt").write_text("".join(f"{clip.prompt}\n" for clip in clips))
    (folder / "videos.txt").write_text("".join(f"{clip.video.name}\n" for clip in clips))
    for clip in clips:
        shutil.copy(clip.video, folder / clip.video.name)
    return {"data_root": str(folder), "caption_column": "prompts.txt", "video_column": "videos.txt"}


def model(fps=8):
    """What is asked of a text-to-video model."""
    vae_config = SimpleNamespace(scaling_factor=0.7)
    return SimpleNamespace(fps=fps, image_to_video=False, vae_config=vae_config, pipeline_class=TEXT_TO_VIDEO_PIPELINE)


def test_training_flags_choose_the_dataset(tmp_path, numbered):
    flags = as_data_root(tmp_path, numbered)
    args = training_args(**flags, id_token="TOK", video_reshape_mode="none")
    videos = build_dataset_from_args(args, model(fps=16), 5)
    assert type(videos) is VideoDataset and videos.prompts[0] == "TOK caption 0"
    videos = build_dataset_from_args(training_args(**flags, video_reshape_mode="random"), model(fps=16), 5)
    assert type(videos) is VideoDatasetWithResizeAndRectangleCrop and videos.crop == "random" and videos.seed == 5
    assert build_dataset_from_args(training_args(**flags), model(fps=16), 5).crop == "center"


def levels_of(name, caplog):
    return [record.levelname for record in caplog.records if record.name == name]


def test_fps_is_the_flag_where_given_and_else_the_checkpoints(tmp_path, numbered, caplog):
    caplog.set_level(logging.INFO)
    flags = as_data_root(tmp_path, numbered)
    assert build_dataset_from_args(training_args(**flags), model(fps=16), 0).fps == 16
    assert levels_of("data.dataset", caplog) == ["INFO"]
    caplog.clear()
    assert build_dataset_from_args(training_args(**flags, fps=10, frame_buckets=[5]), model(fps=16), 0).fps == 10
    assert levels_of("data.dataset", caplog) == ["WARNING"]


def test_prepared_data_is_held_against_buckets_only_where_they_are_given(tmp_path):
    write_prepared(tmp_path)
    assert len(build_dataset_from_args(training_args(data_root=tmp_path, load_tensors=True), model(), 0)) == 3
    args = training_args(data_root=tmp_path, load_tensors=True, frame_buckets=[49])
    assert "unknown bucket" in error_of(build_dataset_from_args, args, model(), 0)


def test_prepare_keeps_captions_and_collects_problems(tmp_path, numbered):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "root").mkdir()
    clips = [*numbered, Clip(tmp_path / "empty.mp4", "empty", 4, "empty.mp4")]
    args = training_args(**as_data_root(tmp_path / "root", clips), id_token="TOK")
    videos = build_videos_from_args(args, 16)
    assert videos.prompts == [clip.prompt for clip in numbered]
    assert len(videos.problems) == 1 and "empty.mp4: empty file" in videos.problems[0]


def test_a_folder_of_videos_is_no_prepared_one(sample_data):
    with pytest.raises(DataError, match="not a prepared folder.*prepare_dataset.py.*leave out --load_tensors"):
        LatentDataset(sample_data)


def test_a_batch_of_a_worker_that_has_just_died_is_its_death(monkeypatch):
    """The connection breaks first, then torch's handler of SIGCHLD says why."""

    def die(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def broken(loader):
        yield {"index": [0], "errors": []}
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    before = signal.signal(signal.SIGALRM, die)
    try:
        with pytest.raises(Interrupted, match="a data worker was killed"):
            list(make_loader([0], [[0]], num_workers=0))
    finally:
        signal.signal(signal.SIGALRM, before)
