# ruff: noqa: F811 - fixtures of test_prepare are arguments here
"""A prepared folder over time: keys that cover all that decides a file, folders of earlier versions, leftovers."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prepare_dataset
from args import parse_prepare_args
from data.artifacts import recorded_key
from data.clip_lists import draw_keys
from data.prepared import SUFFIXES, FileKey, pixels_key
from data.videos import VideoDataset
from make_fixtures import PREPARED, prepare_argv
from run import prepare_plan
from test_fixtures import old  # noqa: F401
from test_prepare import (  # noqa: F401
    CAPTIONS,
    EVERYTHING,
    LATENTS,
    LISTS,
    PIXELS,
    arguments,
    contents,
    damage,
    data,
    five_clips,
    folders,
    info,
    prepare,
    prepared,
    prepared_once,
    refusal,
    rewritten,
    rows_of,
    stamps,
    stems,
    three_clips,
    write_lists,
)
from tiny_pipeline import TINY_TEXT_ENCODER, tiny_sizes, write_pipeline


# ---------------------------------------------------------------- what the key covers


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A pipeline whose text encoder is larger than a MiB, by the layers inside of its blocks; read-only."""
    folder = tmp_path_factory.mktemp("wide")
    write_pipeline(folder, "5b", tiny_sizes("5b") | {"text_encoder": TINY_TEXT_ENCODER | {"d_ff": 8192}})
    assert (folder / "text_encoder/model.safetensors").stat().st_size > 2 * 2**20
    return folder


@pytest.fixture
def own_model(wide_model, tmp_path):
    return shutil.copytree(wide_model, tmp_path / "model")


def scale_late_tensors(path):
    """1.5 times every tensor behind the first MiB; size and time of the file stay."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, entry in header.items():
        if name != "__metadata__" and start + entry["data_offsets"][0] > 2**20:
            place = slice(*(start + offset for offset in entry["data_offsets"]))
            values = torch.frombuffer(content[place], dtype=torch.bfloat16) * 1.5
            content[place] = values.view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    os.utime(path, ns=times)


def test_weights_behind_the_first_mib_count(prepare, own_model):
    out = prepare(*LATENTS, model=own_model)
    before, old = stamps(out), load_file(out / rows_of(out)[0]["prompt_embed"])["prompt_embeds"]
    scale_late_tensors(own_model / "text_encoder/model.safetensors")
    prepare(*LATENTS, model=own_model)
    assert folders(rewritten(out, before)) == {"prompt_embeds"} and len(rewritten(out, before)) == 4
    assert not torch.equal(load_file(out / rows_of(out)[0]["prompt_embed"])["prompt_embeds"], old)
    assert contents(out) == contents(prepare(*LATENTS, model=own_model, out="fresh"))


@pytest.mark.parametrize(
    ("name", "folder"),
    [("vae/diffusion_pytorch_model", "video_latents"), ("text_encoder/model", "prompt_embeds")],
    ids=["vae", "text_encoder"],
)
def test_of_variants_only_the_one_that_loads_counts(prepare, own_model, name, folder):
    whole = (own_model / f"{name}.safetensors").read_bytes()
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        shutil.copy(own_model / f"{part}.safetensors", own_model / f"{part}.fp16.safetensors")
    out = prepare(*LATENTS, model=own_model)
    before = stamps(out)
    tensors = load_file(own_model / f"{name}.fp16.safetensors")
    save_file({key: tensor * 1.5 for key, tensor in tensors.items()}, own_model / f"{name}.fp16.safetensors")
    (own_model / f"{name}.bin").write_bytes(b"not read beside safetensors")
    (own_model / f"{name.split('/')[0]}/README.md").write_text("not read")
    prepare(*LATENTS, model=own_model)
    assert rewritten(out, before) == set()
    prepare(*LATENTS, "--variant", "fp16", model=own_model)
    assert folder in folders(rewritten(out, before)) and (own_model / f"{name}.safetensors").read_bytes() == whole


def test_keys_of_pixels_tell_every_value_apart():
    """Also those that follow from a file's name today."""
    earlier = {"source": "1", "bucket": [5, 32, 48], "fps": 8, "reshape": None, "flip": None, "seed": 42}
    changes = {"source": "2", "bucket": [9, 32, 48], "fps": 16, "reshape": "random", "flip": 0.5, "seed": 1}
    keys = [pixels_key(earlier | {name: value}, "a.mp4/0/0", "pyav") for name, value in changes.items()]
    keys += [
        pixels_key(earlier, *rest) for rest in (("a.mp4/0/0", "pyav"), ("a.mp4/0/1", "pyav"), ("a.mp4/0/0", "decord"))
    ]
    assert all(key not in keys[:index] for index, key in enumerate(keys))


