"""Captions from a chat server: what is asked, what is kept, and what a server, a user or a kill can do to it."""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import caption_dataset
from args import parse_caption_args, parse_prepare_args, parse_training_args
from base import files
from base.errors import DataError
from chat_stub import CAPTION, Answer, Stub, good, serving
from data import caption_files
from data.caption_rules import as_caption, find_fault, word_limit
from data.clip_lists import read_clips
from data.frame_images import middle_times, show_frames
from data.uncaptioned import find_clips
from run import caption_clips, chat_server
from run.exits import run_script
from script_runs import losses, result_hash, status


KEY = "sk-canary-0123456789abcdef"


@pytest.fixture(scope="module")
def base_clip(tmp_path_factory, write_clip):
    return write_clip(tmp_path_factory.mktemp("base") / "clip.mp4").read_bytes()


@pytest.fixture
def make_clips(base_clip):
    """Write clips that differ by their bytes alone: an mp4 may end in a box that is free to hold anything."""

    def make(folder, count, first=0):
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            box = b"\0\0\0\x10free" + number.to_bytes(8, "big")
            (folder / f"kite{number:05}.mp4").write_bytes(base_clip + box)
        return folder

    return make


@pytest.fixture
def clips(make_clips, tmp_path):
    return make_clips(tmp_path / "clips", 5)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits of a test's length."""
    monkeypatch.setattr(chat_server, "BACKOFF_SECONDS", (0.02, 0.2))
    monkeypatch.setattr(chat_server, "SAID_AFTER", 0.1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def arguments(root, stub, *flags):
    url = stub if isinstance(stub, str) else stub.url
    return [
        "--data_root",
        str(root),
        "--base_url",
        url,
        "--context",
        "file_name",
        "--num_frames",
        "2",
        *map(str, flags),
    ]


def caption(root, stub, *flags):
    """Run the script; returns its output folder."""
    args = parse_caption_args(arguments(root, stub, *flags))
    try:
        caption_dataset.main(args)
    finally:
        files.release_locks()
    return caption_dataset.folder_of(args)


def run_as_command(args):
    run_script(lambda: caption_dataset.main(args), caption_dataset.folder_of(args), caption_dataset.RESUME_ADVICE)


@pytest.fixture
def stops(capsys):
    """Run the script as a command and expect an exit code; returns its last line on stderr."""

    def run(code, root, stub, *flags):
        args = parse_caption_args(arguments(root, stub, *flags))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_as_command(args)
        files.release_locks()
        assert left.value.code == code
        return capsys.readouterr().err.splitlines()[-1]

    return run


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def listed(folder):
    """{name: caption}, the same in both lists."""
    rows = [json.loads(line) for line in lines(folder / "metadata.jsonl")]
    pairs = list(zip(lines(folder / "videos.txt"), lines(folder / "prompts.txt"), strict=True))
    assert [(row["file_name"], row["text"]) for row in rows] == pairs
    return dict(pairs)


def caption_of(number):
    return CAPTION.format(name=f"kite{number:05}")


# ---------------------------------------------------------------- what comes out


def test_a_folder_of_videos_becomes_a_captioned_one(clips):
    with serving() as stub:
        assert caption(clips, stub) == clips
        assert sorted(stub.names()) == [f"kite{number:05}" for number in range(5)]
        caption(clips, stub)
        assert len(stub.requests) == 5  # asked once
    assert listed(clips) == {f"kite{number:05}.mp4": caption_of(number) for number in range(5)}
    texts = read_clips(clips, None, "prompts.txt", "videos.txt")
    table = read_clips(clips, clips / "metadata.jsonl")
    assert [clip[:2] for clip in texts] == [clip[:2] for clip in table] and len(texts) == 5
    assert status(clips)["state"] == "complete"


def test_200_clips_16_at_a_time_are_listed_in_order(make_clips, tmp_path):
    root = make_clips(tmp_path / "clips", 200)
    draw = random.Random(0)

    def late(request):
        return good(request)._replace(seconds=draw.uniform(0.01, 0.05))

    with serving(late) as stub:
        out = caption(root, stub, "--concurrency", 16, "--output_dir", tmp_path / "out")
        assert sorted(stub.names()) == [f"kite{number:05}" for number in range(200)]
        assert 8 < stub.most_at_once <= 16
    assert list(listed(out).items()) == [(f"kite{number:05}.mp4", caption_of(number)) for number in range(200)]


def test_frames_are_spread_over_the_clip_and_small(tmp_path, write_clip):
    assert middle_times(16, 8.0, 4) == [0.25, 0.75, 1.25, 1.75]
    assert middle_times(3, 8.0, 8) == [0, 0.125, 0.25]
    shown = show_frames(write_clip(tmp_path / "a.mp4", num_frames=16, height=64, width=96), 4, 48)
    images = [np.asarray(Image.open(io.BytesIO(content)), dtype=int) for _, content in shown.files]
    assert [image.shape for image in images] == [(32, 48, 3)] * 4 and shown.seconds == 2
    assert all(abs(a - b).max() > 50 for a, b in zip(images, images[1:], strict=False))  # the square moves


def test_a_still_image_is_one_frame_and_a_video_can_be_sent_whole(clips, tmp_path):
    Image.new("RGB", (300, 200), "red").save(clips / "red.png")
    with serving() as stub:
        caption(clips, stub, "--num_frames", 3, "--output_dir", tmp_path / "frames")
        frames = {request.name: request for request in stub.requests}
        caption(clips, stub, "--send", "video", "--output_dir", tmp_path / "whole")
        whole = {request.name: request for request in stub.requests[6:]}
    assert [kind for kind, _ in frames["kite00000"].files] == ["image/jpeg"] * 3
    assert "The 3 images are frames" in frames["kite00000"].text
    assert len(frames["red"].files) == 1 and "still picture" in frames["red"].text
    assert whole["kite00000"].files == [("video/mp4", (clips / "kite00000.mp4").read_bytes())]
    assert [kind for kind, _ in whole["red"].files] == ["image/jpeg"] and "frames of" not in whole["kite00000"].text


# ---------------------------------------------------------------- layouts, and captions that the data has

OWN = "A caption of my own, with a comma."
LAYOUTS = {
    "text files": {"prompts.txt": f"{OWN}\n\n", "videos.txt": "kite00000.mp4\nkite00001.mp4\n"},
    "csv": {"metadata.csv": f'file_name,text\nkite00000.mp4,"{OWN}"\nkite00001.mp4,\n'},
    "jsonl": {"list.jsonl": "".join(
        json.dumps({"video_path": f"kite0000{n}.mp4", "caption": text}) + "\n" for n, text in enumerate([OWN, ""])
    )},
    "sidecars": {"kite00000.txt": OWN},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_of_the_data_are_taken_over_unless_asked_to_replace_them(layout, make_clips, tmp_path, stops):
    root = make_clips(tmp_path / "clips", 2)
    for name, text in LAYOUTS[layout].items():
        (root / name).write_text(text)
    with serving() as stub:
        assert "--output_dir" in stops(2, root, stub)  # nothing of the user's is written over
        out = caption(root, stub, "--output_dir", tmp_path / "out", "--trigger", "KITE")
        assert listed(out) == {"kite00000.mp4": OWN, "kite00001.mp4": f"KITE {caption_of(1)}"}
        assert stub.names() == ["kite00001"]
        new = caption(root, stub, "--output_dir", tmp_path / "new", "--recaption")
        assert listed(new) == {"kite00000.mp4": caption_of(0), "kite00001.mp4": caption_of(1)}
        del stub.requests[:]
        caption(root, stub, "--output_dir", tmp_path / "context", "--context", "caption")
        assert sorted(f'caption, which may be wrong: "{OWN}"' in request.text for request in stub.requests) == [0, 1]
    assert {name: (root / name).read_text() for name in LAYOUTS[layout]} == LAYOUTS[layout]


def test_the_order_is_that_of_the_data_whoever_wrote_which_caption(make_clips, tmp_path):
    root = make_clips(tmp_path / "clips", 3)
    (root / "metadata.csv").write_text(f'file_name,text\nkite00002.mp4,\nkite00000.mp4,"{OWN}"\nkite00001.mp4,\n')
    with serving() as stub:
        out = caption(root, stub, "--output_dir", tmp_path / "out")
    assert list(listed(out)) == ["kite00002.mp4", "kite00000.mp4", "kite00001.mp4"]


BARE = {
    "videos.txt": "kite00001.mp4\nkite00000.mp4\n",
    "metadata.csv": "file_name,seconds\nkite00001.mp4,1\nkite00000.mp4,2\n",
    "metadata.jsonl": '{"file_name": "kite00001.mp4"}\n{"file_name": "kite00000.mp4"}\n',
}


@pytest.mark.parametrize("name", BARE)
def test_lists_without_captions_say_which_clips_and_in_which_order(name, make_clips, tmp_path, stops):
    root = make_clips(tmp_path / "clips", 3)
    (root / name).write_text(BARE[name])
    flags = ["--dataset_file", root / name] if name == "metadata.csv" else []
    with serving() as stub:
        assert "--output_dir" in stops(2, root, stub, *flags)
        out = caption(root, stub, "--output_dir", tmp_path / "out", *flags)
    assert list(listed(out)) == ["kite00001.mp4", "kite00000.mp4"]


def test_clips_are_linked_and_take_no_room(make_clips, tmp_path):
    root = make_clips(tmp_path / "data/clips/below", 2).parent
    with serving() as stub:
        out = caption(root, stub, "--output_dir", tmp_path / "out")
        assert (out / "below/kite00000.mp4").samefile(root / "below/kite00000.mp4")
        assert not (out / "below/kite00000.mp4").is_symlink()
        (root / "below/kite00000.mp4").unlink()
        make_clips(root / "below", 1, first=7)
        (root / "below/kite00007.mp4").rename(root / "below/kite00000.mp4")  # another clip of that name
        caption(root, stub, "--output_dir", out)
    assert (out / "below/kite00000.mp4").samefile(root / "below/kite00000.mp4")
    assert len(stub.requests) == 3
    assert len(read_clips(out, None, "prompts.txt", "videos.txt")) == 2  # inside of the folder: no flag is needed


def test_a_disk_without_hard_links_gets_symbolic_ones_and_a_warning(clips, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(caption_files.os, "link", refuse)
    with serving() as stub:
        out = caption(clips, stub, "--output_dir", tmp_path / "out")
    assert "--allow_outside_root" in caplog.text and "5 clips are symbolic links" in caplog.text
    assert len(read_clips(out, None, "prompts.txt", "videos.txt", allow_outside=True)) == 5


def test_what_is_in_the_output_folder_already_is_not_touched(clips, tmp_path, stops):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kite00000.mp4").write_bytes(b"mine")
    with serving() as stub:
        assert "is there already" in stops(2, clips, stub, "--output_dir", out)
        assert (out / "kite00000.mp4").read_bytes() == b"mine"
        for name in ("prompts.txt", "videos.txt", "metadata.jsonl"):
            (out / name).write_text("mine\n")
        assert "not written over" in stops(2, clips, stub, "--output_dir", out)
        assert "inside of --data_root" in stops(2, clips, stub, "--output_dir", clips / "captioned")
    assert (out / "prompts.txt").read_text() == "mine\n" and not (clips / "captioned").exists()


# ---------------------------------------------------------------- edited captions


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_edited_captions_are_never_written_over(clips, tmp_path, stops):
    out = tmp_path / "out"
    with serving() as stub:
        caption(clips, stub, "--output_dir", out)
        edit(out / "prompts.txt", caption_of(0), "Edited in one file.")
        edit(out / "metadata.jsonl", caption_of(1), "Edited in the other.")
        for name in ("prompts.txt", "metadata.jsonl"):
            edit(out / name, caption_of(2), "Edited in both.")
        edited = ["Edited in one file.", "Edited in the other.", "Edited in both."]
        for flags in ([], ["--model", "another"], ["--recaption"], ["--trigger", "KITE"], []):
            caption(clips, stub, "--output_dir", out, *flags)
            assert list(listed(out).values())[:3] == edited
        assert {request.name for request in stub.requests[5:]} == {"kite00003", "kite00004"}
        edit(out / "prompts.txt", edited[2], "One way.")
        edit(out / "metadata.jsonl", edited[2], "Another way.")
        before = [(out / name).read_bytes() for name in ("prompts.txt", "metadata.jsonl")]
        assert "was edited in prompts.txt and, in other words, in metadata.jsonl" in stops(
            65, clips, stub, "--output_dir", out
        )
        assert [(out / name).read_bytes() for name in ("prompts.txt", "metadata.jsonl")] == before


def test_an_edit_outlives_its_clips_absence_and_a_lost_record(clips, tmp_path):
    with serving() as stub:
        out = caption(clips, stub, "--output_dir", tmp_path / "out")
        edit(out / "prompts.txt", caption_of(3), "Edited.")
        (clips / "kite00003.mp4").rename(tmp_path / "aside.mp4")
        caption(clips, stub, "--output_dir", out)
        assert "kite00003.mp4" not in listed(out)
        (tmp_path / "aside.mp4").rename(clips / "kite00003.mp4")
        caption(clips, stub, "--output_dir", out)
        assert listed(out)["kite00003.mp4"] == "Edited."
        (out / ".captions.json").write_text("{")  # damaged: every caption may be an edited one
        caption(clips, stub, "--output_dir", out, "--model", "another")
        assert listed(out)["kite00000.mp4"] == caption_of(0) and len(stub.requests) == 5


def test_an_emptied_caption_is_asked_for_anew_and_is_no_edit(clips):
    with serving() as stub:
        caption(clips, stub)
        edit(clips / "prompts.txt", caption_of(4), "")
        edit(clips / "metadata.jsonl", caption_of(0), "")
        for _ in range(2):
            caption(clips, stub)
            assert list(listed(clips).values()) == [caption_of(number) for number in range(5)]
        caption(clips, stub, "--trigger", "KITE")
    assert all(text.startswith("KITE ") for text in listed(clips).values()) and len(stub.requests) == 5


def test_an_edit_in_place_is_kept_and_a_new_clip_is_asked_about(clips, make_clips):
    with serving() as stub:
        caption(clips, stub)
        edit(clips / "prompts.txt", caption_of(1), "Edited.")
        make_clips(clips, 1, first=9)
        caption(clips, stub)
        assert stub.names()[5:] == ["kite00009"]
    assert listed(clips)["kite00001.mp4"] == "Edited." and len(listed(clips)) == 6


@pytest.mark.parametrize("number", range(1, 6))
def test_killed_between_two_lists_no_caption_counts_as_edited_and_no_edit_is_lost(
    number, clips, make_clips, tmp_path, monkeypatch
):
    """The second run drops a clip and adds another, so that half-written lists belong to different clips."""
    out = tmp_path / "out"
    with serving() as stub:
        caption(clips, stub, "--output_dir", out)
        edit(out / "prompts.txt", caption_of(2), "Edited.")
        (clips / "kite00000.mp4").unlink()
        make_clips(clips, 2, first=8)
        calls, write = [], caption_files.write_durably

        def killed(path, text):
            calls.append(path.name)
            if len(calls) == number:
                raise KeyboardInterrupt
            write(path, text)

        with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
            patches.setattr(caption_files, "write_durably", killed)
            caption(clips, stub, "--output_dir", out)
        caption(clips, stub, "--output_dir", out, "--model", "another")
    expected = {f"kite{n:05}.mp4": caption_of(n) for n in (1, 2, 3, 4, 8, 9)} | {"kite00002.mp4": "Edited."}
    assert listed(out) == expected
    record = json.loads((out / ".captions.json").read_text())
    assert record["captions"].keys() == {f"{name}/0/0" for name in expected if "00002" not in name}


# ---------------------------------------------------------------- what is kept


def test_answers_belong_to_content_model_and_question(clips, tmp_path, base_clip):
    (clips / "twin.mp4").write_bytes((clips / "kite00000.mp4").read_bytes())
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What is this?\n")
    none = ["--context", "none"]
    with serving() as stub:
        flags = ["--output_dir", tmp_path / "out", *none]

        def asked(*more):
            before = len(stub.requests)
            caption(clips, stub, *flags, *more)
            return len(stub.requests) - before

        assert asked() == 5  # the twin has the same content
        assert asked() == 0
        (clips / "kite00001.mp4").rename(clips / "renamed.mp4")
        assert asked() == 0
        (clips / "kite00002.mp4").write_bytes(base_clip)
        assert asked() == 1
        assert asked("--prompt_file", prompt) == 5 and stub.requests[-1].text.startswith(
            "What is this?\n\nThe 2 images"
        )
        assert asked("--num_frames", 4) == 5
        assert asked("--model", "another") == 5
        assert asked("--trigger", "KITE") == 0 and all(
            text.startswith("KITE A red") for text in listed(flags[1]).values()
        )
        assert asked() == 0


@pytest.mark.parametrize("rest", [b'{"clip": "kite00004.mp4", "capt', b"\xff\xfe\n", b"[]\nnull\n{}\n"])
def test_a_torn_line_costs_its_clip_alone(rest, clips, stops):
    with serving() as stub:
        caption(clips, stub)
        path = clips / "captions.jsonl"
        kept = path.read_bytes().splitlines(keepends=True)[:3]
        path.write_bytes(b"".join(kept) + rest)
        caption(clips, stub)
        assert len(stub.requests) == 7
        caption(clips, stub)
        assert len(stub.requests) == 7 and len(listed(clips)) == 5
    assert path.read_bytes().startswith(b"".join(kept) + rest)


def in_child(root, stub, *flags):
    """The script in a forked process."""

    def main():
        os.setpgrp()
        run_as_command(parse_caption_args(arguments(root, stub, *flags)))

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def kill_and_go_on(root, num_clips, seconds):
    """Kill a run after each of these times and let the last one finish; returns the names in the order of asking."""
    with serving(lambda request: good(request)._replace(seconds=0.03)) as stub:
        for wait in seconds:
            process = in_child(root, stub, "--concurrency", 4)
            time.sleep(wait)
            process.kill()
            process.join()
            time.sleep(0.1)  # what the server was at is counted
        process = in_child(root, stub, "--concurrency", 4)
        process.join(60)
        assert process.exitcode == 0 and len(listed(root)) == num_clips
        assert listed(root) == {f"kite{number:05}.mp4": caption_of(number) for number in range(num_clips)}
        return stub.names()


def test_killed_and_started_again_asks_only_for_what_was_in_flight(make_clips, tmp_path):
    names = kill_and_go_on(make_clips(tmp_path / "clips", 40), 40, [0.6])
    assert len(names) <= 44 and max(map(names.count, names)) <= 2


@pytest.mark.faults
def test_killed_at_random_moments_each_clip_is_asked_at_most_once_more(make_clips, tmp_path):
    seed = int(os.environ.get("COGVIDEOX_FAULT_SEED") or random.randrange(2**32))
    print(f"\nCOGVIDEOX_FAULT_SEED={seed}")
    draw = random.Random(seed)
    for trial in range(20):
        kills = [draw.uniform(0.2, 1.0) for _ in range(draw.randint(1, 4))]
        names = kill_and_go_on(make_clips(tmp_path / f"clips{trial}", 60), 60, kills)
        # Of 4 at a time, a kill costs no more than those 4 answers
        assert len(names) <= 60 + 4 * len(kills), (trial, kills)
        assert max(map(names.count, names)) <= 1 + len(kills)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_and_the_same_command_goes_on(number, clips):
    """While the server hangs over the third clip."""
    with serving(lambda request: good(request)._replace(seconds=60 * (request.name == "kite00002"))) as stub:
        process = in_child(clips, stub, "--concurrency", 1)
        while len(stub.requests) < 3:
            time.sleep(0.02)
        os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode == 75
    assert status(clips)["state"] == "interrupted" and "every answer so far is kept" in status(clips)["message"]
    with serving() as stub:
        caption(clips, stub)
        assert sorted(stub.names()) == ["kite00002", "kite00003", "kite00004"]


# ---------------------------------------------------------------- servers


def first_time(answer):
    """`answer` to the first request about each clip, good ones later."""
    return lambda request: answer if request.number == 0 else good(request)


BROKEN = {
    "500": Answer(status=500, raw=b'{"error": {"message": "out of memory"}}'),
    "no JSON": Answer(raw=b"<html>502 Bad Gateway</html>"),
    "half of it": Answer(raw=b'{"choices": [{"mess'),
    "no choices": Answer(raw=b'{"choices": []}'),
    "another shape": Answer(raw=b'["choices"]'),
    "not its encoding": Answer(raw=b"not gzip", headers={"Content-Encoding": "gzip"}),
    "too much": Answer(raw=b" " * (5 * 2**20)),
    "dropped": Answer(drop=True),
    "503": Answer(status=503, raw=b"starting"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_answer_is_asked_for_again(kind, clips):
    with serving(first_time(BROKEN[kind])) as stub:
        caption(clips, stub)
        assert sorted(stub.names()) == sorted([f"kite{number:05}" for number in range(5)] * 2)
    assert len(listed(clips)) == 5


def test_a_clip_that_only_gets_errors_is_left_out_and_asked_about_next_time(clips, stops):
    def answer(request):
        return BROKEN["500"] if request.name == "kite00003" else good(request)

    with serving(answer) as stub:
        line = stops(65, clips, stub)
        assert stub.names().count("kite00003") == chat_server.MAX_FAILURES and len(listed(clips)) == 4
        assert "1 of 5 clips got no caption" in line and "kite00003.mp4: HTTP 500: out of memory" in line
        stub.answer = good
        caption(clips, stub)
        assert len(listed(clips)) == 5 and stub.names()[-1] == "kite00003"


def test_retry_after_is_waited_for(clips):
    with serving(first_time(Answer(status=429, headers={"Retry-After": "1"}))) as stub:
        caption(clips, stub, "--concurrency", 5)
        times = {(request.name, request.number): request.at for request in stub.requests}
    assert len(times) == 10 and len(listed(clips)) == 5
    assert min(times[name, 1] - at for (name, number), at in times.items() if number == 0) > 0.95
    everything = sorted(times.values())
    assert everything[0] + 0.9 < next(at for at in everything if at > everything[0] + 0.3)  # the others wait as well


def test_a_wait_longer_than_allowed_ends_the_run_and_it_goes_on_later(clips, stops):
    def answer(request):
        return good(request) if request.name < "kite00002" else Answer(status=429, headers={"Retry-After": "3600"})

    with serving(answer) as stub:
        line = stops(75, clips, stub, "--concurrency", 1, "--max_wait", 30)
        assert "it asks for 3600 s more" in line and "every caption so far is kept" in line
        stub.answer, stub.requests = good, []
        caption(clips, stub)
        assert sorted(stub.names()) == ["kite00002", "kite00003", "kite00004"]


def test_a_date_is_a_time_to_wait_for_too():
    from email.utils import format_datetime

    import httpx

    then = chat_server.time.time() + 20
    date = format_datetime(__import__("datetime").datetime.fromtimestamp(then).astimezone())
    for value, expected in ((date, 20), ("7", 7), ("2.5", 2.5), ("soon", None), ("", None), ("-5", None)):
        found = chat_server.retry_after(httpx.Response(429, headers={"Retry-After": value}))
        assert found == expected or abs(found - expected) < 2


def test_an_answer_that_takes_too_long_is_asked_for_again(clips):
    with serving(first_time(Answer(CAPTION, seconds=3))) as stub:
        started = time.monotonic()
        caption(clips, stub, "--timeout", 0.3)
        assert time.monotonic() - started < 2.5 and len(stub.requests) == 10
    assert len(listed(clips)) == 5


def go_away(stub, seconds):
    """Stop listening and come back at the same address."""
    port, answer = stub.server_port, stub.answer
    stub.stop()
    time.sleep(seconds)
    return Stub(answer, port)


def outage(clips, num_clips, seconds, *flags):
    """Run over a server that is gone for a while once a third is answered; returns how often each clip was asked."""
    with contextlib.ExitStack() as stack:
        stubs = [Stub(lambda request: good(request)._replace(seconds=0.05))]

        def interrupt():
            while len(stubs[0].requests) < num_clips // 3:
                time.sleep(0.01)
            stubs.append(go_away(stubs[0], seconds))

        thread = threading.Thread(target=interrupt)
        thread.start()
        caption(clips, stubs[0], "--concurrency", 4, *flags)
        thread.join()
        stack.callback(stubs[1].stop)
        return stubs[0].names() + stubs[1].names()


def test_a_server_that_is_gone_is_waited_for_in_one_line(make_clips, tmp_path, caplog):
    root = make_clips(tmp_path / "clips", 30)
    names = outage(root, 30, 1.0)
    assert len(listed(root)) == 30 and len(names) <= 34
    said = [record.getMessage() for record in caplog.records if record.name == "run.chat_server"]
    assert len(said) == 2 and "no answer" in said[0] and "answers again, after 1 s" in said[1]


@pytest.mark.slow
def test_a_server_that_is_gone_for_a_minute_is_waited_for(make_clips, tmp_path, caplog, monkeypatch):
    monkeypatch.undo()  # the waits of a real run
    caplog.set_level(logging.INFO)
    root = make_clips(tmp_path / "clips", 30)
    names = outage(root, 30, 60.0)
    assert len(listed(root)) == 30 and len(names) <= 34
    said = [record.getMessage() for record in caplog.records if record.name == "run.chat_server"]
    assert len(said) == 2 and "waited for, up to 600 s" in said[0]


def test_a_tunnel_that_breaks_every_connection_is_a_server_that_is_gone(clips, stops):
    """As ssh -L does while nothing listens at its far end: no clip is to blame."""
    gone_until = time.monotonic() + 1.0

    def answer(request):
        return Answer(drop=True) if time.monotonic() < gone_until else good(request)

    with serving(answer) as stub:
        caption(clips, stub, "--model", "stub-vl")
        assert len(listed(clips)) == 5 and len(stub.requests) > 5 * chat_server.MAX_FAILURES


def test_a_clip_that_kills_the_server_is_given_up_while_others_get_answers(make_clips, tmp_path, stops):
    def answer(request):
        return Answer(drop=True) if request.name == "kite00000" else good(request)._replace(seconds=0.05)

    with serving(answer) as stub:
        root = make_clips(tmp_path / "clips", 40)
        assert "kite00000.mp4: " in stops(65, root, stub, "--concurrency", 2)
        assert len(listed(root)) == 39


def test_a_server_that_never_answers_is_named_and_leaves_no_trace(clips, stops):
    with Stub() as unused:
        url = unused.url
    before = sorted(clips.iterdir())
    line = stops(75, clips, url, "--max_wait", 0.5)
    assert f"{url}: no answer for " in line and "All connection attempts failed" in line
    assert {path.name for path in clips.iterdir()} - {path.name for path in before} <= {".lock", "status.json"}


WRONG = {
    401: ('{"error": {"message": "Incorrect API key provided"}}', "the key is not accepted (HTTP 401: Incorrect API"),
    404: (
        '{"message": "The\\u001b[2J model\\n does not exist."}',
        "model or address (HTTP 404: The[2J model does not",
    ),
    307: ("", "the address has moved"),
}


@pytest.mark.parametrize("code", WRONG)
def test_wrong_settings_end_the_run_in_one_line(code, clips, stops):
    body, expected = WRONG[code]
    with serving(lambda _: Answer(status=code, raw=body.encode(), headers={"Location": "/elsewhere"})) as stub:
        assert expected in stops(2, clips, stub, "--concurrency", 1)
        assert len(stub.requests) == 1


def test_the_only_model_is_asked_and_of_several_one_has_to_be_named(clips, tmp_path, stops):
    out = tmp_path / "out"
    with serving(models=("a", "b")) as stub:
        assert "serves a, b; choose one with --model" in stops(2, clips, stub, "--output_dir", out)
        assert not out.exists()  # a refused command leaves nothing
        caption(clips, stub, "--output_dir", out, "--model", "b")
        assert {request.body["model"] for request in stub.requests} == {"b"}


def test_a_run_in_which_nothing_works_ends_early(make_clips, tmp_path, stops):
    root = make_clips(tmp_path / "clips", 60)
    wrong = Answer(status=400, raw=b'{"message": "this model takes no images"}')
    with serving(lambda _: wrong) as stub:
        line = stops(2, root, stub)
        assert f"none of the first {caption_clips.NUM_HOPELESS} clips" in line and "this model takes no images" in line
        assert len(stub.requests) < 40


def test_a_clip_that_cannot_be_read_is_left_out(clips, stops):
    (clips / "kite00001.mp4").write_bytes((clips / "kite00001.mp4").read_bytes()[:900])
    with serving() as stub:
        line = stops(65, clips, stub)
        assert "kite00001.mp4: " in line and len(listed(clips)) == 4 and "kite00001" not in stub.names()


# ---------------------------------------------------------------- the key


def test_the_key_is_sent_and_is_in_no_file_and_no_line(clips, tmp_path, monkeypatch, capsys, stops, caplog):
    """Though the server repeats it in errors and answers."""
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode()
    answers = [
        Answer(status=500, raw=echo),
        Answer(status=429, raw=echo, headers={"Retry-After": "0"}),
        Answer(raw=KEY.encode()),
        Answer(f"A red kite with {KEY} on its wing rises over the dunes."),
    ]

    def answer(request):
        return Answer(status=400, raw=echo) if request.name == "kite00001" else answers[min(request.number, 3)]

    flags = ["--api_key_env", "MY_KEY", "--output_dir", tmp_path / "out"]
    with serving(answer) as stub:
        line = stops(65, clips, stub, *flags)
        assert {request.key for request in stub.requests} == {f"Bearer {KEY}"} and "bad key [the key]" in line
        stub.answer = lambda _: Answer(status=401, raw=echo)
        line += stops(2, clips, stub, *flags)
    assert "A red kite with [the key] on its wing" in (tmp_path / "out/prompts.txt").read_text()
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) > 10 and not [text for text in texts if KEY.encode() in text]
    assert KEY not in line + caplog.text + "".join(capsys.readouterr())


@pytest.mark.parametrize("key", ["sk-canary with spaces", "sk-canary\u00e9", "sk-canary\nsecond"])
def test_a_key_that_is_none_is_refused_without_showing_it(key, clips, monkeypatch, stops):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving() as stub:
        line = stops(2, clips, stub)
    assert "$OPENAI_API_KEY" in line and "canary" not in line


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"http://user:{KEY}@localhost/v1", "more than an address"),
        (f"http://localhost/v1?key={KEY}", "more than an address"),
        ("localhost:8000", "must be the address"),
        ("http://", "must be the address"),
        ("http://localhost:port/v1", "must be the address"),
        ("ftp://localhost/v1", "must be the address"),
    ],
)
def test_an_address_is_an_address(url, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_caption_args(["--data_root", "d", "--base_url", url])
    err = capsys.readouterr().err
    assert expected in err and KEY not in err


@pytest.mark.parametrize("flags", [["--recaption"], ["--context", "caption"]])
def test_captions_in_place_are_not_replaced(flags, clips, stops):
    with serving() as stub:
        for more in ([], ["--output_dir", f"{clips}/."]):
            assert f"{' '.join(flags)}: " in stops(2, clips, stub, *flags, *more)
    assert not stub.requests


# ---------------------------------------------------------------- answers that are no captions

LIMIT = word_limit(60)  # 45 words
GOOD = "A grey cat walks along a wall, stops and looks down, while the camera follows it from the left."
FAULTS = {
    "a refusal": ["I'm sorry, but I can't help with that.", "I cannot see a video.", "As an AI language model, I",
                  "Unfortunately, no frames were given.", "Please provide the video.", "Sorry!", "No video was found."],
    "empty": ["", "  \n ", "...", "<think>A cat?</think>", "\U0001f408", "<think>It never ends"],
    "too long": [f"{GOOD} Then it jumps. The wall is old. It rains on the street and a dog barks at the cat now. "
                 "Behind the wall a garden with tall trees can be seen in the evening light of a long summer day."],
    "repeating": ["The cat walks and the cat walks and the cat walks and the cat walks.", f"{GOOD} {GOOD}",
                  "A cat sits on a wall. It looks down. A cat sits on a wall."],
    "a list": ["- A cat\n- A wall\n- A street", "1. The cat walks.\n2. It stops.", "# Scene\n* A cat"],
    "cut off": ["A grey cat walks along a wall, stops and looks at the", "A cat walks,", "A cat, a wall and"],
    "in other letters than Latin": ["\u4e00\u53ea\u7070\u8272\u7684\u732b\u6cbf\u7740\u5899\u8d70\u3002",
                                    "\u0421\u0435\u0440\u0430\u044f \u043a\u043e\u0448\u043a\u0430 \u0438\u0434\u0451\u0442 A"],
    "in Spanish": ["Un gato gris camina por un muro y se detiene con la mirada hacia el suelo."],
    "in French": ["Un chat gris marche sur un mur et s'arr\u00eate dans la lumi\u00e8re du soir."],
    "in German": ["Eine graue Katze l\u00e4uft auf einer Mauer und bleibt im Licht der Sonne stehen."],
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_answers_that_are_no_captions_are_noticed(what):
    for answer in FAULTS[what]:
        fault = find_fault(answer, False, False, LIMIT, None)
        assert fault and fault.what.startswith(what), (answer, fault)


@pytest.mark.parametrize(
    "caption",
    [
        GOOD,
        "A red circle moves quickly left.",
        "Two kites, red and blue, rise, circle each other and rise again.",
        "A man in a caf\u00e9 in Rio de Janeiro pours coffee; the camera is still.",
        "Waves break. Waves break again, very, very slowly.",
        "The red circle goes slowly up, the background is black.",
        "A sign that says 'Sorry, we are closed' hangs in a door.",
        "An orange fish",
    ],
)
def test_captions_are_taken(caption):
    assert find_fault(caption, False, False, LIMIT, None) is None
    assert as_caption(caption) == caption


RUNAWAYS = ["'" * 2000, "a" * 5000, "'a " * 1000, "- " * 2000, '"' * 2000, "<think>" * 500, "the video " * 500]


@pytest.mark.parametrize("answer", RUNAWAYS, ids=lambda answer: answer[:7])
def test_a_runaway_answer_is_judged_in_no_time(answer):
    started = time.monotonic()
    find_fault(answer, False, False, LIMIT, None)
    assert time.monotonic() - started < 1


def test_the_servers_own_word_counts():
    assert find_fault(GOOD, True, False, LIMIT, None).what == "cut off"
    assert find_fault(GOOD, False, True, LIMIT, None).what == "a refusal"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The video shows a cat on a wall.", "A cat on a wall."),
        ("This short clip captures a cat.", "A cat."),
        ("In this video, we see a cat.", "A cat."),
        ("In the video a cat sleeps.", "A cat sleeps."),
        ("The footage begins with a cat, then a dog.", "A cat, then a dog."),
        ("Here is a caption for the video:\n\nA cat.", "A cat."),
        ("Sure! Here's a detailed description of the clip: \u201cA cat.\u201d", "A cat."),
        ("**Caption:** A cat.", "A cat."),
        ('"A cat."', "A cat."),
        ("<think>What is it?</think>\nA cat.", "A cat."),
        ("A cat\nsleeps.\n\nIt snores.\u2028Softly.", "A cat sleeps. It snores. Softly."),
        ("The video game on the screen shows a cat.", "The video game on the screen shows a cat."),
        ("This is a cat.", "This is a cat."),
        ("The scene is lit from behind.", "The scene is lit from behind."),
        ("The video shows", "The video shows"),
        ('"Stop" is written on a "red" sign', '"Stop" is written on a "red" sign'),
        ("A\x00 cat\ud800 \ufeffsleeps\x1b\x9b.", "A cat sleeps."),
        ("'A' is before 'B'", "'A' is before 'B'"),
    ],
)
def test_openings_and_wrapping_are_taken_off(answer, expected):
    assert as_caption(answer) == expected


def test_a_faulty_answer_is_asked_for_again_with_advice_and_then_listed(clips, stops):
    bad = [FAULTS["a refusal"][0], FAULTS["in German"][0], FAULTS["repeating"][0]]

    def answer(request):
        if request.name == "kite00001":
            return Answer(FAULTS["a refusal"][0])
        return Answer(bad[request.number]) if request.number < 3 else good(request)

    with serving(answer) as stub:
        line = stops(65, clips, stub)
        assert "kite00001.mp4: 4 answers and no caption, the last one a refusal" in line
        asked = [request for request in stub.requests if request.name == "kite00000"]
    assert listed(clips)["kite00000.mp4"] == caption_of(0) and "kite00001.mp4" not in listed(clips)
    advice = ["Nobody has to be identified", "Answer in English only.", "Say everything once."]
    assert [text in request.text for text, request in zip(advice, asked[1:], strict=True)] == [True] * 3
    assert [request.body["temperature"] > 0 for request in asked] == [False, True, True, True]


@pytest.mark.parametrize("model", ["folder", "tokenizer"])
def test_length_is_counted_by_the_models_tokenizer_and_nothing_is_cut(model, clips, tiny, tmp_path, stops):
    """The limit holds for the caption with the trigger in front."""
    from transformers import AutoTokenizer

    folder = tiny("5b") if model == "folder" else tiny("5b") / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tiny("5b") / "tokenizer")
    long, short = "A red circle moves slowly to the left over a black background.", "A red circle moves."
    tokens = len(tokenizer(f"KITE {long}").input_ids)
    (tmp_path / "prompt.txt").write_text("What is this?")
    flags = ["--pretrained_model_name_or_path", folder, "--trigger", "KITE", "--output_dir", tmp_path / "out"]
    for prompt in ([], ["--prompt_file", tmp_path / "prompt.txt"]):  # the first one's text depends on the limit
        check_length(clips, [*flags, *prompt], tokens, long, short)


