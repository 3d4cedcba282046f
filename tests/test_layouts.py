"""Sets of clips as the tools write them: each is read as two text files with the same clips and captions are."""

import csv
import json
import logging
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prepare_dataset
from args import parse_prepare_args, parse_training_args
from base import files
from base.errors import DataError
from conftest import write_clip
from data.clip_lists import draw_keys, read_clips
from data.dataset import build_dataset_from_args
from data.layouts import CAPTION_FILES, METADATA, VIDEO_FILES, find_layout
from data.tables import CAPTION_COLUMNS, REPEATS_COLUMNS, VIDEO_COLUMNS


ROOT = Path(__file__).resolve().parents[1]
CLIPS = {
    "videos/dune.mp4": 'A red kite rises over the dunes, "against" the wind.',
    "videos/harbour.mp4": "Caf\u00e9 lights; a boat leaves the harbour at dusk, and its wake\tspreads.",
    "videos/loom.mp4": "NA",
}


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_pair(folder, clips, captions="prompts.txt", videos="videos.txt"):
    (folder / captions).write_text("".join(f"{caption}\n" for caption in clips.values()), encoding="utf-8")
    (folder / videos).write_text("".join(f"{name}\n" for name in clips), encoding="utf-8")


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def write_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_list(path, rows):
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


# ---------------------------------------------------------------- the tools' sets


def hub_csv(folder, clips):
    write_csv(folder / "metadata.csv", [("file_name", "text"), *clips.items()])


def hub_lines(folder, clips):
    write_lines(folder / "metadata.jsonl", [{"file_name": name, "caption": text} for name, text in clips.items()])


def hub_prompts(folder, clips):
    rows = [(name, text, index) for index, (name, text) in enumerate(clips.items())]
    write_csv(folder / "metadata.csv", [("file_name", "prompt", "label"), *rows])


def hub_subfolder(folder, clips):
    """The metadata is beside the videos, and its paths are relative to itself."""
    rows = [(os.path.basename(name), text) for name, text in clips.items()]
    write_csv(folder / "videos/metadata.csv", [("file_name", "text"), *rows])


def musubi_lines(folder, clips):
    """musubi-tuner's video_jsonl_file: absolute paths."""
    rows = [{"video_path": str(folder / name), "caption": text} for name, text in clips.items()]
    write_lines(folder / "dataset.jsonl", rows)


def videox_fun_list(folder, clips):
    rows = [{"file_path": name, "text": text, "type": "video"} for name, text in clips.items()]
    write_list(folder / "json_of_internal_datasets.json", rows)


def path_list(folder, clips):
    write_list(folder / "metadata.json", [{"video_path": name, "caption": text} for name, text in clips.items()])


def msr_vtt_list(folder, clips):
    rows = [
        {"video_id": f"video{i}", "video": name, "caption": text, "category": i, "start time": 0.5}
        for i, (name, text) in enumerate(clips.items())
    ]
    write_list(folder / "msrvtt_test_1k.json", rows)


def sidecars(folder, clips, suffix=".txt", end="\n"):
    for name, text in clips.items():
        (folder / name).with_suffix(suffix).write_bytes(f"{text}{end}".encode())


def diffusion_pipe(folder, clips):
    sidecars(folder, clips)
    (folder / "dataset.toml").write_text(f'resolutions = [512]\n[[directory]]\npath = "{folder}"\n')


def kohya(folder, clips):
    sidecars(folder, clips, ".caption", "\r\n")


def comma_csv(folder, clips):
    write_csv(folder / "clips.csv", [("path", "text"), *clips.items()])


def semicolon_csv(folder, clips):
    """As spreadsheets write it where the comma separates decimals."""
    write_csv(folder / "clips.csv", [("Video", "Caption"), *clips.items()], ";")


def tab_csv(folder, clips):
    write_csv(folder / "clips.tsv", [("video", "prompt"), *clips.items()], "\t")