def test_the_decoder_counts(prepare, data, write_clip):
    pytest.importorskip("decord")
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_clip(data / name, 5, 32, 64)  # decord takes no width of 48
    flags = [*LATENTS, "--height_buckets", "32", "--width_buckets", "64", "--frame_buckets", "5", "--video_backend"]
    out = prepare(*flags, "auto")
    before = stamps(out)
    prepare(*flags, "pyav")
    assert rewritten(out, before) == set()
    prepare(*flags, "decord")
    assert folders(rewritten(out, before)) == {"video_latents"}


@pytest.mark.parametrize(
    "flags", [["--video_reshape_mode", "center"], ["--random_flip", "0"], ["--max_num_frames", "20"]]
)
def test_what_changes_no_pixel_costs_nothing(prepare, prepared, flags):
    before = stamps(prepared)
    prepare(*EVERYTHING, *flags)
    assert rewritten(prepared, before) == set()


@pytest.mark.parametrize("change", ["in front", "reversed", "removed"])
def test_other_rows_leave_every_file_as_it_is(prepare, data, write_clip, change, info):
    flags = [*EVERYTHING, "--random_flip", "0.5"]
    for name, frames in (("a.mp4", 30), ("b.mp4", 25), ("new.mp4", 40)):
        write_clip(data / name, frames, 32, 48, seed=frames)
    out = prepare(*flags)
    before = contents(out)
    rows = list(zip(CAPTIONS, ["a.mp4", "b.mp4", "c.mp4"], strict=True))
    rows = {"in front": [("New.", "new.mp4"), *rows], "reversed": rows[::-1], "removed": rows[1:]}[change]
    write_lists(data, *zip(*rows, strict=True))
    prepare(*flags)
    after = contents(out)
    assert {path for path in before if after[path] != before[path]} <= LISTS
    fresh = contents(prepare(*flags, out="fresh"))
    assert {path: after[path] for path in fresh} == fresh


def test_a_moved_data_folder_leaves_every_file_as_it_is(prepare, prepared, data, tiny, tmp_path):
    before = stamps(prepared)
    data.rename(tmp_path / "elsewhere")
    prepare_dataset.main(parse_prepare_args(arguments(tiny("5b"), tmp_path / "elsewhere", prepared, *EVERYTHING)))
    assert rewritten(prepared, before) == set()


def test_a_second_run_reads_no_video_and_no_weights_again(prepare, prepared, monkeypatch, tmp_path):
    from base import hashes

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -1.0)
    prepare(*EVERYTHING)
    monkeypatch.setattr(hashes, "file_hash", lambda path, algorithm: pytest.fail(f"{path} is read again"))
    prepare(*EVERYTHING)


# ---------------------------------------------------------------- folders of earlier versions


@pytest.fixture
def by_version_1(prepare, monkeypatch):
    """Prepare with the keys of version 1, and draw starts as it might have."""

    def run(*flags):
        with monkeypatch.context() as patches:
            patches.setattr(
                prepare_plan, "file_key", lambda now, before: FileKey(json.dumps(before, sort_keys=True), "")
            )
            patches.setattr(VideoDataset, "start_time", lambda self, epoch, index: 0.0)
            return prepare(*flags)

    return run


@pytest.fixture
def earlier(by_version_1):
    """The three clips as version 1 would have left them."""
    return by_version_1(*EVERYTHING)


def test_an_earlier_folder_is_kept_with_one_line_and_new_clips_join(prepare, earlier, data, write_clip, info):
    before = stamps(earlier)
    write_clip(data / "d.mp4", 5, 32, 48, seed=5)
    write_lists(data, ["New.", *CAPTIONS], ["d.mp4", "a.mp4", "b.mp4", "c.mp4"])
    info.clear()
    prepare(*EVERYTHING)
    assert (
        info.text.count("13 files were prepared by an earlier version and are kept; --verify checks them in full") == 1
    )
    assert "4 clips, 1 prepared now" in info.text and all("/d-" in path for path in rewritten(earlier, before))


def test_verify_makes_an_earlier_folder_again_and_counts_what_differed(prepare, earlier, info):
    path = earlier / rows_of(earlier)[1]["video_latent"]
    save_file({"moments": load_file(path)["moments"] + 1}, path, {"key": recorded_key(path)})
    prepare(*EVERYTHING, "--verify")  # b's latents, and all of c, which starts elsewhere now
    assert "--verify: 13 files of an earlier version were made again, 4 of them were different" in info.text
    assert contents(earlier) == contents(prepare(*EVERYTHING, out="fresh"))
    info.clear()
    before = stamps(earlier)
    prepare(*EVERYTHING, "--verify")
    assert "--verify: 0 files" in info.text and rewritten(earlier, before) == set()
    info.clear()
    prepare(*EVERYTHING)
    assert "earlier version" not in info.text


