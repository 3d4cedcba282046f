"""Hashes of whole files: right whatever changed, and read once where nothing did."""

import hashlib
import json
import multiprocessing
import os
import stat
import threading
import time
import tracemalloc

import pytest

from base import hashes
from base.errors import DataError, UsageError
from base.hashes import HashCache, file_hash


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """The folder of what is remembered; files count as settled at once, so that no test has to wait."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -1.0)
    return tmp_path / "cache/cogvideox-factory/hashes"


@pytest.fixture
def reads(monkeypatch):
    """The names of files that are read to hash them."""
    names = []

    def counted(path, algorithm="blake2b"):
        names.append(path.name)
        return file_hash(path, algorithm)

    monkeypatch.setattr(hashes, "file_hash", counted)
    return names


def hash_of(path, algorithm="blake2b", **options):
    with HashCache(**options) as found:
        return found.hash(path, algorithm)


def expected(path, algorithm="blake2b"):
    content = path.read_bytes()
    return (hashlib.sha256(content) if algorithm == "sha256" else hashlib.blake2b(content, digest_size=16)).hexdigest()


def test_hashing_a_large_file_takes_no_memory(tmp_path):
    with open(tmp_path / "large.mp4", "wb") as file:
        file.truncate(64 * 2**20)
        file.write(b"end")
    tracemalloc.start()
    digest = file_hash(tmp_path / "large.mp4")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert digest == expected(tmp_path / "large.mp4")
    assert peak < 4 * 2**20


def test_a_file_is_read_once(tmp_path, reads):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    for _ in range(3):
        assert hash_of(tmp_path / "a") == expected(tmp_path / "a")
        assert hash_of(tmp_path / "a", "sha256") == expected(tmp_path / "a", "sha256")
        assert hash_of(tmp_path / "b") == expected(tmp_path / "b")
    assert sorted(reads) == ["a", "a", "b"]  # each way once
    assert hash_of(tmp_path / "a", use_cache=False) == expected(tmp_path / "a") and len(reads) == 4


def with_time_set_back(path, content):
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=times)


def replaced_with_its_time(path, content):
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def through_a_link(path, content):
    real = path.rename(path.with_name("real"))
    path.symlink_to(real)
    hash_of(path)
    with_time_set_back(real, content)


@pytest.mark.parametrize("change", [with_time_set_back, replaced_with_its_time, through_a_link])
def test_a_change_of_the_same_size_and_time_is_seen(tmp_path, change):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(5000))
    before = hash_of(path)
    change(path, bytes(4999) + b"1")
    assert hash_of(path) == expected(path) != before


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", 3600.0)
    (tmp_path / "a").write_bytes(b"1")
    for _ in range(2):
        assert hash_of(tmp_path / "a") == expected(tmp_path / "a")
    assert len(reads) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": []}', b'{"a": {"stamp": 3}}', b'{"a": {"blake2b": "beef"}}'],
)
def test_a_damaged_memory_costs_reading_alone(tmp_path, memory, content, reads):
    (tmp_path / "a").write_bytes(b"1" * 100)
    hash_of(tmp_path / "a")
    (entry,) = memory.iterdir()
    entry.write_bytes(content)
    for _ in range(2):
        assert hash_of(tmp_path / "a") == expected(tmp_path / "a")
    assert len(reads) == 2 and json.loads(entry.read_text())["a"]["blake2b"] == expected(tmp_path / "a")


@pytest.mark.parametrize("place", ["a file in its place", "a folder in the file's place", "no home"])
def test_a_memory_that_cannot_be_kept_costs_reading_alone(tmp_path, memory, place, caplog, monkeypatch):
    (tmp_path / "a").write_bytes(b"1")
    if place == "a file in its place":
        memory.parent.mkdir(parents=True)
        memory.write_text("")
    elif place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(hashes.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        hash_of(tmp_path / "a")
        (entry,) = memory.iterdir()
        entry.unlink()
        (entry / "x").mkdir(parents=True)
    assert hash_of(tmp_path / "a") == expected(tmp_path / "a")
    assert caplog.text.count("cannot be kept") == 1


def test_processes_that_write_at_once_leave_a_whole_memory(tmp_path, memory):
    for name in "abcdefgh":
        (tmp_path / name).write_bytes(name.encode())
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=hash_of, args=(tmp_path / name,)) for name in "abcdefgh"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    (entry,) = memory.iterdir()
    assert json.loads(entry.read_text()) and all(
        hash_of(tmp_path / name) == expected(tmp_path / name) for name in "ah"
    )


def test_files_that_are_gone_are_forgotten(tmp_path, memory):
    for name in "ab":
        (tmp_path / name).write_bytes(b"1")
        hash_of(tmp_path / name)
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_bytes(b"2")
    hash_of(tmp_path / "b")
    (entry,) = memory.iterdir()
    assert list(json.loads(entry.read_text())) == ["b"]


@pytest.fixture
def blob(tmp_path):
    """A file of a snapshot as the hub's cache holds it: a link to a blob that is named by its hash."""
    content = b"weights" * 100
    blobs, snapshot = tmp_path / "models--x--y/blobs", tmp_path / "models--x--y/snapshots/1/vae"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    real = blobs / hashlib.sha256(content).hexdigest()
    real.write_bytes(content)
    real.chmod(stat.S_IRUSR | stat.S_IWUSR)
    link = snapshot / "model.safetensors"
    link.symlink_to(os.path.relpath(real, snapshot))
    return link