TOOLS = [
    hub_csv, hub_lines, hub_prompts, hub_subfolder, musubi_lines, videox_fun_list, path_list, msr_vtt_list, sidecars,
    diffusion_pipe, kohya, comma_csv, semicolon_csv, tab_csv,
]  # fmt: skip
COLUMNS = {
    "hub_csv": "captions in text, videos in file_name",
    "musubi_lines": "captions in caption, videos in video_path",
    "kohya": "captions in NAME.caption beside each",
    "semicolon_csv": "captions in Caption, videos in Video",
}


@pytest.fixture
def folder(tmp_path):
    touch(tmp_path / "clips", CLIPS)
    return tmp_path / "clips"


def as_read(clips, root):
    return [(clip.video.relative_to(root), clip.prompt, clip.stable_name, clip.repeats) for clip in clips]


def expected(tmp_path, clips=CLIPS):
    """The same clips, read from two text files."""
    root = tmp_path / "as-text"
    touch(root, clips)
    write_pair(root, clips)
    return as_read(read_clips(root, None, "prompts.txt", "videos.txt"), root)


def error_of(function, *arguments, **options):
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_a_set_is_found_and_read_like_two_text_files(tool, folder, tmp_path, caplog):
    tool(folder, CLIPS)
    caplog.set_level(logging.INFO)
    clips = read_clips(folder, None)
    assert as_read(clips, folder) == expected(tmp_path)
    [line] = caplog.messages  # the explicit columns of `expected` say nothing
    assert line.startswith(f"{folder}: found ") and ": 3 clips, " in line
    assert line.endswith(COLUMNS.get(tool.__name__, ""))


@pytest.mark.parametrize("videos", ["videos.txt", "video.txt"])
@pytest.mark.parametrize("captions", ["prompts.txt", "prompt.txt", "captions.txt", "caption.txt"])
def test_two_text_files_are_found_by_any_usual_name(captions, videos, folder, tmp_path):
    write_pair(folder, CLIPS, captions, videos)
    assert as_read(read_clips(folder, None), folder) == expected(tmp_path)
    assert read_clips(folder, None, captions) == read_clips(folder, None, None, videos) == read_clips(folder, None)


@pytest.mark.parametrize(
    "tool", [musubi_lines, videox_fun_list, semicolon_csv, hub_lines], ids=lambda tool: tool.__name__
)
def test_a_table_that_is_named_is_read_without_naming_its_columns(tool, folder, tmp_path):
    tool(folder, CLIPS)
    [table] = [path for path in folder.iterdir() if path.is_file()]
    for data_root in (None, folder):
        assert as_read(read_clips(data_root, table), folder) == expected(tmp_path)


def test_columns_of_any_name_are_read_where_they_are_given(folder, tmp_path):
    rows = [{"clip": name, "long": text, "text": "short"} for name, text in CLIPS.items()]
    write_lines(folder / "list.jsonl", rows)
    assert as_read(read_clips(folder, folder / "list.jsonl", "long", "clip"), folder) == expected(tmp_path)
    write_csv(folder / "list.csv", [("video", "text", "caption"), *((n, "short", t) for n, t in CLIPS.items())])
    assert as_read(read_clips(folder, folder / "list.csv", "caption"), folder) == expected(tmp_path)


def test_several_captions_of_a_clip_are_several_samples(folder, tmp_path):
    """As in MSR-VTT's training annotations."""
    write_list(folder / "train.json", [{"video": name, "caption": [text, "again"]} for name, text in CLIPS.items()])
    clips = read_clips(folder, None)
    assert [clip.prompt for clip in clips] == [text for own in CLIPS.values() for text in (own, "again")]
    assert len(set(draw_keys(clip.stable_name for clip in clips))) == 6


def test_sibling_folders_with_metadata_are_one_set(folder):
    for name in ("birds", "boats"):
        touch(folder, [f"{name}/a.mp4"])
        write_lines(folder / name / "metadata.jsonl", [{"file_name": "a.mp4", "text": name}])
    assert [(clip.source, clip.prompt) for clip in read_clips(folder, None)] == [
        ("birds/a.mp4", "birds"), ("boats/a.mp4", "boats"),
    ]  # fmt: skip