@pytest.mark.parametrize("name", PREPARED)
def test_folders_of_51e4482_are_verified_in_full(old, name, caplog):
    (old / name / "status.json").unlink()
    prepare_dataset.main(parse_prepare_args([*prepare_argv(name), "--verify"]))
    expected = {"prepared": 7, "prepared-images": 13}[name]
    assert f"--verify: {expected} files of an earlier version were made again" in caplog.text
    assert f"{name}: 3 clips, 3 prepared now" in caplog.text
    shutil.rmtree(old / name / "video_latents")
    made = contents(old / name)
    prepare_dataset.main(parse_prepare_args([*prepare_argv(name)]))
    assert made.items() <= contents(old / name).items()  # nothing but what was removed


def test_frames_of_two_versions_are_never_mixed(prepare, by_version_1):
    """First frames that are added later belong to the video beside them, wherever that one started."""
    out = by_version_1(*LATENTS)
    before = contents(out)
    prepare(*EVERYTHING)
    fresh = contents(prepare(*EVERYTHING, out="fresh"))
    assert {path for path in before if path.startswith("video_latents/c-") and before[path] != fresh[path]}
    assert {path for path in fresh if contents(out)[path] != fresh[path]} == {
        path
        for path in fresh
        if path.startswith("prompt_embeds/")  # kept, with their keys
    }


def test_other_settings_are_seen_in_an_earlier_folder_too(prepare, earlier):
    before = stamps(earlier)
    prepare(*EVERYTHING, "--dtype", "bf16")
    assert folders(rewritten(earlier, before)) == PIXELS | {"prompt_embeds"}


# ---------------------------------------------------------------- another set in the folder


def leftovers(caplog):
    return [
        record.getMessage() for record in caplog.records if "that this command does not use" in record.getMessage()
    ]


@pytest.fixture
def subset(data):
    """The list with the first clip alone."""
    write_lists(data, CAPTIONS[:1], ["a.mp4"])
    return data


def test_rows_that_go_are_said_and_their_files_stay(prepare, prepared, subset, info):
    before = contents(prepared)
    prepare(*EVERYTHING)
    (line,) = leftovers(info)
    assert "holds 10 files (of 2 clips)" in line and "--prune" in line and "another --output_dir" in line
    after = contents(prepared)
    assert after.keys() == before.keys() and [row["video"] for row in rows_of(prepared)] == [
        rows_of(prepared)[0]["video"]
    ]
    write_lists(subset, CAPTIONS, ["a.mp4", "b.mp4", "c.mp4"])
    info.clear()
    prepare(*EVERYTHING)
    assert contents(prepared) == before and "0 prepared now" in info.text and leftovers(info) == []


def test_prune_leaves_what_a_fresh_folder_would_hold(prepare, prepared, subset, info):
    prepare(*EVERYTHING, "--prune")
    assert "--prune: 10 files removed" in info.text and leftovers(info) == []
    assert contents(prepared) == contents(prepare(*EVERYTHING, out="fresh"))
    assert (prepared / "prompt_embeds/_empty.safetensors").exists()


def renamed(data):
    (data / "b.mp4").rename(data / "bb.mp4")
    write_lists(data, CAPTIONS, ["a.mp4", "bb.mp4", "c.mp4"])
    return [], 5


def without_previews_and_images(data):
    return LATENTS, 9


def listed_once_in_place_of_twice(data):
    write_lists(data, CAPTIONS[:1], ["a.mp4"])
    return [], 10


def another_token(data):
    return [*EVERYTHING, "--id_token", "TOK"], 0


@pytest.mark.parametrize(
    "change", [renamed, without_previews_and_images, listed_once_in_place_of_twice, another_token]
)
def test_whatever_left_files_behind(prepare, prepared, data, change, info):
    flags, count = change(data)
    flags = flags or EVERYTHING
    prepare(*flags)
    assert len(leftovers(info)) == bool(count) and (not count or f"holds {count} files (of " in leftovers(info)[0])
    prepare(*flags, "--prune")
    assert f"--prune: {count} files removed" in info.text
    assert contents(prepared) == contents(prepare(*flags, out="fresh"))