def check_length(clips, flags, tokens, long, short):
    """A first answer that just fits is taken; one token less, and it is asked for again until it is short enough."""
    with serving(lambda request: Answer(long if request.number == 0 else short)) as stub:
        out = caption(clips, stub, *flags, "--max_tokens", tokens)
        assert set(listed(out).values()) == {f"KITE {long}"} and len(stub.requests) == 5
        caption(clips, stub, *flags, "--max_tokens", tokens)
        assert len(stub.requests) == 5
        del stub.requests[:]
        caption(clips, stub, *flags, "--max_tokens", tokens - 1)
        assert set(listed(out).values()) == {f"KITE {short}"} and len(stub.requests) == 10
        assert "the answer was too long: use at most" in stub.requests[-1].text


# ---------------------------------------------------------------- many clips, and what is made of them


@pytest.mark.slow
def test_10_000_clips_take_no_more_memory_than_100(make_clips, tmp_path):
    """In a process of its own, whose peak is compared after 100 clips and after all."""
    root = make_clips(tmp_path / "clips", 10_000)

    def peak():
        return int(next(line for line in lines(Path("/proc/self/status")) if line.startswith("VmHWM")).split()[1])

    def main(queue):
        few = tmp_path / "few"
        few.mkdir()
        for path in sorted(root.iterdir())[:100]:
            os.link(path, few / path.name)
        with serving() as stub:
            caption(few, stub.url, "--concurrency", 16, "--output_dir", tmp_path / "out-few")
            before = peak()
            stub.requests = Forgetful()
            caption(root, stub.url, "--concurrency", 16, "--output_dir", tmp_path / "out")
            queue.put((before, peak(), stub.requests.count))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=main, args=(queue,))
    process.start()
    before, after, num_requests = queue.get(timeout=1200)
    process.join()
    print(f"peak of {before >> 10} MiB after 100 clips, {after >> 10} MiB after 10,000")
    assert num_requests == 10_000 and len(listed(tmp_path / "out")) == 10_000
    assert after - before < 100 * 1024  # KiB


