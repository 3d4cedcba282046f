"""prepare_dataset.py --check: the page, the exit code, and what it leaves alone; the table of buckets in the log."""

import base64
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

import prepare_dataset
from args import parse_prepare_args
from base import status
from data.buckets import Bucket
from data.dataset import build_videos_from_args
from data.headers import VideoInfo
from data.histogram import count_buckets, table
from run import check_data
from run.exits import run_script
from synthetic_clips import write_clip
from tiny_pipeline import make_tiny_pipeline


BUCKETS = ["--height_buckets", "32", "--width_buckets", "32", "48", "--frame_buckets", "5"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '</script><script>alert(1)</script><!-- <b>bold</b> & "quoted" \u2028'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "model"
    make_tiny_pipeline(folder, "2b")
    return folder


def arguments(model, data, out, *flags):
    return ["--check", "--model_id", str(model), "--data_root", str(data), "--output_dir", str(out), *BUCKETS, *flags]


def check(argv):
    """The exit code of the check, in this process."""
    args = parse_prepare_args(
        [*argv, *([] if "--dataloader_num_workers" in argv else ["--dataloader_num_workers", "0"])]
    )
    try:
        run_script(lambda: prepare_dataset.main(args), args.output_dir)
    except SystemExit as left:
        return left.code
    return 0


def write_rows(data, rows):
    """rows: (caption, path)"""
    (data / "prompts.txt").write_text("".join(f"{caption}\n" for caption, _ in rows), encoding="utf-8")
    (data / "videos.txt").write_text("".join(f"{path}\n" for _, path in rows), encoding="utf-8")


class Page(HTMLParser):
    """A page as a browser reads it: its elements, its text outside of scripts, and the clips of its JSON."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.scripts, self.addresses = [], "", [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.clips = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag in ("script", "style"):
            self.scripts += [""] if tag == "script" else []

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def handle_endtag(self, tag):
        if tag == "script":
            self.tags.append("/script")

    def of(self, path):
        [clip] = [clip for clip in self.clips if clip["path"] == path]
        return clip


def page_of(out):
    return Page(out / check_data.PAGE)


def damage(path):
    """Zeros in place of most pictures; header and index stay whole."""
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 100, data.index(b"moov") - 50
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


# ---------------------------------------------------------------- everything wrong

WRONG = {  # path -> (caption, what the page says of it)
    "short.mp4": ("too short", "too short: 2 frames"),
    "tiny.mp4": ("too small", "would be enlarged 6.0 times"),
    "empty.mp4": ("an empty file", "empty file"),
    "text.mp4": ("a text", "a text, not a video"),
    "damaged.mp4": ("damaged in the middle", "frames readable"),
    "gone.mp4": ("missing", "'gone.mp4' (row 8) not found"),
    "../outside.mp4": ("outside", "outside of"),
    "https://example.com/a.mp4": ("a URL", "URL or protocol"),
    "uncaptioned.mp4": ("", "blank caption"),
}
NOTED = {
    "soft.mp4": ("enlarged", "soft", "enlarged 2.0 times"),
    "wide.mp4": ("cropped", "much cropped", "of the picture is cut off"),
    "slow.mp4": ("few frames", "repeats frames", "4 frames per second, sampled at 8"),
    "copy.mp4": ("a copy", "same content", "as good.mp4 (row 1)"),
    "again.mp4": ("a square crosses", "same caption", "as good.mp4 (row 1)"),
    "unread.mp4": ("a square \u732b crosses", "unknown tokens", "1: \u732b"),
    "long.mp4": ("word " * 300, "caption cut", "226 are read"),
}


@pytest.fixture(scope="module")
def wrong_set(tmp_path_factory):
    data = tmp_path_factory.mktemp("wrong")
    for seed, name in enumerate(("good", "uncaptioned", "damaged", "again", "unread", "long")):
        write_clip(data / f"{name}.mp4", 9, 32, 48, seed=seed)
    damage(data / "damaged.mp4")
    shutil.copy(data / "good.mp4", data / "copy.mp4")
    sizes = {"short": (2, 32, 48), "tiny": (9, 6, 8), "soft": (9, 16, 24), "wide": (9, 32, 96)}
    for name, (frames, height, width) in sizes.items():
        write_clip(data / f"{name}.mp4", frames, height, width, seed=7)
    write_clip(data / "slow.mp4", 9, 32, 48, fps=4, seed=8)
    (data / "empty.mp4").touch()
    (data / "text.mp4").write_text("not a video\n" * 9)
    rows = [("a square crosses", "good.mp4"), ("a square falls", "good.mp4")]
    rows += [(caption, path) for path, (caption, _) in WRONG.items()]
    write_rows(data, rows + [(caption, path) for path, (caption, *_) in NOTED.items()])
    return data


@pytest.fixture(scope="module")
def wrong_page(model, wrong_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("wrong-page") / "out"
    assert check(arguments(model, wrong_set, out)) == 65
    assert os.listdir(out) == [check_data.PAGE]  # no status, lock or log
    return out / check_data.PAGE


def test_everything_wrong_is_named_in_one_pass(wrong_page):
    page = Page(wrong_page)
    for path, (caption, problem) in WRONG.items():
        assert problem in page.of(path)["problem"] and page.of(path)["caption"] == caption
    left_out = {clip["path"] for clip in page.clips if clip["problem"]}
    assert left_out == set(WRONG) and len(page.clips) == 2 + len(WRONG) + len(NOTED)


@pytest.mark.parametrize("path", NOTED)
def test_what_is_worth_a_look_is_noted_on_a_usable_clip(wrong_page, path):
    _, kind, details = NOTED[path]
    clip = Page(wrong_page).of(path)
    assert clip["problem"] == "" and details in clip["notes"][kind]
    assert clip["frames_of"] is not None


def test_a_file_listed_twice_is_no_copy_and_its_pictures_are_written_once(wrong_page):
    first, second = Page(wrong_page).clips[:2]
    assert first["path"] == second["path"] == "good.mp4"
    assert "strip" in first and "strip" not in second and first["frames_of"] == second["frames_of"] == 0
    assert first["notes"]["same content"] == "as copy.mp4 (row 15)" and "same content" not in second["notes"]


def test_numbers_and_reasons_are_readable_without_scripts(wrong_page):
    text = re.sub(r"\s+", " ", Page(wrong_page).text)
    for words in (
        "18clips listed",
        "9usable",
        "9left out",
        "too short",
        "without a caption",
        "outside of the data folder",
    ):
        assert words in text
    assert "5x32x48" in text and "2, up to 2.0 times" not in text and "1, up to 2.0 times" in text


def test_the_log_and_the_last_line_say_it_too(model, wrong_set, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    assert check(arguments(model, wrong_set, tmp_path / "out")) == 65
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 9 of 18 clips cannot be used: short.mp4,") and check_data.PAGE in last
    assert all(any(path in line for line in caplog.messages) for path in WRONG)


# ---------------------------------------------------------------- all is well


@pytest.fixture(scope="module")
def good_set(tmp_path_factory):
    data = tmp_path_factory.mktemp("good")
    sizes = [(5, 32, 48), (12, 64, 64), (9, 40, 60)]
    for seed, size in enumerate(sizes):
        write_clip(data / f"{seed}.mp4", *size, seed=seed)
    write_rows(data, [(f"clip {seed} of a moving square", f"{seed}.mp4") for seed in range(len(sizes))])
    return data


@pytest.mark.parametrize("workers", [[], ["--dataloader_num_workers", "0"]], ids=["processes", "alone"])
def test_a_good_set_is_exit_0_and_shows_the_frames_of_the_data_set(model, good_set, tmp_path, workers):
    flags = ["--video_reshape_mode", "random", "--random_flip", "0.5"]
    argv = arguments(model, good_set, tmp_path / "out", *flags, *workers)
    args = parse_prepare_args(argv)
    prepare_dataset.main(args)  # returns
    videos, page = build_videos_from_args(args, 8), page_of(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [check_data.PAGE]
    for index, clip in enumerate(page.clips):
        assert (clip["problem"], clip["notes"]) == ("", {})
        shown = np.array(Image.open(io.BytesIO(base64.b64decode(clip["strip"]))), int)
        pixels = videos[index]["pixels"].permute(2, 0, 3, 1)[:, [0, 2, 4]]  # h, 3, w, 3
        assert shown.shape == (pixels.shape[0], 3 * pixels.shape[2], 3)
        assert np.abs(shown - pixels.reshape(shown.shape).numpy()).mean() < 6  # JPEG


def test_tokens_are_those_of_the_model_with_the_id_token(model, good_set, tmp_path):
    assert check(arguments(model, good_set, tmp_path, "--id_token", "sks")) == 0
    tokenizer = AutoTokenizer.from_pretrained(model, subfolder="tokenizer")
    wanted = [len(tokenizer(f"sks clip {seed} of a moving square").input_ids) for seed in range(3)]
    assert [clip["tokens"] for clip in page_of(tmp_path).clips] == wanted


def test_an_id_token_is_a_caption(model, good_set, tmp_path):
    data = shutil.copytree(good_set, tmp_path / "data")
    write_rows(data, [("", "0.mp4"), ("a square", "1.mp4")])
    assert check(arguments(model, data, tmp_path / "out", "--id_token", "sks")) == 0
    assert check(arguments(model, data, tmp_path / "out")) == 65


def test_without_a_model_everything_but_tokens_is_checked(good_set, tmp_path, caplog):
    assert check(arguments("no/such-model", good_set, tmp_path)) == 0
    assert "not counted in tokens" in caplog.text
    assert [clip["tokens"] for clip in page_of(tmp_path).clips] == [None] * 3


def test_no_weights_are_read(model, good_set, tmp_path):
    light = shutil.copytree(model, tmp_path / "light")
    for path in light.rglob("*.safetensors"):
        path.unlink()
    assert check(arguments(light, good_set, tmp_path / "out")) == 0
    assert all(clip["tokens"] for clip in page_of(tmp_path / "out").clips)


def test_a_list_that_cannot_be_read_is_on_the_page(model, good_set, tmp_path):
    flags = ["--caption_column", "no.txt", "--video_column", "videos.txt"]
    assert check(arguments(model, good_set, tmp_path, *flags)) == 65
    page = page_of(tmp_path)
    assert "no.txt: no such file" in page.text and page.clips == []


# ---------------------------------------------------------------- lists with faults of their own


def write_list(data, good_set, name, content):
    """A copy of the good set with this list alone; its three videos are 0.mp4, 1.mp4 and 2.mp4."""
    shutil.copytree(good_set, data)
    for path in data.glob("*.txt"):
        path.unlink()
    (data / name).write_bytes(content)


BROKEN_LISTS = {  # list -> ([(row, path, part of the reason)], usable rows)
    "fields.csv": (
        b"file_name,text\n0.mp4,a,b\n1.mp4,c\n2.mp4\n,d\n2.mp4,\n0.mp4,e\n",
        [(2, "0.mp4", "fields.csv:2: 3 fields and 2 columns"), (4, "2.mp4", "fields.csv:4: 1 fields and 2 columns"),
         (5, "", "fields.csv:5: blank video path"), (6, "2.mp4", "blank caption")],
        ["1.mp4", "0.mp4"],
    ),
    "quotes.csv": (
        b'file_name,text\n0.mp4,"a\n1.mp4,"b, c"\n2.mp4,"d" e\n"2.mp4","f\ng"\n0.mp4,"h\n',
        [(2, "", "line 3: ',' expected after '\"'; is a quote left open?"), (4, "", "line 4: ',' expected after"),
         (6, "", "line 7: unexpected end of data; is a quote left open?")],
        ["1.mp4", "2.mp4"],
    ),
    "bytes.csv": (
        b"file_name,text\n0.mp4,caf\xe9\n1.mp4,caf\xc3\xa9\n2\xff.mp4,b\n",
        [(2, "0.mp4", "bytes.csv:2: not UTF-8 (0xe9); convert it"), (4, "2\ufffd.mp4", "bytes.csv:4: not UTF-8 (0xff)")],
        ["1.mp4"],
    ),
    "lines.jsonl": (
        b'{"video": "0.mp4", "text": "a"\n{"video": "1.mp4", "text": "b"}\n[1]\n{"video": "2.mp4", "text": "\xe9"}\n'
        b'{"video": "2.mp4", "text": 7}\n{"video": "gone.mp4", "text": "c"}\n{"video": "1.mp4", "text": "\\ud800"}\n',
        [(1, "", "lines.jsonl:1: not JSON"), (3, "", "lines.jsonl:3: not a JSON object"),
         (4, "", "lines.jsonl:4: not UTF-8 (0xe9)"), (5, "2.mp4", "'text' is 7, not a text"),
         (6, "gone.mp4", "'gone.mp4' (row 6) not found"), (7, "1.mp4", "half of a character")],
        ["1.mp4"],
    ),
    "list.json": (
        b'[{"video": "0.mp4", "text": "\xe9"}, 3, {"video": "1.mp4", "text": "b"}, {"video": "2.mp4", "text": "c", '
        b'"repeats": 0}]',
        [(1, "", "list.json:1: not UTF-8"), (2, "", "list.json:2: not a JSON object"),
         (4, "2.mp4", "repeats is 0")],
        ["1.mp4"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("named", [False, True], ids=["found", "named"])
@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_every_fault_of_a_list_is_a_bad_row_and_the_others_are_checked(model, good_set, tmp_path, name, named):
    content, bad, usable = BROKEN_LISTS[name]
    write_list(tmp_path / "data", good_set, name, content)
    flags = ["--dataset_file", str(tmp_path / "data" / name)] if named else []
    argv = arguments(model, tmp_path / "data", tmp_path / "out", *flags)
    assert check(argv) == 65
    page = page_of(tmp_path / "out")
    found = [clip for clip in page.clips if clip["problem"]]
    assert [(clip["row"], clip["path"]) for clip in found] == [fault[:2] for fault in bad]
    assert all(reason in clip["problem"] for clip, (_, _, reason) in zip(found, bad, strict=True))
    assert [clip["path"] for clip in page.clips if not clip["problem"]] == usable
    assert "unreadable" not in page.text  # each reason has a name of its own


@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_preparing_stops_at_the_first_fault_of_a_list(model, good_set, tmp_path, name, capsys):
    write_list(tmp_path / "data", good_set, name, BROKEN_LISTS[name][0])
    assert check(arguments(model, tmp_path / "data", tmp_path / "out")[1:]) == 65
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {tmp_path / 'data' / name}:") and "more" not in message


def test_every_fault_of_two_text_files_is_a_bad_row(model, good_set, tmp_path):
    write_list(tmp_path / "data", good_set, "prompts.txt", b"a\nb\xe9\nc\rd\n\ne\nf\ng\n")
    (tmp_path / "data/videos.txt").write_bytes(b"0.mp4\n1.mp4\n2.mp4\n0.mp4\n1\xff.mp4\n \n1.mp4\n2.mp4\n")
    assert check(arguments(model, tmp_path / "data", tmp_path / "out")) == 65
    clips = page_of(tmp_path / "out").clips
    wanted = {
        2: "prompts.txt:2: not UTF-8 (0xe9)", 3: "prompts.txt:3: a carriage return without a newline", 4: "blank caption",
        5: "videos.txt:5: not UTF-8 (0xff)", 6: "videos.txt:6: blank video path", 8: "has 7 captions and ",
    }  # fmt: skip
    assert [clip["row"] for clip in clips if clip["problem"]] == list(wanted)
    assert all(wanted[clip["row"]] in clip["problem"] for clip in clips if clip["problem"])
    assert [clip["row"] for clip in clips if not clip["problem"]] == [1, 7]


def test_captions_beside_the_videos_that_are_no_text_are_bad_rows(model, good_set, tmp_path):
    write_list(tmp_path / "data", good_set, "0.txt", b"caf\xe9")
    (tmp_path / "data/1.txt").write_bytes("caf\u00e9".encode("utf-16"))
    (tmp_path / "data/2.txt").write_text("a square")
    assert check(arguments(model, tmp_path / "data", tmp_path / "out")) == 65
    clips = {clip["path"]: clip["problem"] for clip in page_of(tmp_path / "out").clips}
    assert "0.txt:1: not UTF-8 at byte offset 3" in clips["0.mp4"] and "1.txt: UTF-16" in clips["1.mp4"]
    assert clips["2.mp4"] == ""


def test_a_broken_table_beside_a_whole_list_is_not_read(model, good_set, tmp_path):
    """As in training: the check is of what would be trained on."""
    data = shutil.copytree(good_set, tmp_path / "data")
    (data / "notes.csv").write_bytes(BROKEN_LISTS["quotes.csv"][0])
    assert check(arguments(model, data, tmp_path / "out")) == 0
    assert len(page_of(tmp_path / "out").clips) == 3


def test_every_window_of_a_long_clip_is_shown(model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_clip(data / "long.mp4", 17, 32, 48)
    write_rows(data, [("a square crosses", "long.mp4")])
    assert check(arguments(model, data, tmp_path / "out", "--windows", "all")) == 0
    clips = page_of(tmp_path / "out").clips
    assert [clip["path"] for clip in clips] == ["long.mp4@0", "long.mp4@5", "long.mp4@10"]
    assert len({clip["strip"] for clip in clips}) == 3 and not any("same content" in clip["notes"] for clip in clips)


def test_any_layout_is_checked_in_its_own_rows(model, good_set, tmp_path):
    data = shutil.copytree(good_set, tmp_path / "data")
    for name in ("prompts.txt", "videos.txt"):
        (data / name).unlink()
    rows = [{"file_name": f"{name}.mp4", "text": f"clip {name}"} for name in (0, "gone", 2)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(arguments(model, data, tmp_path / "out")) == 65
    page = page_of(tmp_path / "out")
    assert [(clip["row"], clip["path"], bool(clip["problem"])) for clip in page.clips] == [
        (1, "0.mp4", False), (2, "gone.mp4", True), (3, "2.mp4", False),
    ]  # fmt: skip


# ---------------------------------------------------------------- safe


@pytest.fixture(scope="module")
def hostile_page(model, tmp_path_factory):
    data = tmp_path_factory.mktemp("hostile")
    name = "<img src=x onerror=alert(2)>.mp4"
    write_clip(data / name, 9, 32, 48)
    (data / "<b>.mp4").write_text("<script>alert(3)</script>")
    write_rows(data, [(HOSTILE, name), ("a bad file", "<b>.mp4"), (HOSTILE, "<i>gone</i>.mp4")])
    out = tmp_path_factory.mktemp("hostile-page")
    assert check(arguments(model, data, out)) == 65
    return out / check_data.PAGE


def test_text_of_the_data_set_stays_text(hostile_page, wrong_page):
    page = Page(hostile_page)
    assert [clip["caption"] for clip in page.clips] == [HOSTILE, "a bad file", HOSTILE]
    assert set(page.tags) <= set(Page(wrong_page).tags) and page.tags.count("script") == 2
    assert "innerHTML" not in page.scripts[1].replace("never innerHTML", "")


def test_a_fault_of_the_list_is_escaped(model, tmp_path):
    data = tmp_path / "<u>data"
    data.mkdir()
    assert check(arguments(model, data, tmp_path / "out")) == 65
    page = page_of(tmp_path / "out")
    assert "<u>data" in page.text and "u" not in page.tags


def test_the_page_asks_for_nothing_from_elsewhere(wrong_page):
    page = Page(wrong_page)
    assert page.addresses == []
    text = wrong_page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and not re.search(r"@import|url\(|fetch\(", text)


@pytest.mark.parametrize("code", [0, 65])
def test_a_prepared_folder_stays_as_it_was(model, good_set, wrong_set, tmp_path, code):
    prepare = arguments(model, good_set, tmp_path, "--save_latents_and_embeddings")[1:]
    prepare_dataset.main(parse_prepare_args(prepare))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    assert check(arguments(model, wrong_set if code else good_set, tmp_path)) == code
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    assert after.pop(tmp_path / check_data.PAGE) and after == before


def test_preparing_and_pruning_leave_the_page(model, good_set, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert check(arguments(model, good_set, tmp_path)) == 0
    page = (tmp_path / check_data.PAGE).read_bytes()
    prepare_dataset.main(parse_prepare_args(arguments(model, good_set, tmp_path, "--prune")[1:]))
    assert (tmp_path / check_data.PAGE).read_bytes() == page
    assert "3 clips, 3 prepared now" in caplog.text


def test_a_wrapper_learns_the_exit_code_and_the_status_stays(model, wrong_set, tmp_path, monkeypatch):
    monkeypatch.setenv(status.RUN_ID_VARIABLE, "of-the-wrapper")
    status.write_status(tmp_path, "interrupted", 75, step=3)
    assert check(arguments(model, wrong_set, tmp_path)) == 65
    content = status.read_status(tmp_path)
    assert (content["state"], content["exit_code"], content["step"]) == ("interrupted", 75, 3)
    assert content["refused"]["exit_code"] == 65


# ---------------------------------------------------------------- in a browser


def browse(page, *flags, address=""):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", *flags]
    return subprocess.run([*command, f"file://{page}{address}"], capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_searches_and_filters(wrong_page, hostile_page):
    dom = browse(wrong_page, "--dump-dom")
    assert dom.count("<article") == 18 and dom.count('<article class="clip bad"') == 9
    assert "18 of 18 clips" in dom and dom.count("data:image/jpeg") >= 9
    assert "left out 9" in dom and "unknown tokens 1" in dom
    dom = browse(wrong_page, "--dump-dom", address="#kind=left+out&search=frames")
    assert dom.count("<article") == 2  # short.mp4 and damaged.mp4
    dom = browse(hostile_page, "--dump-dom")
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in dom and dom.count("<article") == 3
    assert dom.count("<script") == 1 and dom.count("<img") == 1  # the JSON is removed once it is read; one strip


# ---------------------------------------------------------------- the table of buckets


def test_the_table_counts_what_is_cropped_enlarged_and_left_out():
    bucket, tall = Bucket(49, 480, 720), Bucket(49, 720, 480)
    clips = [
        (VideoInfo(50, 8, 480, 720), bucket),
        (VideoInfo(50, 8, 240, 480), bucket),
        (VideoInfo(50, 8, 720, 480), tall),
    ]
    rows = count_buckets(clips)
    assert [(row.bucket, row.num_clips, row.num_enlarged, row.max_upscale) for row in rows] == [
        (bucket, 2, 1, 2), (tall, 1, 0, 1),
    ]  # fmt: skip
    assert rows[0].cropped == pytest.approx(0.125) and rows[0].max_cropped == pytest.approx(0.25)  # 480x960 covers it
    problems = ["a.mp4: too short: 2 frames", "b.mp4: too short: 3 frames", "c.mp4: no video stream"]
    lines = table(rows, problems).splitlines()
    assert lines[1].split() == ["49x480x720", "2", "33%", "12%,", "up", "to", "25%", "1,", "up", "to", "2.0", "times"]
    assert lines[2].split() == ["49x720x480", "1", "17%", "nothing", "none"]
    assert lines[3].split(None, 3) == ["left", "out", "3", "50%  2 too short, 1 unreadable"]
    assert (
        len({line.find(word) for line, word in zip(lines, ("cropped", "12%", "nothing", "2 too"), strict=True)}) == 1
    )


def test_many_buckets_are_summed_up():
    rows = count_buckets(
        (VideoInfo(9, 8, 32, 32), Bucket(5, 32, 32 * place)) for place in range(1, 31) for _ in range(place)
    )
    lines = table(rows, []).splitlines()
    assert len(lines) == 14 and lines[-1].split() == ["18", "more", "171", "37%"]


# ---------------------------------------------------------------- size


@pytest.mark.slow
def test_ten_thousand_clips_take_a_minute_on_two_cores_and_less_than_a_gibibyte(model, tmp_path):
    data, rng = tmp_path / "data", random.Random(0)
    data.mkdir()
    kinds = [write_clip(tmp_path / f"{seed}.mp4", 49, 64, 96, seed=seed).read_bytes() for seed in range(20)]
    for number in range(10_000):  # the same pictures, other content: a box that players skip
        box = (16).to_bytes(4, "big") + b"free" + rng.randbytes(8)
        (data / f"{number:05}.mp4").write_bytes(kinds[number % 20] + box)
    write_rows(
        data,
        [(f"clip {number} " + "of a square " * rng.randint(1, 20), f"{number:05}.mp4") for number in range(10_000)],
    )
    argv = arguments(
        model, data, tmp_path / "out", "--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "49"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, prepare_dataset.__file__, *argv])
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0 and len(page_of(tmp_path / "out").clips) == 10_000
    # CPU seconds, which other programs on the machine do not change
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 60
    assert peak < 2**30


def memory_of(pid):
    """Bytes of a process and its children; what they share counts once."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        pids = [pid, *children.read_text().split()]
        rollups = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in pids]
    except OSError:  # one has just ended
        return 0
    return sum(int(re.search(r"^Pss:\s+(\d+) kB", text, re.M)[1]) * 1024 for text in rollups)