def test_what_lies_in_a_hidden_or_prepared_folder_is_no_clip(folder):
    sidecars(folder, CLIPS)
    for inner in (".cache", "prepared"):
        touch(folder, [f"{inner}/x.mp4", f"{inner}/x.txt", f"{inner}/metadata.csv", f"{inner}/data.jsonl"])
    touch(folder, ["videos/._dune.mp4"])
    assert [clip.source for clip in read_clips(folder, None)] == list(CLIPS)


def test_an_image_is_a_clip_where_it_has_a_caption_and_is_no_thumbnail(folder):
    sidecars(folder, CLIPS)
    touch(folder, ["videos/dune.jpg", "videos/cover.png", "stills/fox.webp"])
    sidecars(folder, {"stills/fox.webp": "a fox"})
    assert [clip.source for clip in read_clips(folder, None)] == ["stills/fox.webp", *CLIPS]


# ---------------------------------------------------------------- what could be two things


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (write_pair, hub_csv, ["prompts.txt + videos.txt", "metadata.csv", "--caption_column prompts.txt", "--dataset_file"]),
        (write_pair, sidecars, ["prompts.txt + videos.txt", "a .txt beside each", "--caption_column .txt"]),
        (hub_csv, hub_lines, ["metadata.csv", "metadata.jsonl"]),
        (sidecars, kohya, ["a .txt beside each", "a .caption beside each"]),
        (comma_csv, musubi_lines, ["clips.csv, CSV", "dataset.jsonl, JSON Lines"]),
    ],
)  # fmt: skip
def test_two_lists_of_other_clips_or_captions_are_both_named(first, second, named, folder):
    for clips in (CLIPS | {"videos/loom.mp4": "other words"}, dict(list(CLIPS.items())[:2])):
        first(folder, CLIPS)
        second(folder, clips)
        message = error_of(read_clips, folder, None)
        assert all(name in message for name in named) and "could be meant" in message
        for path in (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".mp4"):
            path.unlink()


def test_what_an_ambiguous_folder_advises_works(folder):
    mine = [{name: f"{text} ({tool})" for name, text in CLIPS.items()} for tool in range(3)]
    write_pair(folder, mine[0])
    sidecars(folder, mine[1])
    hub_csv(folder, mine[2])
    assert "could be meant" in error_of(read_clips, folder, None)
    advised = [(None, "prompts.txt", "videos.txt"), (None, ".txt", None), (folder / "metadata.csv", None, None)]
    for choice, clips in zip(advised, mine, strict=True):
        assert [(clip.source, clip.prompt) for clip in read_clips(folder, *choice)] == list(clips.items())


@pytest.mark.parametrize("more", [[hub_csv], [sidecars], [musubi_lines], [sidecars, kohya, semicolon_csv, hub_lines]])
@pytest.mark.parametrize("turn", [list, reversed], ids=["same order", "other order"])
def test_lists_of_the_same_clips_are_one_in_the_order_of_the_text_files(more, turn, folder, caplog):
    caplog.set_level(logging.INFO)
    write_pair(folder, dict(turn(CLIPS.items())))
    for tool in more:
        tool(folder, CLIPS)
    assert [(clip.source, clip.prompt) for clip in read_clips(folder, None)] == list(turn(CLIPS.items()))
    [line] = caplog.messages
    assert line.startswith(f"{folder}: found prompts.txt + videos.txt and ")
    assert "which agree: 3 clips, captions in prompts.txt, videos in videos.txt" in line
    assert line.count(" and ") == len(more)


def test_of_three_lists_two_that_agree_are_named_as_one(folder):
    write_pair(folder, CLIPS)
    hub_csv(folder, CLIPS)
    sidecars(folder, dict.fromkeys(CLIPS, "another"))
    message = error_of(read_clips, folder, None)
    assert "prompts.txt + videos.txt and metadata.csv, CSV, which agree (--caption_column prompts.txt" in message
    assert " or videos with a .txt beside each (--caption_column .txt)" in message