class Forgetful(list):
    """Counts the requests, whose images would fill the memory."""

    count = 0

    def append(self, _):
        self.count += 1


def known_world(folder):
    """A stub's answers for clips of the small model's world: the true caption of the clip whose frames are nearest."""
    pairs = list(zip(lines(folder / "videos.txt"), lines(folder / "prompts.txt"), strict=True))
    frames = {text: pixels_of(show_frames(folder / name, 8, 720).files) for name, text in pairs}

    def answer(request):
        seen = pixels_of(request.files)
        return Answer(min(frames, key=lambda text: abs(frames[text] - seen).mean()))

    return answer


def pixels_of(shown):
    return np.stack([np.asarray(Image.open(io.BytesIO(content)), dtype=float) for _, content in shown])


@pytest.mark.slow
def test_captions_of_a_server_that_knows_the_clips_train_as_the_true_ones(tmp_path):
    """From videos alone through preparing and a short LoRA of the shipped model: the same files, losses and weights."""
    import cogvideox_text_to_video_lora
    import prepare_dataset
    import world

    model = Path(__file__).resolve().parents[1] / "assets/tiny-cogvideox"
    world.write_dataset(tmp_path / "true", world.teaching_contents("pink", 6))
    bare = tmp_path / "bare"
    shutil.copytree(tmp_path / "true/videos", bare / "videos")
    with serving(known_world(tmp_path / "true")) as stub:
        tokens = ["--pretrained_model_name_or_path", model, "--max_tokens", 32]
        captioned = caption(
            bare, stub, "--context", "none", "--num_frames", 8, "--output_dir", tmp_path / "captioned", *tokens
        )
    assert listed(captioned) == dict(
        zip(lines(tmp_path / "true/videos.txt"), lines(tmp_path / "true/prompts.txt"), strict=True)
    )
    made, runs = [], []
    for name in ("true", "captioned"):
        argv = ["--model_id", model, "--data_root", tmp_path / name, "--output_dir", tmp_path / f"{name}-prepared"]
        argv += ["--caption_column", "prompts.txt", "--video_column", "videos.txt", "--max_sequence_length", 32]
        argv += ["--height_buckets", 64, "--width_buckets", 64, "--frame_buckets", 9, "--max_num_frames", 9]
        argv += ["--save_latents_and_embeddings"]
        prepare_dataset.main(parse_prepare_args(list(map(str, argv))))
        files.release_locks()
        argv = [
            "--pretrained_model_name_or_path",
            model,
            "--data_root",
            tmp_path / f"{name}-prepared",
            "--load_tensors",
        ]
        argv += [
            "--output_dir",
            tmp_path / f"{name}-lora",
            "--max_train_steps",
            6,
            "--train_batch_size",
            2,
            "--seed",
            1,
        ]
        argv += ["--mixed_precision", "no", "--rank", 4, "--learning_rate", "1e-3", "--lr_warmup_steps", 0]
        cogvideox_text_to_video_lora.main(parse_training_args("t2v_lora", list(map(str, argv))))
        files.release_locks()
        prepared = tmp_path / f"{name}-prepared"
        made.append({path.relative_to(prepared): path.read_bytes() for path in prepared.rglob("*.safetensors")})
        runs.append((losses(tmp_path / f"{name}-lora"), result_hash(tmp_path / f"{name}-lora")))
    assert len(made[0]) == 13 and made[0] == made[1]
    assert len(runs[0][0]) == 6 and runs[0] == runs[1]


def test_a_folder_without_files_is_told_what_it_needs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files in it; put the videos there"):
        find_clips(tmp_path / "empty", None, None, None)
