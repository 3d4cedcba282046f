"""Cached headers: right whatever changed, and read once where nothing did."""

import json
import os
import shutil
import signal
from fractions import Fraction

import pytest

from base import hashes
from base.errors import DataError, Interrupted
from data import header_cache
from data.buckets import make_buckets
from data.clip_lists import Clip
from data.header_cache import cached_header, to_json
from data.headers import Header, VideoInfo, read_header
from data.picture import INTERLACED, TRANSPARENT, Caution, Picture
from data.videos import VideoDatasetWithResizing
from synthetic_clips import write_clip


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """The folder of what is remembered; files count as settled at once, so that no test has to wait."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -1.0)
    return tmp_path / "cache/cogvideox-factory/headers"


@pytest.fixture
def reads(monkeypatch):
    """The names of files that are opened."""
    names = []

    def counted(path):
        names.append(os.path.basename(path))
        return read_header(path)

    monkeypatch.setattr(header_cache, "read_header", counted)
    return names


@pytest.fixture
def clip(tmp_path):
    (tmp_path / "videos").mkdir()
    return write_clip(tmp_path / "videos/a.mp4", 9)


def header_of(path, **options):
    [header] = header_cache.header_or_error_of_all([Clip(path, "", 1, "")], options.get("use_cache", True))
    if isinstance(header, DataError):
        raise header
    return header


def test_a_header_is_read_once(clip, reads, memory):
    assert header_of(clip) == header_of(clip) == header_of(os.path.relpath(clip)) == read_header(clip)
    assert reads == ["a.mp4"] and len(list(memory.iterdir())) == 1
    assert header_of(clip, use_cache=False) == read_header(clip) and len(reads) == 2


def test_a_second_data_set_opens_nothing_and_is_the_same(clip, reads):
    names = [f"{number}.mp4" for number in range(20)]
    for number, name in enumerate(names):
        write_clip(clip.parent / name, 9 + number % 3, seed=number)
    clips = [Clip(clip.parent / name, "", row, name) for row, name in enumerate(names)]
    sets = [VideoDatasetWithResizing(clips, make_buckets([9], [64], [96]), fps=8) for _ in range(2)]
    assert sorted(reads) == sorted(names)
    assert sets[0].infos == sets[1].infos and sets[0].fingerprint() == sets[1].fingerprint()


@pytest.mark.parametrize("cores", [1, 2])
def test_many_headers_are_read_by_processes_and_are_the_same(cores, clip, memory, monkeypatch):
    paths = [clip] + [write_clip(clip.with_name(f"{number}.mp4"), 9 + number, seed=number) for number in range(9)]
    clip.with_name("bad.mp4").write_bytes(b"\0" * 600)
    clips = [
        Clip(path, "", 1, path.name) for path in [*paths, clip.with_name("bad.mp4"), clip.with_name("gone.mp4"), clip]
    ]
    wanted = header_cache.header_or_error_of_all(clips, use_cache=False)
    monkeypatch.setattr(header_cache, "FORK_FROM", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    for use_cache in (True, True, False):
        found = header_cache.header_or_error_of_all(clips, use_cache)
        assert [str(header) for header in found] == [str(header) for header in wanted]
    assert len(json.loads(next(memory.iterdir()).read_text())) == 10


def test_a_killed_reader_of_headers_is_one_line(clip, monkeypatch):
    monkeypatch.setattr(header_cache, "FORK_FROM", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(header_cache, "read_header", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(Interrupted, match="was killed, most likely for lack of memory"):
        header_of(clip)


def time_set_back(path):
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write_clip(path, 17)
    os.utime(path, ns=times)


def replaced(path):
    write_clip(path.with_name("other.mp4"), 17).replace(path)


def replaced_by_a_link(path):
    write_clip(path.with_name("other.mp4"), 17)
    path.unlink()
    path.symlink_to("other.mp4")


@pytest.mark.parametrize("change", [time_set_back, replaced, replaced_by_a_link])
def test_a_file_that_changed_is_read_again(clip, change):
    assert header_of(clip).info.num_frames == 9
    change(clip)
    assert header_of(clip).info.num_frames == header_of(clip).info.num_frames == 17


def test_another_file_behind_the_same_link_is_read_again(clip, reads):
    write_clip(clip.with_name("b.mp4"), 17)
    link = clip.with_name("link.mp4")
    for target, num_frames in (("a.mp4", 9), ("b.mp4", 17), ("a.mp4", 9)):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert header_of(link).info.num_frames == num_frames
    assert len(reads) == 2  # each target once


def test_what_just_changed_and_what_cannot_be_read_is_not_remembered(clip, reads, monkeypatch):
    clip.with_name("bad.mp4").write_bytes(b"\0" * 1000)
    for _ in range(2):
        with pytest.raises(DataError, match="bad.mp4: zeros only"):
            header_of(clip.with_name("bad.mp4"))
        with pytest.raises(DataError, match="gone.mp4: no such file"):
            header_of(clip.with_name("gone.mp4"))
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", 3600.0)
    for _ in range(2):
        assert header_of(clip).info.num_frames == 9
    assert sorted(reads) == ["a.mp4"] * 2 + ["bad.mp4"] * 2 + ["gone.mp4"] * 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a.mp4": []}', b'{"a.mp4": {"stamp": 3}}'])
def test_a_damaged_cache_costs_reading_alone(clip, memory, content, reads):
    header_of(clip)
    (entry,) = memory.iterdir()
    entry.write_bytes(content)
    for _ in range(2):
        assert header_of(clip) == read_header(clip)
    assert len(reads) == 2 and json.loads(entry.read_text())["a.mp4"]["header"]


@pytest.mark.parametrize(
    "change",
    [
        {"reader": "0, PyAV 1"}, {"header": None}, {"header": []}, {"header": ["nine"] * 8}, {"stamp": [1, 2, 3]},
        {"header": [9, 8, 64, 96, [0, 0], [1, 1], [1, 0, 0, 1], []]},
        {"header": [9, 8, 64, 96, [0, 0, 0, 0], [1, 0], [1, 0, 0, 1], []]},
        {"header": [9, 8, 64, 96, [0, 0, 0, 0], [1, 1], [1, 0, 0, 1], [["what"]]]},
    ],
)  # fmt: skip
def test_an_entry_of_another_reader_or_shape_is_not_believed(clip, memory, change, reads):
    header_of(clip)
    (entry,) = memory.iterdir()
    entries = json.loads(entry.read_text())
    entry.write_text(json.dumps({"a.mp4": entries["a.mp4"] | change}))
    assert header_of(clip) == read_header(clip) and len(reads) == 2


def test_a_cache_that_cannot_be_written_costs_reading_alone(clip, memory, caplog):
    memory.parent.mkdir(parents=True)
    memory.write_text("")
    assert header_of(clip) == read_header(clip)
    assert caplog.text.count("headers of the files in") == caplog.text.count("cannot be kept") == 1


@pytest.mark.parametrize(
    "picture",
    [
        Picture((0, 0, 0, 0), Fraction(1), (1, 0, 0, 1), ()),
        Picture(
            (2, 4, 6, 8), Fraction(16, 11), (0, 1, -1, 0), (INTERLACED, TRANSPARENT, Caution('odd "name"', "a,b"))
        ),
    ],
)
@pytest.mark.parametrize("fps", [8, 24000 / 1001, 1 / 3])
def test_everything_of_a_header_is_kept_exactly(picture, fps):
    header = Header(VideoInfo(49, float(fps), 480, 720), picture)
    entry = json.loads(json.dumps({"stamp": [1, 2, 3], "reader": header_cache.READER, "header": to_json(header)}))
    found = cached_header(entry)
    assert found == header and found.picture.is_plain == picture.is_plain
    assert type(found.picture.cautions) is tuple and type(found.info) is VideoInfo


def test_folders_are_kept_apart_and_gone_files_forgotten(clip, memory, reads):
    other = clip.parents[1] / "others/a.mp4"
    other.parent.mkdir()
    write_clip(other, 17)
    assert [header_of(path).info.num_frames for path in (clip, other, clip, other)] == [9, 17, 9, 17]
    assert len(reads) == 2 and len(list(memory.iterdir())) == 2
    shutil.copy(clip, clip.with_name("b.mp4"))
    clip.unlink()
    header_of(clip.with_name("b.mp4"))
    assert sorted(name for path in memory.iterdir() for name in json.loads(path.read_text())) == ["a.mp4", "b.mp4"]
