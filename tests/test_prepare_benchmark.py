"""benchmarks/prepare.py, and rows of bench.py on videos."""

import csv
import os
import shlex
import shutil
from types import SimpleNamespace

import pytest

import bench
import prepare
from args import parse_prepare_args, parse_training_args
from data.clip_lists import read_clips
from random_clips import write_clips
from synthetic_clips import probe


SIZE = (9, 64, 96)


@pytest.fixture
def work(tiny, tmp_path, monkeypatch):
    """A work folder with tiny pipelines in place of real ones."""
    monkeypatch.setitem(bench.MODELS, "tiny", SIZE)
    monkeypatch.setattr(bench, "card_name", lambda: "cpu")
    for name in ("2b", "2b-xxl", "tiny"):
        shutil.copytree(tiny("2b"), tmp_path / "work/models" / name)
    return tmp_path / "work"


def run_prepare(monkeypatch, work, *rows):
    """(exit code, rows of the CSV)"""
    argv = ["prepare.py", *rows, "--csv", str(work / "prepare.csv"), "--work", str(work), "--clips", "18"]
    monkeypatch.setattr("sys.argv", [*argv, "--size", "9x64x96", "--workers", "2", "--updates", "5"])
    exit_code = prepare.main()
    with open(work / "prepare.csv", newline="") as file:
        return exit_code, {row["label"]: row for row in csv.DictReader(file)}


def test_a_label_says_what_is_prepared():
    row = prepare.parse_row("prepare+xxl+variants8+cap5.5")
    assert row == prepare.parse_row("prepare+cap5.5+xxl+variants8")  # a row has one label
    assert (row.has_xxl, row.variants, row.cap) == (True, 8, 5.5)
    assert row.uncapped == prepare.parse_row("prepare+variants8+xxl").label
    args = prepare.parse_args(["prepare"])
    flags = parse_prepare_args(list(map(str, prepare.prepare_flags(row, args))))
    assert (flags.num_image_variants, flags.save_image_latents, flags.dtype) == (8, True, "bf16")
    assert flags.frame_buckets == [49] and flags.dataloader_num_workers == 8 and flags.model_id == "models/2b-xxl"
    plain = parse_prepare_args(list(map(str, prepare.prepare_flags(prepare.parse_row("prepare"), args))))
    assert not plain.save_image_latents and plain.model_id == "models/2b"


@pytest.mark.parametrize(
    "label", ["prepared", "prepare+fp8", "prepare+cap", "prepare+variants", "clips-to-lora+gpus2"]
)
def test_what_is_no_row_is_refused_before_anything_runs(label, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        prepare.parse_args(["prepare", label])
    assert f"error: {label}: " in capsys.readouterr().err


def test_the_lora_is_trained_on_what_was_prepared():
    row, args = prepare.parse_row("clips-to-lora+xxl"), prepare.parse_args(["prepare", "--updates", "7"])
    flags = parse_training_args("t2v_lora", prepare.train_flags(row, args))
    assert (flags.data_root, flags.output_dir) == ("runs/clips-to-lora+xxl", "runs/clips-to-lora+xxl-lora")
    assert flags.pretrained_model_name_or_path == "models/2b-xxl" and flags.max_train_steps == 7 and flags.load_tensors


def test_seconds_a_file_are_those_after_the_first_ones(tmp_path):
    """Whatever the order of their names; the start is not counted."""
    times = [100.0, 160.0, *(160 + 0.5 * number for number in range(1, 11))]
    for number, at in enumerate(times):
        path = tmp_path / f"{(7 * number) % 12}.safetensors"
        path.touch()
        os.utime(path, (at, at))
    assert prepare.steady_seconds(tmp_path, 2) == pytest.approx(0.5)
    with pytest.raises(bench.RowError, match="12 files, more than 12 are needed"):
        prepare.steady_seconds(tmp_path, 12)


def test_files_under_a_cap_are_compared_with_those_without(tmp_path):
    args = SimpleNamespace(work=tmp_path, size_name="9x64x96", clips=50)
    for label, content in (("prepare+xxl", b"same"), ("prepare+cap4+xxl", b"same"), ("prepare+cap3+xxl", b"other")):
        folder = tmp_path / "runs" / label / "video_latents"
        folder.mkdir(parents=True)
        (folder / "a.safetensors").write_bytes(content)
        (folder.parent / "status.json").write_text(label)
    capped, other = prepare.parse_row("prepare+xxl+cap4"), prepare.parse_row("prepare+xxl+cap3")
    assert prepare.check_same_files(capped, args) is None  # nothing to compare with yet
    assert prepare.check_same_files(prepare.parse_row("prepare+xxl"), args) is None
    assert prepare.check_same_files(capped, args) is True
    with pytest.raises(bench.RowError, match="1 of 1 files differ from those of prepare.xxl: video_latents/a"):
        prepare.check_same_files(other, args)


def test_random_clips_are_a_raw_data_set(tmp_path):
    write_clips(tmp_path / "clips", 3, SIZE)
    clips = read_clips(tmp_path / "clips", None, "prompts.txt", "videos.txt")
    assert len({clip.prompt for clip in clips}) == 3
    assert {probe(clip.video) for clip in clips} == {(9, 8.0, 64, 96)}
    assert len({clip.video.read_bytes() for clip in clips}) == 3


@pytest.mark.slow  # processes of their own, as they are measured
def test_rows_of_preparing_run(work, monkeypatch, capsys):
    labels = ["prepare", "prepare+cap3", "prepare+variants2+xxl", "clips-to-lora"]
    exit_code, rows = run_prepare(monkeypatch, work, *labels)
    shown = capsys.readouterr().out
    assert exit_code == 0 and list(rows) == labels, shown
    assert "the same files as without the cap" in shown
    for row in rows.values():
        assert 0 < float(row["seconds_a_clip"]) < 10 and float(row["prepare_s"]) > 1
        assert row["card"] == "cpu" and row["torch"]
        assert not (work / "runs" / row["label"]).exists()
    assert rows["prepare+cap3"]["same_files"] == "True" and rows["prepare"]["same_files"] == ""
    assert rows["clips-to-lora"]["updates"] == "5" and float(rows["clips-to-lora"]["step_s"]) > 0
    assert "--num_image_variants 2" in rows["prepare+variants2+xxl"]["command"]


@pytest.mark.slow
def test_a_training_row_on_videos_runs(work, monkeypatch, capsys):
    argv = ["bench.py", "tiny-speed+raw", "--csv", str(work / "speed.csv"), "--work", str(work)]
    monkeypatch.setattr("sys.argv", [*argv, "--steps", "4", "--warmup", "1"])
    assert bench.main() == 0, capsys.readouterr().out
    [row] = bench.rows_in(work / "speed.csv")
    assert "--load_tensors" not in shlex.split(row["command"]) and float(row["median_s"]) > 0


def test_the_reference_trains_on_no_videos():
    with pytest.raises(ValueError, match="prepared data"):
        bench.parse_row("5b-reference+raw")
    row = bench.parse_row("5b-speed+raw")
    flags = parse_training_args("t2v_lora", bench.script_flags(row, 20))
    assert flags.data_root == "clips/49x480x720" and not flags.load_tensors and flags.frame_buckets == [49]
    assert flags.dataloader_num_workers == 8