@pytest.mark.parametrize("repeats", ["", "1", "2"])
def test_a_list_that_repeats_clips_says_more_than_text_files(repeats, folder):
    write_pair(folder, CLIPS)
    write_csv(folder / "clips.csv", [("path", "text", "repeats"), *((*item, repeats) for item in CLIPS.items())])
    if repeats:
        assert "could be meant" in error_of(read_clips, folder, None)
    else:
        assert len(read_clips(folder, None)) == 3


def test_a_list_that_cannot_be_read_agrees_with_none(folder):
    write_pair(folder, CLIPS)
    write_csv(folder / "metadata.csv", [("file_name", "text"), *CLIPS.items(), ("one field",)])
    assert "could be meant" in error_of(read_clips, folder, None)


def test_the_sample_clips_need_no_columns(sample_data):
    """They have two text files and a CSV."""
    assert len(read_clips(sample_data, None)) == 6


@pytest.mark.parametrize("folders", [("train", "test"), ("", "more")])
def test_splits_and_nested_metadata_are_not_thrown_together(folders, tmp_path):
    for name in folders:
        touch(tmp_path / name, ["a.mp4"])
        write_csv(tmp_path / name / "metadata.csv", [("file_name", "text"), ("a.mp4", "a")])
    message = error_of(read_clips, tmp_path, None)
    assert all(str(os.path.join(name, "metadata.csv")) in message for name in folders)
    assert len(read_clips(tmp_path / folders[1], None)) == 1


def test_two_columns_that_could_be_meant_are_both_named(folder):
    write_csv(folder / "metadata.csv", [("file_name", "text", "prompt"), *((n, t, t) for n, t in CLIPS.items())])
    message = error_of(read_clips, folder, None)
    assert "text and prompt could both be meant; choose one with --caption_column" in message
    assert [clip.prompt for clip in read_clips(folder, None, "prompt")] == list(CLIPS.values())


# ---------------------------------------------------------------- what is not read


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("data/train-00000-of-00001.parquet", "a Parquet table; write its columns as metadata.csv"),
        ("data-00000-of-00001.arrow", "an Arrow table of the datasets library"),
        ("dataset.toml", "another trainer's TOML config, not a list of clips; give the folder of clips"),
        ("config.yaml", "another trainer's YAML config"),
        ("shard-000000.tar", "a WebDataset shard; unpack it (for shard in *.tar; do tar -xf $shard; done)"),
    ],
)
def test_what_is_not_supported_is_called_what_it_is(name, sentence, folder):
    touch(folder, [name])
    for arguments in ((folder, None), (folder, folder / name)):
        message = error_of(read_clips, *arguments)
        assert message.startswith(f"{folder / name}: ") and sentence in message