def test_a_blob_of_the_hub_is_not_read(blob, tmp_path, reads):
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(blob.read_bytes())
    assert hash_of(blob, "sha256") == hash_of(copy, "sha256") == expected(copy, "sha256")
    assert reads == ["model.safetensors"]  # the copy alone
    assert hash_of(blob, "sha256", use_cache=False) == expected(copy, "sha256") and len(reads) == 2


def test_a_damaged_blob_is_named_where_nothing_is_believed(blob):
    blob.resolve().write_bytes(b"weighty" * 100)
    with pytest.raises(UsageError, match="other bytes than were downloaded"):
        hash_of(blob, "sha256", use_cache=False)


def test_a_small_file_of_the_hub_has_no_such_name(tmp_path, blob):
    """git's hash is of another kind: of 40 digits, and with a header before the content."""
    small = blob.resolve().with_name("0123456789" * 4)
    small.write_text("{}")
    assert hash_of(small, "sha256") == expected(small, "sha256")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 9, b"\x10" + bytes(7) + b"{}", bytes(200_000)])
def test_any_bytes_can_be_sampled(content, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(content)  # it is named where it is read
    assert hashes.sampled_hash(tmp_path / "damaged.safetensors")
    (tmp_path / "a.mp4").write_bytes(content)
    first = hashes.sampled_hash(tmp_path / "a.mp4")
    for other in (content + b"m", b"m" + content, content[:-1] + b"mm"):
        (tmp_path / "a.mp4").write_bytes(other)
        assert hashes.sampled_hash(tmp_path / "a.mp4") != first


# ---------------------------------------------------------------- sampled hashes of many files


@pytest.fixture
def samples(monkeypatch):
    """The names of files whose ends are read."""
    names = []

    def counted(path, sampled_hash=hashes.sampled_hash):
        names.append(os.path.basename(path))
        return sampled_hash(path)

    monkeypatch.setattr(hashes, "sampled_hash", counted)
    return names


def test_files_are_sampled_once_and_again_where_one_changed(tmp_path, samples):
    paths = [tmp_path / f"{number}.mp4" for number in range(100)]
    for number, path in enumerate(paths):
        path.write_bytes(number.to_bytes(8))
    first = hashes.hash_files(paths)
    assert hashes.hash_files(paths) == first and sorted(samples) == sorted(path.name for path in paths)
    assert hashes.hash_files(paths[::-1]) != first and len(samples) == 100
    with_time_set_back(paths[3], bytes(8))
    changed = hashes.hash_files(paths)
    assert changed != first and samples[100:] == ["3.mp4"]
    with_time_set_back(paths[3], (3).to_bytes(8))
    assert hashes.hash_files(paths) == first and samples[101:] == ["3.mp4"]


def test_a_sampled_hash_is_kept_beside_that_of_the_whole_file(tmp_path, samples, reads):
    (tmp_path / "a.mp4").write_bytes(b"1" * 1000)
    for _ in range(2):
        hashes.hash_files([tmp_path / "a.mp4"])
        assert hash_of(tmp_path / "a.mp4") == expected(tmp_path / "a.mp4")
    assert samples == reads == ["a.mp4"]


def test_links_by_which_a_file_is_a_tensor_file_and_is_none_are_told_apart(tmp_path):
    """A tensor file's header is left out of the sample: its name says what it is, not that of the file behind a link."""
    (tmp_path / "blob").write_bytes(bytes([8, *bytes(7)]) + b"metadata" + b"1" * 100)
    links = [tmp_path / "a.safetensors", tmp_path / "a.mp4"]
    for link in links:
        link.symlink_to("blob")
    wanted = [hashes.hash_files([link]) for link in links]
    assert [hashes.hash_files([link]) for link in reversed(links)] == wanted[::-1]
    assert wanted[0] != wanted[1]


def test_a_file_that_is_gone_is_named_although_it_was_sampled(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"1")
    hashes.hash_files([path])
    path.unlink()
    with pytest.raises(DataError, match=r"a\.mp4: cannot be read \(No such file"):
        hashes.hash_files([path])


@pytest.mark.parametrize("num_items", [0, 1, 7, 2000])
@pytest.mark.parametrize("slow_from", [0, 1, 500, 10_000])
def test_what_is_read_in_threads_keeps_its_order_and_is_read_once(num_items, slow_from):
    seen, threads = [], set()

    def read(item):
        if item >= slow_from:
            time.sleep(2e-4)
        seen.append(item)
        threads.add(threading.get_ident())
        return -item

    assert list(hashes.in_threads(read, range(num_items))) == [-item for item in range(num_items)]
    assert sorted(seen) == list(range(num_items))
    if slow_from == 0 and num_items == 2000:
        assert len(threads) > 2  # a disk that is waited for
