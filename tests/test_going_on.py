"""Going on: a run after its data or its model moved, and a new run from the transformer of an earlier one."""

import hashlib
import importlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from args import parse_prepare_args, parse_training_args
from base.errors import UsageError
from base.files import describe
from base.manifest import find_damage
from cogvideox import folder as folder_module
from script_runs import EVERY_SCRIPT
from synthetic_clips import write_clip
from tiny_pipeline import make_tiny_pipeline


MODULES = {
    "t2v_lora": "cogvideox_text_to_video_lora", "t2v_sft": "cogvideox_text_to_video_sft",
    "i2v_lora": "cogvideox_image_to_video_lora", "i2v_sft": "cogvideox_image_to_video_sft",
}  # fmt: skip
FLAGS = [
    "--train_batch_size", "1", "--optimizer", "adamw", "--learning_rate", "1e-2", "--lr_warmup_steps", "0",
    "--checkpointing_steps", "1", "--seed", "1",
]  # fmt: skip
LORA_FLAGS = ["--rank", "2", "--lora_alpha", "2"]
BUCKETS = ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "9"]
LISTS = ["--caption_column", "prompts.txt", "--video_column", "videos.txt"]


@pytest.fixture(autouse=True)
def logs(caplog, tmp_path, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def clips(tmp_path):
    return write_clips(tmp_path / "clips")


def write_clips(folder, count=2):
    for number in range(count):
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        write_clip(folder / f"videos/{number}.mp4", 9, 64, 96, seed=number)
    (folder / "prompts.txt").write_text("".join(f"clip {number}\n" for number in range(count)))
    (folder / "videos.txt").write_text("".join(f"videos/{number}.mp4\n" for number in range(count)))
    return folder


@pytest.fixture
def prepared(tiny, clips, tmp_path):
    """kind -> a prepared folder of the clips, its own for every test."""

    def make(kind, out="prepared"):
        argv = ["--model_id", str(tiny(kind)), "--data_root", str(clips), "--output_dir", str(tmp_path / out), *LISTS]
        images = ["--save_image_latents", "--num_image_variants", "1"] if kind.endswith("i2v") else []
        argv += ["--target_fps", "8", "--save_latents_and_embeddings", *BUCKETS, *images]
        importlib.import_module("prepare_dataset").main(parse_prepare_args(argv))
        return tmp_path / out

    return make


@pytest.fixture
def train(tmp_path):
    def run(script, model, data, *flags, steps=1, name="run"):
        argv = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(tmp_path / name), *FLAGS]
        argv += [*(LORA_FLAGS if script.endswith("lora") else []), "--max_train_steps", str(steps)]
        argv += ["--data_root", str(data)] if data else []
        args = parse_training_args(script, [*argv, *map(str, flags)])
        importlib.import_module(MODULES[script]).main(args)
        return tmp_path / name

    return run


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "event" not in row]


def record(out):
    return json.loads((out / "args.json").read_text())


PREPARED, RAW = ["--load_tensors"], [*LISTS, *BUCKETS, "--fps", "8"]


# ---------------------------------------------------------------- the data moved


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "elsewhere/copy")  # with new times, unlike copy2


def moved(folder, tmp_path):
    return folder.rename(tmp_path / "moved")


