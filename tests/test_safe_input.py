"""What a data or checkpoint folder of a stranger can do here: nothing. No code of it runs, nothing outside of it is read."""

import argparse
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from args import parse_prepare_args, parse_training_args
from base.errors import DataError, UserError
from base.files import write_manifest
from conftest import write_clip
from data.clip_lists import read_clips
from data.dataset import build_dataset_from_args, build_videos_from_args
from data.decode import read_frames
from data.latents import LatentDataset
from run import checkpoints
from run.checkpoints import write_checkpoint
from run.output_dir import open_output_dir
from synthetic_clips import probe
from test_atomic_save import FolderEngine, flags
from test_checkpointing import MAIN, PROVENANCE, make_state, run_in
from test_dataset import model


# ---------------------------------------------------------------- booby traps


class Trap:
    """Pickled, it makes a file as soon as it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.fixture
def canary(tmp_path):
    """A file that only a sprung trap makes."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def test_the_trap_works(tmp_path):
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "trap.pt")
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()


def original_folder(folder, tensors):
    """The original's layout, {file: content}."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("a\n")
    (folder / "videos.txt").write_text("videos/a.mp4\n")
    for name in ("video_latents", "prompt_embeds"):
        (folder / name).mkdir()
        torch.save(tensors.get(name, torch.zeros(4, 3, 4, 6)), folder / name / "a.pt")
    return folder


@pytest.mark.parametrize("name", ["video_latents", "prompt_embeds"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_trap_among_latents_is_not_sprung(name, nested, tmp_path, canary):
    trap = {"moments": Trap(canary), "tensor": torch.zeros(4, 3, 4, 6)} if nested else Trap(canary)
    folder = original_folder(tmp_path / "data", {name: trap})
    with pytest.raises(DataError, match=r"a\.pt"):
        LatentDataset(folder)[0]


def test_a_trap_under_a_safe_name_is_not_sprung(tmp_path, canary):
    folder = tmp_path / "data"
    (folder / "x").mkdir(parents=True)
    for name in ("moments", "prompt_embeds"):
        torch.save(Trap(canary), folder / f"x/{name}.safetensors")
    row = {"prompt": "a", "video": "a.mp4", "video_latent": "x/moments.safetensors"}
    row |= {"prompt_embed": "x/prompt_embeds.safetensors", "metadata": {"num_frames": 9, "height": 32, "width": 48}}
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"moments\.safetensors: damaged"):
        LatentDataset(folder)[0]


@pytest.mark.parametrize("hashed", [False, True])
def test_traps_in_a_checkpoint_are_not_sprung(hashed, tmp_path, canary):
    """Beside its files, and in their place, with a manifest that says all is well."""
    state = make_state(engine_class=FolderEngine)
    (tmp_path / "out").mkdir()
    path = write_checkpoint(tmp_path / "out", 3, state, PROVENANCE)
    shutil.copy(path / "manifest.json", tmp_path / "manifest.json")
    for name in ("optimizer.bin", "optimizer.pt", "random_states_0.pkl", "scheduler.bin", "training_args.bin"):
        torch.save(Trap(canary), path / name)
    assert checkpoints.load(path, state, PROVENANCE) == 3
    torch.save(Trap(canary), path / "optimizer.safetensors")
    if hashed:
        (path / "manifest.json").unlink()
        write_manifest(path)
    with pytest.raises((UserError, Exception), match=r"intact|header|HeaderTooLarge"):
        args = flags(tmp_path / "out")
        shutil.copy(path / "state.json", tmp_path / "out/args.json")  # any JSON: the checkpoint is what is tried
        checkpoints.load(checkpoints.find(args, run_in(tmp_path / "out"), 100, {}), state, PROVENANCE)


# ---------------------------------------------------------------- out of the folder


@pytest.fixture
def outside(tmp_path):
    """A video outside of tmp_path/root, and the root with one inside."""
    (tmp_path / "root/videos").mkdir(parents=True)
    write_clip(tmp_path / "outside.mp4", 9, 32, 48)
    write_clip(tmp_path / "root/videos/inside.mp4", 9, 32, 48)
    return tmp_path / "outside.mp4"


def listed(root, source):
    (root / "prompts.txt").write_text("a\n")
    (root / "videos.txt").write_text(f"{source}\n")
    return root, None, "prompts.txt", "videos.txt"


LEAVING = {
    "dots": lambda root, outside: "../outside.mp4",
    "dots within": lambda root, outside: "videos/../../outside.mp4",
    "absolute": lambda root, outside: str(outside),
    "link": lambda root, outside: (root / "videos/link.mp4").symlink_to(outside) or "videos/link.mp4",
    "linked folder": lambda root, outside: (root / "more").symlink_to(outside.parent) or "more/outside.mp4",
    "link to a link": lambda root, outside: (
        (root / "1.mp4").symlink_to(outside) or (root / "2.mp4").symlink_to(root / "1.mp4") or "2.mp4"
    ),
}


@pytest.mark.parametrize("way", LEAVING)
def test_a_path_that_leaves_the_folder_is_refused_unless_allowed(way, outside, tmp_path):
    root = tmp_path / "root"
    source = LEAVING[way](root, outside)
    with pytest.raises(DataError, match=r"videos\.txt:1: .*outside of.*--allow_outside_root"):
        read_clips(*listed(root, source))
    [clip] = read_clips(*listed(root, source), allow_outside=True)
    assert clip.video.samefile(outside)


def test_links_within_the_folder_and_to_the_folder_are_fine(outside, tmp_path):
    root = tmp_path / "root"
    (root / "link.mp4").symlink_to(root / "videos/inside.mp4")
    (root / "folder").symlink_to(root / "videos")
    (tmp_path / "dataset").symlink_to(root)
    for start in (root, tmp_path / "dataset"):
        for source in ("link.mp4", "folder/inside.mp4", "videos/../link.mp4", str(root / "link.mp4")):
            assert read_clips(*listed(start, source))[0].video.samefile(root / "videos/inside.mp4")


def is_refused(read, *given, match="", **options) -> bool:
    """True if `read` calls it bad data, in words that `match`."""
    try:
        read(*given, **options)
    except DataError as error:
        return re.search(match, str(error)) is not None
    return False


ADDRESSES = [
    "http://host/a.mp4", "https://host/a.mp4", "file:///etc/passwd", "file:a.mp4", "concat:a.mp4|b.mp4", "pipe:0",
    "rtsp://host/a", "data:video/mp4;base64,AA", "subfile,,start,0,end,9,,:a.mp4", "cache:a.mp4", "fd:0",
]  # fmt: skip


def test_addresses_and_protocols_are_never_read(outside, tmp_path):
    root = tmp_path / "root"
    for allow in (False, True):
        assert [
            source for source in ADDRESSES if not is_refused(read_clips, *listed(root, source), allow_outside=allow)
        ] == []


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {name}\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/9\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet><Representation>'
    "<BaseURL>{name}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "m3u": "{name}\n",
}


def test_a_list_of_other_files_is_no_video_whatever_it_calls_itself(outside, tmp_path):
    readers = (probe, lambda path: read_frames(path, [0.0]))
    accepted = []
    for suffix in ("mp4", "m3u8", "txt", "sdp", "mpd", "mkv"):
        path = tmp_path / f"root/list.{suffix}"
        for kind, text in PLAYLISTS.items():
            path.write_text(text.format(name=outside))
            accepted += [(kind, suffix) for read in readers if not is_refused(read, path, match=f"list.{suffix}")]
    assert accepted == []


def test_a_name_that_is_a_pattern_opens_no_other_file(tmp_path):
    for name in ("frame01.mp4", "frame%02d.mp4"):
        write_clip(tmp_path / name, 5 if name == "frame01.mp4" else 9, 32, 48)
    assert probe(tmp_path / "frame%02d.mp4").num_frames == 9
    (tmp_path / "a%02d.png").write_bytes(b"")
    with pytest.raises(DataError):
        probe(tmp_path / "a%02d.png")


# ---------------------------------------------------------------- prepared folders, and the flag


def prepared_folder(folder):
    folder.mkdir()
    row = {"prompt": "a", "video": "a.mp4", "metadata": {"num_frames": 9, "height": 32, "width": 48}}
    for key, name, shape in (("video_latent", "moments", (4, 3, 4, 6)), ("prompt_embed", "prompt_embeds", (7, 16))):
        save_file({name: torch.zeros(shape)}, folder / f"{name}.safetensors")
        row[key] = f"{name}.safetensors"
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_prepared_files_outside_are_refused_unless_allowed(tmp_path):
    folder = prepared_folder(tmp_path / "data")
    os.rename(folder / "moments.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "moments.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*link to .*--allow_outside_root"):
        LatentDataset(folder)
    assert len(LatentDataset(folder, allow_outside=True)) == 1

    original = original_folder(tmp_path / "original", {})
    os.rename(original / "video_latents/a.pt", tmp_path / "a.pt")
    (original / "video_latents/a.pt").symlink_to(tmp_path / "a.pt")
    with pytest.raises(DataError, match="link to .*--allow_outside_root"):
        LatentDataset(original)
    assert len(LatentDataset(original, allow_outside=True)) == 1


def test_the_flag_reaches_training_and_prepare(outside, tmp_path):
    root, *_ = listed(tmp_path / "root", "../outside.mp4")
    columns = ["--data_root", str(root), "--caption_column", "prompts.txt", "--video_column", "videos.txt"]
    columns += ["--height_buckets", "32", "--width_buckets", "48", "--frame_buckets", "9"]

    def train(*more):
        args = parse_training_args("t2v_lora", ["--pretrained_model_name_or_path", "m", *columns, *more])
        return build_dataset_from_args(args, model(), 0)

    def prepare(*more):
        return build_videos_from_args(parse_prepare_args([*columns, "--output_dir", "o", *more]), 8)

    for build in (train, prepare):
        with pytest.raises(DataError, match="--allow_outside_root"):
            build()
        assert len(build("--allow_outside_root")) == 1
    link = prepared_folder(tmp_path / "data")
    args = argparse.Namespace(**vars(parse_training_args("t2v_lora", [
        "--pretrained_model_name_or_path", "m", "--data_root", str(link), "--load_tensors", "--allow_outside_root",
    ])))  # fmt: skip
    assert len(build_dataset_from_args(args, model(), 0)) == 1


def test_a_run_resumes_nothing_from_a_folder_without_a_manifest(tmp_path):
    """A folder named like a checkpoint that something else made."""
    (tmp_path / "out/checkpoint-5").mkdir(parents=True)
    torch.save({"step": 5}, tmp_path / "out/checkpoint-5/state.json")
    (tmp_path / "out/args.json").write_text(json.dumps({"flags": vars(flags(tmp_path / "out")), "seed": 1}))
    with pytest.raises(UserError):
        open_output_dir(flags(tmp_path / "out"), MAIN)
        checkpoints.find(flags(tmp_path / "out"), run_in(tmp_path / "out"), 100, {})