def test_an_unpacked_shard_is_read(tmp_path):
    """The advice on WebDataset, followed: pairs of the same name, with a .json that does not matter."""
    touch(tmp_path, ["000.mp4", "001.mp4"])
    for stem in ("000", "001"):
        (tmp_path / f"{stem}.txt").write_text(f"caption {stem}")
        write_list(tmp_path / f"{stem}.json", {"key": stem, "caption": f"caption {stem}", "status": "success"})
    touch(tmp_path, ["shard-000000.tar"])
    assert [clip.prompt for clip in read_clips(tmp_path, None)] == ["caption 000", "caption 001"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metadata.csv", "file_name,label\nvideos/dune.mp4,3\n", "none of its columns (file_name, label) is called text"),
        ("metadata.csv", "file_name,text\n", "no rows below the header"),
        ("metadata.jsonl", '{"file_name": "a.mp4"\n', "metadata.jsonl:1: not JSON"),
        ("metadata.jsonl", "[1, 2]\n", "metadata.jsonl:1: not a JSON object"),
        ("metadata.jsonl", "\n\n", "metadata.jsonl: no clips"),
        ("list.json", '{\n "videos": []\n}\n', "list.json: one JSON object over several lines"),
        ("list.json", "[" * 100_000, "list.json: JSON nested too deeply"),
        ("metadata.jsonl", '{"file_name": "videos/dune.mp4", "text": 7}', "metadata.jsonl:1: 'text' is 7, not a text"),
        ("metadata.jsonl", '{"file_name": ["a"], "text": "b"}', "'file_name' is [\"a\"], not a text"),
        ("metadata.jsonl", '{"file_name": "a", "text": null}', "metadata.jsonl:1: blank caption"),
        ("metadata.jsonl", '{"file_name": "a", "text": "b"}\n{"text": "b"}', "metadata.jsonl:2: blank video path"),
        ("metadata.jsonl", '{"file_name": "a", "text": "\\ud800"}', "half of a character"),
        ("metadata.jsonl", '{"file_name": "https://x/a.mp4", "text": "b"}', "is a URL or protocol"),
        ("metadata.jsonl", '{"file_name": "../../a.mp4", "text": "b"}', "outside of"),
        ("metadata.jsonl", '{"file_name": "gone.mp4", "text": "b"}', "'gone.mp4' (row 1) not found"),
    ],
)  # fmt: skip
def test_mistakes_in_a_table_are_named(name, content, sentence, folder):
    (folder / name).write_text(content)
    message = error_of(read_clips, folder, None)
    assert message.startswith(str(folder / name)) and sentence in message


def test_a_folder_without_a_list_is_told_what_is_read(folder):
    message = error_of(read_clips, folder, None)
    assert (
        "no list of clips was found" in message and "prompts.txt" in message and "a .txt beside each video" in message
    )


def test_clips_without_a_caption_beside_them_are_named(folder):
    sidecars(folder, CLIPS)
    (folder / "videos/loom.txt").unlink()
    (folder / "videos/dune.txt").write_text("\n")
    assert "no .txt with a caption beside videos/loom.mp4" in error_of(read_clips, folder, None)
    captions = [clip.prompt for clip in read_clips(folder, None, blank_captions=True)]
    assert captions == ["", CLIPS["videos/harbour.mp4"], ""]
    touch(folder, ["videos/loom.txt"])
    assert "dune.txt:1: blank caption" in error_of(read_clips, folder, None)


@pytest.mark.parametrize("tool", [sidecars, hub_csv], ids=lambda tool: tool.__name__)
def test_captions_outside_of_the_folder_are_not_read(tool, folder, tmp_path):
    """A downloaded set must not choose which files of this machine become captions."""
    tool(folder, CLIPS)
    text = folder / ("videos/dune.txt" if tool is sidecars else "metadata.csv")
    shutil.move(text, tmp_path / "elsewhere")
    text.symlink_to(tmp_path / "elsewhere")
    assert f"outside of {folder}" in error_of(read_clips, folder, None)
    assert len(read_clips(folder, None, allow_outside=True)) == 3


def test_a_prepared_folder_is_no_list_in_json_lines(folder):
    """Its data.jsonl names latents; the text files beside it are read, as they were."""
    write_pair(folder, CLIPS)
    write_lines(
        folder / "data.jsonl", [{"video": name, "prompt": text, "video_latent": "x"} for name, text in CLIPS.items()]
    )
    assert find_layout(folder, None).name == "prompts.txt + videos.txt"


# ---------------------------------------------------------------- repeats


BUCKETS = ["--height_buckets", "64", "--width_buckets", "64", "96", "--frame_buckets", "9"]


@pytest.mark.parametrize("name", ["repeats", "num_repeats"])
def test_a_column_says_how_often_a_clip_is_used(name, folder):
    rows = zip(CLIPS, CLIPS.values(), ["3", "", "1"], strict=True)
    write_csv(folder / "metadata.csv", [("file_name", "text", name), *rows])
    assert [clip.repeats for clip in read_clips(folder, None)] == [3, 1, 1]
    assert [clip.repeats for clip in read_clips(folder, None, repeats=2)] == [3, 2, 1]


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "two", 10_001, "9" * 5000])
def test_repeats_that_are_no_count_are_refused(value, folder):
    write_lines(folder / "metadata.jsonl", [{"file_name": "videos/dune.mp4", "text": "a", "repeats": value}])
    assert "give an integer from 1 to 10000" in error_of(read_clips, folder, None)