def test_files_of_a_clip_that_went_bad_stay_until_it_is_dropped(five_clips, three_clips, tiny, tmp_path, capsys, info):
    """It may be a network that was away: hours of encoding are not thrown away for that."""
    out = tmp_path / "out"
    whole = five_clips / "b.mp4"
    broken = whole.read_bytes()
    shutil.copy(three_clips / "b.mp4", whole)
    assert refusal(capsys, parse_prepare_args(arguments(tiny("5b"), five_clips, out, *LATENTS)))[0] == 65
    assert list(out.glob("video_latents/b-*"))
    whole.write_bytes(broken)
    assert refusal(capsys, parse_prepare_args(arguments(tiny("5b"), five_clips, out, *LATENTS, "--prune")))[0] == 65
    assert "--prune: nothing is removed while 3 clips are left out" in info.text
    assert list(out.glob("*/b-*")) and len(rows_of(out)) == 2
    write_lists(five_clips, [CAPTIONS[0], CAPTIONS[2]], ["a.mp4", "c.mp4"])
    prepare_dataset.main(parse_prepare_args(arguments(tiny("5b"), five_clips, out, *LATENTS, "--prune")))
    assert not list(out.glob("*/b-*")) and len(list(out.glob("video_latents/*"))) == len(rows_of(out)) == 2


def test_prune_touches_nothing_else(prepare, prepared, subset, tmp_path):
    """Only files of the kinds that preparing writes, named and marked as its own."""
    (latent, *_) = sorted((prepared / "video_latents").glob("b-*"))
    own = [
        prepared / "videos/holiday-0123abcd.mp4",
        prepared / "images/holiday-0123abcd.png",
        prepared / "video_latents/notes-0123abcd.txt",
        prepared / "video_latents/mine-0123abcd.safetensors",
        prepared / "video_latents/deep/b-0123abcd.safetensors",
        prepared / "video_latents/b.pt",
        prepared / "more/b-0123abcd.safetensors",
        prepared / "b-0123abcd.safetensors",
    ]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    save_file({"moments": torch.ones(1)}, prepared / "video_latents/unmarked-0123abcd.safetensors")
    shutil.copy(latent, prepared / "video_latents/unhashed.safetensors")
    shutil.copy(latent, tmp_path / "outside.safetensors")
    (prepared / "video_latents/link-0123abcd.safetensors").symlink_to(tmp_path / "outside.safetensors")
    own += [
        prepared / f"video_latents/{name}.safetensors" for name in ("unmarked-0123abcd", "unhashed", "link-0123abcd")
    ]
    shutil.move(prepared / "image_latents", tmp_path / "shared")
    (prepared / "image_latents").symlink_to(tmp_path / "shared")
    before = contents(tmp_path / "shared")
    prepare(*EVERYTHING, "--prune")
    assert all(path.exists() for path in own) and not latent.exists() and (tmp_path / "outside.safetensors").exists()
    assert contents(tmp_path / "shared") == before


@pytest.mark.parametrize("left", [1, 4])
def test_a_killed_prune_leaves_a_whole_folder_and_goes_on(prepare, prepared, subset, monkeypatch, left):
    unlink, removed = Path.unlink, []

    def killed(path, **options):
        if path.parent.name in SUFFIXES and not path.name.startswith(".tmp"):
            removed.append(path)
            if len(removed) > left:
                raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(Path, "unlink", killed)
        prepare(*EVERYTHING, "--prune")
    assert [row["metadata"]["source"] for row in rows_of(prepared)] == ["a.mp4"]
    prepare(*EVERYTHING, "--prune")
    assert contents(prepared) == contents(prepare(*EVERYTHING, out="fresh"))


def test_nothing_is_pruned_where_preparing_ended_early(prepare, prepared, data, write_clip, monkeypatch):
    write_clip(data / "d.mp4", 5, 32, 48, seed=5)
    write_lists(data, ["New."], ["d.mp4"])
    before = set(contents(prepared))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_dataset, "encode_videos", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(*EVERYTHING, "--prune")
    assert before - set(contents(prepared)) == {"data.jsonl"}


def test_verify_finds_a_latent_that_has_rotted(prepare, prepared, data, info):
    path = sorted((prepared / "video_latents").iterdir())[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    prepare(*EVERYTHING)
    assert "0 prepared now" in info.text
    prepare(*EVERYTHING, "--verify")
    assert "1 prepared now" in info.text and f"{path.name}: no longer what was written" in info.text
    assert path.read_bytes() == whole


def test_a_dot_before_a_source_is_no_other_source():
    assert draw_keys(["./a.mp4", "a.mp4", "b/../a.mp4"]) == draw_keys(["a.mp4"] * 3)