def linked(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    return tmp_path / "link"


MOVES = {
    "copied": copied,
    "moved": moved,
    "linked": linked,
    "a slash at the end": lambda folder, tmp_path: f"{folder}/",
    "relative": lambda folder, tmp_path: os.path.relpath(folder),
    "a point": lambda folder, tmp_path: f"./{os.path.relpath(folder)}/.",
    "up and down": lambda folder, tmp_path: f"{folder}/../{folder.name}",
}


@pytest.mark.parametrize("form", ["prepared", pytest.param("raw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_after_its_data_moved(move, form, train, tiny, prepared, clips, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    data, flags = (prepared("2b"), PREPARED) if form == "prepared" else (clips, RAW)
    train("t2v_lora", tiny("2b"), data, *flags)
    place = MOVES[move](data, tmp_path)
    for path in Path(place).rglob("*.*"):
        os.utime(path, (1, 1))
    out = train("t2v_lora", tiny("2b"), place, *flags, steps=2)
    assert len(losses(out)) == 2 and "at step 1" in caplog.text
    assert f"continues, with the same content in other places: --data_root {data} -> {place}" in caplog.text
    assert record(out)["flags"]["data_root"] == str(place)


def test_a_csv_and_renamed_lists_are_the_data_that_they_hold(train, tiny, clips, tmp_path):
    (clips / "all.csv").write_text("video,text\nvideos/0.mp4,clip 0\nvideos/1.mp4,clip 1\n")
    raw = [*BUCKETS, "--fps", "8"]
    train("t2v_lora", tiny("2b"), clips, *raw, "--dataset_file", clips / "all.csv")
    clips = clips.rename(tmp_path / "other")
    (clips / "all.csv").rename(clips / "list.csv")
    train("t2v_lora", tiny("2b"), None, *raw, "--dataset_file", clips / "list.csv", steps=2)
    out = train("t2v_lora", tiny("2b"), clips, *raw, *LISTS, steps=3)
    assert len(losses(out)) == 3


def test_another_clip_under_the_same_name_is_refused(train, tiny, clips):
    train("t2v_lora", tiny("2b"), clips, *RAW)
    write_clip(clips / "videos/1.mp4", 9, 64, 96, seed=7)
    with pytest.raises(UsageError, match=r"run: holds a run with other content: the files of the clips; choose"):
        train("t2v_lora", tiny("2b"), clips, *RAW, steps=2)


@pytest.mark.parametrize("part", ["video_latents", "prompt_embeds", "image_latents"])
def test_other_tensors_under_the_same_name_are_refused(part, train, tiny, prepared):
    data = prepared("5b-i2v")
    train("i2v_lora", tiny("5b-i2v"), data, *PREPARED)
    path = sorted(path for path in (data / part).iterdir() if not path.name.startswith("_"))[0]
    tensors = load_file(path)
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, path, metadata={"key": "the same"})
    with pytest.raises(UsageError, match="other content: the files of the clips"):
        train("i2v_lora", tiny("5b-i2v"), data, *PREPARED, steps=2)


def test_data_prepared_again_is_the_same(train, tiny, prepared, caplog):
    train("t2v_lora", tiny("2b"), prepared("2b"), *PREPARED)
    out = train("t2v_lora", tiny("2b"), prepared("2b", "again"), *PREPARED, steps=2)
    assert len(losses(out)) == 2


def test_the_original_layout_may_move_too(train, tiny, prepared, tmp_path):
    data = prepared("2b")
    for name, key in (("video_latents", "moments"), ("prompt_embeds", "prompt_embeds")):
        for path in list((data / name).glob("[0-9]*.safetensors")):
            torch.save(load_file(path)[key], data / name / f"{path.name.split('-')[0]}.pt")
            path.unlink()
    (data / "data.jsonl").unlink()
    train("t2v_lora", tiny("2b"), data, *PREPARED)
    place = copied(data, tmp_path)
    train("t2v_lora", tiny("2b"), place, *PREPARED, steps=2)
    shutil.copy(place / "video_latents/0.pt", place / "video_latents/1.pt")
    with pytest.raises(UsageError, match="the files of the clips"):
        train("t2v_lora", tiny("2b"), place, *PREPARED, steps=3)


def absolute(folder, lines):
    """The list of videos with whole paths, as exports of annotation tools have them."""
    (folder / "videos.txt").write_text("".join(f"{folder / line}\n" for line in lines))


DRAWN = ["--random_flip", "0.5", "--video_reshape_mode", "random"]


def test_a_list_of_absolute_paths_may_move_with_its_folder(train, tiny, clips, tmp_path):
    data = copied(clips, tmp_path)
    lines = (data / "videos.txt").read_text().splitlines()
    absolute(data, lines)
    unbroken = train("t2v_lora", tiny("2b"), data, *RAW, *DRAWN, steps=2, name="unbroken")
    out = train("t2v_lora", tiny("2b"), data, *RAW, *DRAWN)
    place = moved(data, tmp_path)
    absolute(place, lines)
    train("t2v_lora", tiny("2b"), place, *RAW, *DRAWN, steps=2)
    assert losses(out) == losses(unbroken)


def test_a_run_of_an_earlier_version_hashed_absolute_paths_as_such(train, tiny, clips, tmp_path):
    data = copied(clips, tmp_path)
    absolute(data, (data / "videos.txt").read_text().splitlines())
    out = train("t2v_lora", tiny("2b"), data, *RAW)
    content = json.loads((out / "args.json").read_text())["content"]
    assert content["data"] != content["data_as_written"]
    state = out / "checkpoint-1/state.json"
    rewrite(state, lambda saved: saved | {"data": saved["data_as_written"]})
    rewrite(out / "args.json", lambda saved: saved | {"content": content | {"data": content["data_as_written"]}})
    train("t2v_lora", tiny("2b"), data, *RAW, steps=2)
    assert len(losses(out)) == 2


def rewrite(path, change):
    """Change a JSON file and, in a checkpoint, what its manifest says of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    manifest = path.with_name("manifest.json")
    if manifest.exists():
        content = json.loads(manifest.read_text())
        content["files"][path.name] = describe(path)
        manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("change", ["caption", "order", "fewer"])
def test_other_lists_at_another_place_are_refused(change, train, tiny, clips, tmp_path):
    train("t2v_lora", tiny("2b"), clips, *RAW)
    place = copied(clips, tmp_path)
    names = ["prompts.txt"] if change == "caption" else ["prompts.txt", "videos.txt"]
    for name in names:
        lines = (place / name).read_text().splitlines()
        lines = {"caption": ["other", lines[1]], "order": lines[::-1], "fewer": lines[:1]}[change]
        (place / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=rf"the list of clips.*\(--data_root {clips} -> {place}\); choose another"):
        train("t2v_lora", tiny("2b"), place, *RAW, steps=2)


def test_a_complete_run_is_complete_wherever_its_data_lies(train, tiny, clips, tmp_path, caplog):
    out = train("t2v_lora", tiny("2b"), clips, *RAW)
    before = (out / "metrics.jsonl").read_bytes()
    train("t2v_lora", tiny("2b"), copied(clips, tmp_path), *RAW)
    assert "nothing to do" in caplog.text and (out / "metrics.jsonl").read_bytes() == before
    other = write_clips(tmp_path / "other", count=1)
    with pytest.raises(UsageError, match="other content"):
        train("t2v_lora", tiny("2b"), other, *RAW)


def test_a_checkpoint_of_another_folder_is_compared_too(train, tiny, clips, tmp_path):
    first = train("t2v_lora", tiny("2b"), clips, *RAW)
    resume = ["--resume_from_checkpoint", first / "checkpoint-1"]
    out = train("t2v_lora", tiny("2b"), copied(clips, tmp_path), *RAW, *resume, name="second", steps=2)
    assert len(losses(out)) == 1
    write_clip(clips / "videos/0.mp4", 9, 64, 96, seed=7)
    with pytest.raises(UsageError, match="the files of the clips; give the same"):
        train("t2v_lora", tiny("2b"), clips, *RAW, *resume, name="third", steps=2)


# ---------------------------------------------------------------- the newest checkpoint turns out damaged


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("t2v_lora", "pytorch_lora_weights"), ("t2v_lora", "optimizer"), ("t2v_sft", "masters"),
        ("t2v_sft", "optimizer"), ("t2v_sft", "ema"), ("t2v_sft", "transformer/diffusion_pytorch_model"),
    ],
)  # fmt: skip
def test_a_run_goes_on_from_the_checkpoint_before_as_if_it_had_ended_there(
    script, name, train, tiny, prepared, caplog
):
    more = [*PREPARED, *(["--ema"] if script.endswith("sft") else [])]
    unbroken = train(script, tiny("2b"), prepared("2b"), *more, steps=3, name="unbroken")
    out = train(script, tiny("2b"), prepared("2b"), *more, steps=2)
    path = out / f"checkpoint-2/{name}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    train(script, tiny("2b"), prepared("2b"), *more, steps=3)
    assert f"checkpoint-2 cannot be used: {name}.safetensors was changed" in caplog.text
    assert losses(out) == losses(unbroken) and find_damage(out / "checkpoint-2") is None
    ours, theirs = (json.loads((folder / "checkpoint-3/manifest.json").read_text()) for folder in (out, unbroken))
    assert ours == theirs


# ---------------------------------------------------------------- the model is named otherwise


def saved_again(folder, target):
    """The same weights as another version of diffusers might write them."""
    shutil.copytree(folder, target)
    CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.float16).save_pretrained(
        target / "transformer"
    )
    for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        config = json.loads((target / name).read_text())
        config |= {"_diffusers_version": "0.99.0", "_name_or_path": "somewhere"}
        for default in ("patch_size_t", "norm_eps", "latents_mean", "trained_betas"):
            config.pop(default, None)
        if name.startswith("transformer"):
            config |= {"norm_eps": 1e-05, "dropout": 0.0}
        (target / name).write_text(json.dumps(config))


def as_variant(folder, target):
    shutil.copytree(folder, target)
    for path in target.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


@pytest.mark.parametrize("form", ["prepared", "raw"])
@pytest.mark.parametrize(("change", "more"), [(shutil.copytree, []), (saved_again, []), (as_variant, ["fp16"])])
def test_a_run_goes_on_with_a_model_of_the_same_content(change, more, form, train, tiny, prepared, clips, tmp_path):
    data, flags = (prepared("2b"), PREPARED) if form == "prepared" else (clips, RAW)
    train("t2v_lora", tiny("2b"), data, *flags)
    change(tiny("2b"), tmp_path / "same")
    out = train("t2v_lora", tmp_path / "same", data, *flags, *(["--variant", *more] if more else []), steps=2)
    assert len(losses(out)) == 2


def test_a_renamed_repository_and_a_folder_are_one_model(train, tiny, prepared, tmp_path, monkeypatch, caplog):
    data, folders = prepared("2b"), {}
    for name in ("THUDM/CogVideoX-2b", "zai-org/CogVideoX-2b"):
        folders[name] = shutil.copytree(tiny("2b"), tmp_path / "cache" / name / "snapshots/1")
    monkeypatch.setattr(folder_module, "download_model", lambda model, *others: folders[model])
    train("t2v_lora", "THUDM/CogVideoX-2b", data, *PREPARED)
    train("t2v_lora", "zai-org/CogVideoX-2b", data, *PREPARED, steps=2)
    assert "--pretrained_model_name_or_path THUDM/CogVideoX-2b -> zai-org/CogVideoX-2b" in caplog.text
    assert len(losses(train("t2v_lora", tiny("2b"), data, *PREPARED, steps=3))) == 3


def test_another_model_is_refused(train, tiny, prepared, tmp_path):
    data = prepared("2b")
    train("t2v_lora", tiny("2b"), data, *PREPARED)
    make_tiny_pipeline(tmp_path / "other", "2b", seed=3)
    with pytest.raises(UsageError, match="the transformer's weights.* -> .*other"):
        train("t2v_lora", tmp_path / "other", data, *PREPARED, steps=2)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler", "transformer/config.json"])
def test_the_parts_that_a_run_depends_on_are_compared(part, train, tiny, prepared, clips, tmp_path):
    data, prepared_run = prepared("2b"), {"name": "prepared-run"}
    train("t2v_lora", tiny("2b"), clips, *RAW)
    train("t2v_lora", tiny("2b"), data, *PREPARED, **prepared_run)
    model, other = shutil.copytree(tiny("2b"), tmp_path / "model"), tmp_path / "other"
    make_tiny_pipeline(other, "2b", seed=3)
    if part in ("vae", "text_encoder"):
        for path in (other / part).glob("*.safetensors"):
            shutil.copy(path, model / part / path.name)
    else:
        path, value = model / part, {"spatial_interpolation_scale": 1.5}
        if part == "scheduler":
            path, value = path / "scheduler_config.json", {"snr_shift_scale": 2.0}
        path.write_text(json.dumps(json.loads(path.read_text()) | value))
    with pytest.raises(UsageError, match="the model's settings, VAE or text encoder"):
        train("t2v_lora", model, clips, *RAW, steps=2)
    if part in ("vae", "text_encoder"):  # which prepared data needs no more
        train("t2v_lora", model, data, *PREPARED, **prepared_run, steps=2)
    else:
        with pytest.raises(UsageError, match="the model's settings"):
            train("t2v_lora", model, data, *PREPARED, **prepared_run, steps=2)


def test_the_weights_are_read_once(train, tiny, prepared, monkeypatch):
    from base import hashes

    model, data, read = tiny("2b"), prepared("2b"), []
    file_hash = hashes.file_hash
    monkeypatch.setattr(hashes, "file_hash", lambda path, *more: read.append(path) or file_hash(path, *more))
    train("t2v_lora", model, data, *PREPARED)
    assert read
    read.clear()
    train("t2v_lora", model, data, *PREPARED, steps=2)
    assert not read


# ---------------------------------------------------------------- the LoRA that a run started from


def test_the_lora_at_the_start_may_move_and_go_but_not_change(train, tiny, prepared, tmp_path, caplog):
    model, data = tiny("2b"), prepared("2b")
    first = train("t2v_lora", model, data, *PREPARED, name="first")
    start = train("t2v_lora", model, data, *PREPARED, "--init_lora", first)
    path = shutil.copy(first / "pytorch_lora_weights.safetensors", tmp_path / "mine.safetensors")
    train("t2v_lora", model, data, *PREPARED, "--init_lora", path, steps=2)
    other = train("t2v_lora", model, data, *PREPARED, "--learning_rate", "1e-3", name="other")
    for flags in (["--init_lora", other], []):
        with pytest.raises(UsageError, match="the LoRA that it started from"):
            train("t2v_lora", model, data, *PREPARED, *flags, steps=3)
    Path(path).unlink()
    caplog.clear()
    assert len(losses(train("t2v_lora", model, data, *PREPARED, "--init_lora", path, steps=3))) == 3
    assert "these cannot be compared with what it was trained on: the LoRA that it started from" in caplog.text
    assert start == tmp_path / "run"


# ---------------------------------------------------------------- what an earlier version left


@pytest.mark.parametrize("move", ["data", "model", "both", "nothing"])
def test_a_run_without_hashes_goes_on_and_one_line_says_so(move, train, tiny, prepared, tmp_path, caplog):
    model, data = tiny("2b"), prepared("2b")
    out = train("t2v_lora", model, data, *PREPARED)
    content = record(out)
    del content["content"], content["flags"]["init_transformer"]
    (out / "args.json").write_text(json.dumps(content))
    if move in ("data", "both"):
        data = copied(data, tmp_path)
    if move in ("model", "both"):
        model = shutil.copytree(model, tmp_path / "model")
    caplog.clear()
    train("t2v_lora", model, data, *PREPARED, steps=2)
    said = [message for message in caplog.messages if "cannot be compared" in message]
    assert len(said) == 1 and "the transformer's weights" in said[0] and "the list of clips" not in said[0]
    caplog.clear()
    train("t2v_lora", model, data, *PREPARED, steps=3)  # now they are recorded
    assert "cannot be compared" not in caplog.text


def test_its_data_is_still_compared_by_what_the_checkpoint_holds(train, tiny, clips, tmp_path):
    out = train("t2v_lora", tiny("2b"), clips, *RAW)
    content = record(out)
    del content["content"]
    (out / "args.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="the list of clips, captions and sizes"):
        train("t2v_lora", tiny("2b"), write_clips(tmp_path / "other", count=1), *RAW, steps=2)


# ---------------------------------------------------------------- from the transformer of an earlier run

KIND = {"t2v": "5b", "i2v": "1.5-5b-i2v"}
SFT_FLAGS = ["--learning_rate", "1e-3"]


@pytest.fixture
def tuned(train, tiny, prepared):
    """kind -> (folder of the model, prepared data, output folder of a full fine-tuning of it)."""

    def make(kind, *flags):
        script, model, data = f"{kind[-3:] if kind.endswith('i2v') else 't2v'}_sft", tiny(kind), prepared(kind)
        return model, data, train(script, model, data, *PREPARED, *SFT_FLAGS, *flags, name="tuned")

    return make


def put_together(model, tuned, target):
    """A pipeline with the fine-tuned transformer: what training on it must be equal to."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(tuned / "transformer", target / "transformer")
    return target


def same_weights(first, second, name):
    ours, theirs = load_file(first / name), load_file(second / name)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("script", EVERY_SCRIPT)
def test_training_starts_from_that_transformer(script, train, tuned, tmp_path):
    model, data, sft = tuned(KIND[script[:3]])
    out = train(script, model, data, *PREPARED, "--init_transformer", sft, steps=2)
    expected = train(script, put_together(model, sft, tmp_path / "both"), data, *PREPARED, steps=2, name="expected")
    untuned = train(script, model, data, *PREPARED, steps=2, name="untuned")
    name = "pytorch_lora_weights.safetensors"
    name = name if script.endswith("lora") else "transformer/diffusion_pytorch_model.safetensors"
    assert losses(out) == losses(expected) != losses(untuned) and same_weights(out, expected, name)
    assert record(out)["flags"]["init_transformer"] == str(sft)


@pytest.mark.parametrize("place", ["", "transformer", "checkpoint-1", "checkpoint-1/transformer"])
def test_a_run_a_checkpoint_and_the_folder_itself_name_it(place, train, tuned):
    model, data, sft = tuned("2b")
    train("t2v_lora", model, data, *PREPARED, "--init_transformer", sft)
    out = train("t2v_lora", model, data, *PREPARED, "--init_transformer", sft / place, steps=2)  # the same weights
    assert len(losses(out)) == 2


def test_a_run_keeps_its_start_and_goes_on_with_it_anywhere(train, tuned, tmp_path):
    model, data, sft = tuned("2b")
    train("t2v_lora", model, data, *PREPARED, "--init_transformer", sft)
    other = train("t2v_sft", model, data, *PREPARED, "--learning_rate", "1e-2", name="other")
    for start in ([], ["--init_transformer", other]):
        with pytest.raises(UsageError, match=f"the transformer's weights .--init_transformer {sft} -> "):
            train("t2v_lora", model, data, *PREPARED, *start, steps=2)
    sft = sft.rename(tmp_path / "moved")
    train("t2v_lora", model, data, *PREPARED, "--init_transformer", sft, steps=2)
    config = ["--config", str(tmp_path / "run/args.json"), "--max_train_steps", "3"]
    importlib.import_module(MODULES["t2v_lora"]).main(parse_training_args("t2v_lora", config))
    assert len(losses(tmp_path / "run")) == 3


def test_a_run_of_an_earlier_version_had_no_such_start(train, tuned):
    model, data, sft = tuned("2b")
    out = train("t2v_lora", model, data, *PREPARED)
    content = record(out)
    del content["content"], content["flags"]["init_transformer"]
    (out / "args.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=f"--init_transformer None -> {sft}"):
        train("t2v_lora", model, data, *PREPARED, "--init_transformer", sft, steps=2)


@pytest.mark.parametrize(
    ("kind", "change", "line"),
    [
        ("5b-i2v", {}, "in_channels 32, not 16"),
        ("2b", {}, "use_rotary_positional_embeddings False, not True"),
        ("1.5-5b", {}, "patch_size_t 2, not None"),
        ("5b", {"num_layers": 3}, "num_layers 3, not 2"),
        ("5b", {"_class_name": "HunyuanVideoTransformer3DModel"}, "no CogVideoX model"),
    ],
)
def test_a_transformer_of_another_kind_or_size_is_refused(kind, change, line, train, tiny, prepared, tmp_path):
    start = shutil.copytree(tiny(kind) / "transformer", tmp_path / "start")
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=line):
        train("t2v_lora", tiny("5b"), prepared("5b"), *PREPARED, "--init_transformer", start)
    assert not (tmp_path / "run/args.json").exists()


@pytest.mark.parametrize("fault", ["lacks a block", "prefixed", "another shape"])
def test_weights_that_are_not_the_models_are_refused_at_once(fault, train, tuned, tmp_path):
    model, data, sft = tuned("2b")
    broken = shutil.copytree(sft / "transformer", tmp_path / "broken")
    path = broken / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    if fault == "lacks a block":
        weights = {name: weight for name, weight in weights.items() if "transformer_blocks.1." not in name}
    elif fault == "prefixed":
        weights = {f"module.{name}": weight for name, weight in weights.items()}
    else:
        weights["norm_final.weight"] = torch.zeros(3)
    save_file(weights, path)
    with pytest.raises(UsageError, match="weights of its config.json are missing or of another shape"):
        train("t2v_lora", model, data, *PREPARED, "--init_transformer", broken)


def test_what_is_no_transformer_is_refused_with_advice(train, tiny, prepared, tmp_path):
    model, data = tiny("2b"), prepared("2b")

    def refused(start, line):
        with pytest.raises(UsageError, match=line) as error:
            train("t2v_lora", model, data, *PREPARED, "--init_transformer", start, name="refused")
        assert str(error.value).startswith(f"--init_transformer {start}: ") and "\n" not in str(error.value)

    refused("someone/CogVideoX-tuned", "no such folder; .* hf download")
    refused(tmp_path, "give the output folder of a full fine-tuning")
    refused(train("t2v_lora", model, data, *PREPARED), "holds a LoRA; give it as --init_lora")
    unfinished = train("t2v_sft", model, data, *PREPARED, steps=2, name="sft")
    shutil.copytree(unfinished / "checkpoint-1", unfinished / "checkpoint-backup")
    shutil.rmtree(unfinished / "transformer")
    refused(unfinished, "its newest checkpoint is .*checkpoint-2")


def test_damaged_weights_are_refused_before_anything_is_done(train, tuned, tmp_path):
    model, data, sft = tuned("2b")
    [path] = (sft / "transformer").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match="not readable"):
        train("t2v_lora", model, data, *PREPARED, "--init_transformer", sft)


def test_positions_that_it_dropped_stay_dropped(train, tuned):
    model, data, sft = tuned("5b-i2v", "--drop_learned_positions")
    out = train("i2v_lora", model, data, *PREPARED, "--init_transformer", sft, "--export", "merged")
    assert not json.loads((out / "transformer/config.json").read_text())["use_learned_positional_embeddings"]
    with pytest.raises(UsageError, match="this checkpoint has no learned positions; leave it out"):
        train("i2v_lora", model, data, *PREPARED, "--init_transformer", sft, "--drop_learned_positions", name="b")


def test_positions_may_be_dropped_on_top(train, tuned):
    model, data, sft = tuned("5b-i2v")
    out = train("i2v_sft", model, data, *PREPARED, "--init_transformer", sft, "--drop_learned_positions")
    assert not json.loads((out / "transformer/config.json").read_text())["use_learned_positional_embeddings"]


def test_raw_first_frames_go_with_the_transformer(train, tuned):
    model, data, sft = tuned("1.5-5b-i2v", "--image_latent_scale", "raw")
    with pytest.raises(UsageError, match="was trained with --image_latent_scale raw; give the same"):
        train("i2v_lora", model, data, *PREPARED, "--init_transformer", sft)
    train("i2v_lora", model, data, *PREPARED, "--init_transformer", sft, "--image_latent_scale", "raw")


def test_its_own_dtype_and_names_are_read_beside_a_variant_of_the_model(train, tuned, tmp_path):
    model, data, sft = tuned("2b", "--save_dtype", "fp32")
    as_variant(model, tmp_path / "variant")
    shutil.rmtree(tmp_path / "variant/transformer")
    (tmp_path / "variant/transformer").mkdir()  # whose weights nobody needs then
    shutil.copy(model / "transformer/config.json", tmp_path / "variant/transformer")
    flags = [*PREPARED, "--init_transformer", sft]
    out = train("t2v_sft", tmp_path / "variant", data, *flags, "--variant", "fp16")
    weights = load_file(out / "transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert losses(out) == losses(train("t2v_sft", model, data, *flags, name="plain"))


def test_the_merged_model_is_that_transformer_with_the_lora(train, tuned, tmp_path):
    model, data, sft = tuned("5b", "--save_dtype", "fp32")
    flags = [*PREPARED, "--export", "merged"]
    out = train("t2v_lora", model, data, *flags, "--init_transformer", sft)
    expected = train("t2v_lora", put_together(model, sft, tmp_path / "both"), data, *flags, name="expected")
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert same_weights(out, expected, name) and not same_weights(out, sft, name)


def test_streamed_weights_and_the_plan_are_of_that_transformer(train, tuned, capsys):
    model, data, sft = tuned("5b", "--save_dtype", "fp32")
    flags = [*PREPARED, "--init_transformer", sft]
    plain = train("t2v_lora", model, data, *flags)
    assert losses(train("t2v_lora", model, data, *flags, "--memory", "stream", name="stream")) == losses(plain)
    capsys.readouterr()
    train("t2v_lora", model, data, *flags, "--memory", "plan", name="plan")
    assert "stream" in capsys.readouterr().out


def test_validation_and_the_held_out_loss_are_of_that_transformer(train, tuned, tmp_path):
    model, data, sft = tuned("5b")
    flags = [*PREPARED, "--validation_data_root", data, "--validation_prompt", "a kite", "--num_inference_steps", "1"]
    out = train("t2v_lora", model, data, *flags, "--init_transformer", sft)
    expected = train("t2v_lora", put_together(model, sft, tmp_path / "both"), data, *flags, name="expected")
    for name in ("step_0", "step_1"):
        [ours], [theirs] = ((folder / "samples" / name).glob("*.mp4") for folder in (out, expected))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("script", ["t2v_lora", "t2v_sft"])
def test_the_card_tells_of_it_and_of_no_place(script, train, tuned, tmp_path):
    model, data, sft = tuned("5b")
    out = train(script, model, data, *PREPARED, "--init_transformer", sft)
    card = (out / "README.md").read_text()
    digest = hashlib.sha256((sft / "transformer/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert (
        f"Training started from a fine-tuned transformer of that model (SHA-256 of its weights: `{digest[:16]}" in card
    )
    assert str(tmp_path) not in card and "tuned/" not in card
    for path in out.rglob("*.safetensors"):
        assert str(tmp_path).encode() not in path.read_bytes()
    assert ("belongs on that transformer" in card) == script.endswith("lora")
    plain = train(script, model, data, *PREPARED, name="plain") / "README.md"
    assert "fine-tuned transformer" not in plain.read_text()


def test_the_example_of_the_card_puts_the_lora_on_that_transformer(train, tuned, tmp_path, monkeypatch):
    model, data, sft = tuned("5b")
    out = train("t2v_lora", model, data, *PREPARED, "--init_transformer", sft, name="lora")
    example = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)[1].split("pipe.enable_")[0]
    example = example.replace("path/to/base_model", str(model)).replace("path/to/fine_tuned", str(sft))
    monkeypatch.chdir(tmp_path)  # the repository is named after the folder
    values = {}
    exec(example, values)
    weights = load_file(sft / "transformer/diffusion_pytorch_model.safetensors")
    layer = values["pipe"].transformer.transformer_blocks[0].attn1.to_q
    assert torch.equal(layer.weight, weights["transformer_blocks.0.attn1.to_q.weight"].to(layer.weight))
    assert layer.lora_B["default_0"].weight.abs().max() > 0