@pytest.fixture(scope="module")
def filmed(once):
    """Three real clips of two sizes, without a list."""

    def build(folder):
        for number, (name, width) in enumerate(zip(CLIPS, (96, 64, 96), strict=True)):
            (folder / name).parent.mkdir(exist_ok=True)
            write_clip(folder / name, 12, 64, width, seed=number)

    return once("filmed", build)


def set_of(tool, filmed, folder):
    shutil.copytree(filmed, folder)
    tool(folder, CLIPS)
    return folder


def prepare(model, root, out, *flags):
    argv = ["--model_id", str(model), "--data_root", str(root), "--output_dir", str(out), *BUCKETS, *flags]
    prepare_dataset.main(parse_prepare_args([*argv, "--save_latents_and_embeddings"]))
    files.release_locks()
    written = [path for path in out.rglob("*") if path.suffix in (".safetensors", ".jsonl", ".txt")]
    return {str(path.relative_to(out)): path.read_bytes() for path in written}


def test_preparing_any_layout_writes_the_same_files(filmed, tiny, tmp_path):
    """Latents, embeddings and the manifest, byte for byte."""
    tools = write_pair, diffusion_pipe, videox_fun_list, semicolon_csv
    made = []
    for tool in tools:
        root = set_of(tool, filmed, tmp_path / tool.__name__)
        made.append(prepare(tiny("5b"), root, tmp_path / f"{tool.__name__}-prepared"))
    assert sum(name.startswith("video_latents/") for name in made[0]) == 3
    assert all(other == made[0] for other in made[1:])


def raw_args(root, *flags):
    """For any of the training scripts."""
    buckets = [] if "--load_tensors" in flags else BUCKETS
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", str(root), *buckets, *flags]
    return parse_training_args("t2v_lora", argv)


def dataset(root, *flags, **options):
    model = SimpleNamespace(fps=8, image_to_video=False, vae_config=SimpleNamespace(scaling_factor=None))
    return build_dataset_from_args(raw_args(root, *flags), model, 5, **options)


def test_raw_training_reads_any_layout_alike(filmed, tmp_path):
    pair, others = [dataset(set_of(tool, filmed, tmp_path / tool.__name__)) for tool in (write_pair, kohya)]
    assert pair.fingerprint() == others.fingerprint() and pair.hash_files() == others.hash_files()
    for index in range(3):
        one, other = pair[index + 3], others[index + 3]
        assert torch.equal(one["pixels"], other["pixels"]) and one["prompt"] == other["prompt"]


def test_repeated_clips_are_drawn_anew_but_prepared_once(filmed, tiny, tmp_path):
    """Raw and prepared training repeat the same clips, and a clip's first use is drawn as without repeats."""
    root = tmp_path / "clips"
    shutil.copytree(filmed, root)
    plain = dataset(set_of(hub_csv, filmed, tmp_path / "plain"))
    rows = zip(CLIPS, CLIPS.values(), ["3", "", "1"], strict=True)
    write_csv(root / "metadata.csv", [("file_name", "text", "repeats"), *rows])
    raw = dataset(root, "--repeats", "2")
    names = list(CLIPS)
    assert raw.sources == [names[0]] * 3 + [names[1]] * 2 + [names[2]]
    assert len(set(raw.draw_keys)) == 6 and {raw.draw_keys[place] for place in (0, 3, 5)} == set(plain.draw_keys)
    assert len({raw.start_time(epoch, 0) == raw.start_time(epoch, 1) for epoch in range(20)}) == 2
    assert raw.fingerprint() != plain.fingerprint()
    assert [raw[index]["prompt"] for index in range(6)] == raw.prompts

    made = prepare(tiny("5b"), root, tmp_path / "out", "--repeats", "2")
    assert sum(name.startswith("video_latents/") for name in made) == 3
    latents = dataset(tmp_path / "out", "--load_tensors")
    assert latents.sources == raw.sources and latents.draw_keys == raw.draw_keys
    assert latents.prompts == raw.prompts and latents.clip_buckets == raw.clip_buckets
    assert latents[1]["moments"].equal(latents[0]["moments"])
    held_out = dataset(root, as_listed=True), dataset(tmp_path / "out", "--load_tensors", as_listed=True)
    assert [data.sources for data in held_out] == [names, names]


