"""Headers that are read while the libraries are imported: found by the script, whatever happens to the reader."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest

from base import hashes
from base.errors import DataError
from data import header_cache, headers, read_ahead
from data.clip_lists import read_clips_from_args
from data.header_cache import header_or_error_of_all
from data.headers import Header, read_header
from synthetic_clips import write_clip


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """The cache's folder; files count as settled at once. No reader outlives its test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -1.0)
    yield tmp_path / "cache/cogvideox-factory/headers"
    read_ahead.finish()


@pytest.fixture
def clips(tmp_path):
    """The flags that name four clips, the last of which is damaged."""
    root = tmp_path / "clips"
    root.mkdir()
    names = [write_clip(root / f"{number}.mp4", 9 + number, seed=number).name for number in range(3)] + ["bad.mp4"]
    (root / "bad.mp4").write_bytes(b"\0" * 1000)
    (root / "videos.txt").write_text("\n".join(names))
    (root / "prompts.txt").write_text("\n".join(f"clip {name}" for name in names))
    return flags(root)


def flags(root, **changes):
    given = {"data_root": str(root), "dataset_file": None, "caption_column": None, "video_column": None}
    given |= {"allow_outside_root": False, "id_token": None, "repeats": 1, "load_tensors": False}
    return SimpleNamespace(**given | changes)


def wait_until_read():
    [reader] = read_ahead.READERS
    reader.process.join(30)
    assert reader.process.exitcode == 0


def names_read(monkeypatch, args):
    """The clips that the script still opens, and what it makes of all."""
    names = []

    def counted(path):
        names.append(os.path.basename(path))
        return read_header(path)

    monkeypatch.setattr(header_cache, "read_header", counted)
    read_ahead.finish()
    return names, header_or_error_of_all(read_clips_from_args(args), use_cache=True)


def test_what_was_read_ahead_is_not_read_again(clips, monkeypatch, capfd):
    read_ahead.start_from_args(clips)
    wait_until_read()
    names, found = names_read(monkeypatch, clips)
    assert names == ["bad.mp4"]  # the script says what is wrong with it
    assert [type(header) for header in found] == [Header] * 3 + [DataError]
    assert [header.info.num_frames for header in found[:3]] == [9, 10, 11]
    assert capfd.readouterr() == ("", "") and not read_ahead.READERS


def test_a_reader_that_is_asked_to_end_keeps_what_it_has(clips, monkeypatch):
    def slow(path):
        time.sleep(0.2)
        return read_header(path)

    monkeypatch.setattr(header_cache, "read_header", slow)
    read_ahead.start_from_args(clips)
    time.sleep(0.3)
    names, found = names_read(monkeypatch, clips)
    assert 1 < len(names) < 4 or names == ["bad.mp4"]
    assert [header.info.num_frames for header in found[:3]] == [9, 10, 11]


def test_a_reader_that_was_killed_costs_reading_alone(clips, monkeypatch):
    monkeypatch.setattr(header_cache, "read_header", lambda path: time.sleep(60))
    read_ahead.start_from_args(clips)
    os.kill(read_ahead.READERS[0].process.pid, signal.SIGKILL)
    names, found = names_read(monkeypatch, clips)
    assert len(names) == 4 and isinstance(found[0], Header)


@pytest.mark.parametrize("change", [{"data_root": "gone"}, {"dataset_file": "gone.csv"}, {"video_column": "gone.txt"}])
def test_what_is_wrong_with_the_list_is_left_to_the_script(clips, change, capfd, memory):
    read_ahead.start_from_args(SimpleNamespace(**vars(clips) | change))
    wait_until_read()
    assert capfd.readouterr() == ("", "") and not memory.exists()


def test_prepared_clips_other_ranks_and_verifying_read_nothing_ahead(clips, monkeypatch):
    read_ahead.start_from_args(flags("prepared", load_tensors=True))
    read_ahead.start_from_args(clips, uses_cache=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    read_ahead.start_from_args(clips)
    assert not read_ahead.READERS


def test_the_cache_holds_what_reading_now_gives(clips, memory):
    read_ahead.start_from_args(clips)
    wait_until_read()
    [entries] = [json.loads(path.read_text()) for path in memory.iterdir()]
    root = clips.data_root
    assert {name: entry["header"] for name, entry in entries.items()} == {
        name: json.loads(json.dumps(header_cache.to_json(headers.read_header(f"{root}/{name}"))))
        for name in ("0.mp4", "1.mp4", "2.mp4")
    }