def test_repeats_of_prepared_clips_may_be_given_when_training(filmed, tiny, tmp_path):
    prepare(tiny("5b"), set_of(hub_csv, filmed, tmp_path / "clips"), tmp_path / "out")
    manifest = tmp_path / "out/data.jsonl"
    assert "repeats" not in manifest.read_text()
    assert len(dataset(tmp_path / "out", "--load_tensors", "--repeats", "4")) == 12
    for wrong in ('"two"', "0", "2.5", "1000000"):
        text = manifest.read_text().replace('"num_frames"', f'"repeats": {wrong}, "num_frames"')
        (tmp_path / "out/data.jsonl").write_text(text)
        assert "prepare_dataset.py" in error_of(dataset, tmp_path / "out", "--load_tensors")
        manifest.write_text(text.replace(f'"repeats": {wrong}, ', ""))


def test_preparing_again_with_other_repeats_rewrites_the_list_alone(filmed, tiny, tmp_path):
    root = set_of(hub_csv, filmed, tmp_path / "clips")
    before = prepare(tiny("5b"), root, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    after = prepare(tiny("5b"), root, tmp_path / "out", "--repeats", "2")
    assert {name for name in after if after[name] != before[name]} == {"data.jsonl"}
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert len(dataset(tmp_path / "out", "--load_tensors")) == 6


# ---------------------------------------------------------------- windows


@pytest.fixture(scope="module")
def long_clip(once):
    """A clip of 40 frames at 8 per second, and one of 9, with two text files."""

    def build(folder):
        write_clip(folder / "long.mp4", 40, 64, 96, seed=1)
        write_clip(folder / "short.mp4", 9, 64, 96, seed=2)
        write_pair(folder, {"long.mp4": "a long clip", "short.mp4": "a short one"})

    return once("long-clip", build)


def test_windows_are_the_clip_cut_into_pieces(long_clip):
    """Of 40 frames four windows of 9, one after the other, and four frames that fill none."""
    cut = dataset(long_clip, "--windows", "all", "--fps", "8")
    assert cut.sources == ["long.mp4"] * 4 + ["short.mp4"]
    whole = dataset(long_clip, "--frame_buckets", "40", "9", "--fps", "8")
    frames = whole[0]["pixels"]
    for epoch in (0, 3):  # nothing is drawn
        windows = [cut[epoch * len(cut) + number]["pixels"] for number in range(4)]
        assert torch.equal(torch.cat(windows), frames[:36])
    assert torch.equal(cut[4]["pixels"], whole[1]["pixels"]) and not cut.is_random()
    assert len(set(cut.draw_keys)) == 5
    assert cut.fingerprint() != dataset(long_clip, "--fps", "8").fingerprint()


@pytest.mark.parametrize(("most", "starts"), [("1", [0]), ("2", [0, 18]), ("3", [0, 9, 18]), ("9", [0, 9, 18, 27])])
def test_fewer_windows_than_fit_are_spread_over_the_clip(most, starts, long_clip):
    cut = dataset(long_clip, "--windows", most, "--fps", "8")
    assert [clip.window for clip in cut.clips if clip.source == "long.mp4"] == starts
    later = dataset(long_clip, "--windows", most, "--fps", "8", "--skip_frames_start", "4", "--frame_buckets", "5")
    assert later.start_time(0, 0) == 4 / 8


@pytest.mark.parametrize(
    ("fps", "starts"), [("4", [0, 18]), ("16", [0, 5, 9, 14, 18, 23, 27, 32]), ("7", [0, 11, 21])]
)
def test_windows_do_not_overlap_at_any_rate(fps, starts, long_clip):
    cut = dataset(long_clip, "--windows", "all", "--fps", fps, "--frame_buckets", "9", "5")
    windows = [clip.window for clip in cut.clips if clip.source == "long.mp4"]
    assert windows == starts
    last = windows[-1] + 8 * 8 / int(fps)
    assert last <= 39 and all(two - one >= 8 * 8 / int(fps) for one, two in zip(windows, windows[1:], strict=False))


def test_windows_are_prepared_as_they_are_trained_raw(long_clip, tiny, tmp_path):
    flags = ["--windows", "all", "--repeats", "2"]
    made = prepare(tiny("5b"), long_clip, tmp_path / "out", *flags)
    names = sorted(name.split("/")[1] for name in made if name.startswith("video_latents/"))
    assert [re.sub("-[0-9a-f]{8}", "", name) for name in names] == [
        "long@0.safetensors", "long@18.safetensors", "long@27.safetensors", "long@9.safetensors", "short@0.safetensors",
    ]  # fmt: skip
    latents, raw = dataset(tmp_path / "out", "--load_tensors"), dataset(long_clip, *flags)
    assert latents.draw_keys == raw.draw_keys and latents.sources == raw.sources and len(latents) == 10
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert prepare(tiny("5b"), long_clip, tmp_path / "out", *flags) == made
    prepare(tiny("5b"), long_clip, tmp_path / "out", "--windows", "2")  # two of those that are there
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    prepare(tiny("5b"), long_clip, tmp_path / "out", "--windows", "2", "--prune")
    assert len(list((tmp_path / "out/video_latents").iterdir())) == 3


def test_held_out_clips_are_not_cut(long_clip):
    assert len(dataset(long_clip, "--windows", "all", as_listed=True)) == 2


@pytest.mark.parametrize("value", ["0", "-1", "most", "1.5", ""])
def test_a_number_of_windows_that_is_none_is_refused(value, long_clip, capsys):
    with pytest.raises(SystemExit):
        raw_args(long_clip, "--windows", value)
    assert "must be an integer of 1 or more, or all" in capsys.readouterr().err


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("page", ["dataset.md", "dataset_zh.md"])
def test_the_examples_of_the_page_are_read(page, tmp_path):
    text = (ROOT / "assets" / page).read_text(encoding="utf-8")
    examples = re.findall(r"```(csv|jsonl|json)\n(.*?)```", text, re.DOTALL)
    assert sorted(kind for kind, _ in examples) == ["csv", "json", "jsonl"]
    for kind, content in examples:
        touch(tmp_path / kind, ["videos/kite.mp4"])
        (tmp_path / kind / f"metadata.{kind}").write_text(content, encoding="utf-8")
        [clip] = read_clips(tmp_path / kind, None)
        assert (clip.source, clip.prompt[-17:]) == ("videos/kite.mp4", "against the wind.")
    named = re.search(r"(?s)my-clips/\n.*?```", text)[0]
    rows = [line.split(maxsplit=1) for line in named.splitlines()[1:3]]
    for name, line in rows:
        touch(tmp_path / "text", ["videos/kite.mp4"])
        (tmp_path / "text" / name).write_text(line)
    assert [clip.source for clip in read_clips(tmp_path / "text", None)] == ["videos/kite.mp4"]


@pytest.mark.parametrize("page", ["dataset.md", "dataset_zh.md"])
def test_the_page_names_every_usual_name(page):
    text = (ROOT / "assets" / page).read_text(encoding="utf-8")
    names = [*CAPTION_COLUMNS, *VIDEO_COLUMNS, *REPEATS_COLUMNS, *CAPTION_FILES[:4], *VIDEO_FILES[:2], METADATA[0]]
    assert not [name for name in names if f"`{name}`" not in text]
