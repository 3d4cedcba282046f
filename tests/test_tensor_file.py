"""Files of tensors: the library's bytes, one tensor at a time, the hash for nothing; whole or not there when killed."""

import contextlib
import gc
import hashlib
import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import save as library_bytes
from safetensors.torch import save_file

from base import files, manifest, tensor_file
from base.files import clean_up, remove_unfinished, write_json, write_manifest, write_shared, written_folder
from base.manifest import DamagedFile, find_damage, read_manifest, verified_folder
from base.tensor_file import CODES, open_header, read_tensors, save_tensors
from cogvideox.config import TEXT_TO_VIDEO_PIPELINE
from cogvideox.loading import load_transformer
from data.artifacts import write_tensors as write_prepared
from engine import sft
from engine.lora import save_lora
from engine.sft import check_saved_transformer, load_weights, save_transformer, save_weights
from run import curves
from run.checkpoints import refuse_bad_numbers
from run.export import merge_lora
from run.output_dir import open_output_dir
from test_atomic_save import KILLED, MAIN, count_operations, flags, in_child, kill_at
from test_lora import trained_transformer


def of_all_dtypes():
    values = torch.arange(6).reshape(2, 3)
    tensors = {
        f"{number}.{code}": values.to(dtype) for number, (dtype, code) in enumerate(sorted(CODES.items(), key=str))
    }
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "turned": torch.rand(3, 4).t()}


@pytest.mark.parametrize("metadata", [None, {"key": '{"caption": "a \\u00e9"}\n\x7f'}, {"format": "pt"}])
def test_the_bytes_are_the_librarys(metadata, tmp_path):
    tensors = of_all_dtypes()
    save_tensors(tmp_path / "ours", tensors, metadata)
    tensors["turned"] = tensors["turned"].contiguous()  # which the library refuses
    assert (tmp_path / "ours").read_bytes() == library_bytes(tensors, metadata)


def test_several_entries_of_metadata_lie_as_they_are_given(tmp_path):
    """The library orders them at random, process by process."""
    names = [f"entry {number}" for number in range(9)]
    save_tensors(tmp_path / "a", {"x": torch.ones(1)}, dict.fromkeys(names, ""))
    length = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "a").read_bytes()[8 : 8 + length])
    assert list(header) == ["__metadata__", "x"] and list(header["__metadata__"]) == names


# ---------------------------------------------------------------- hashed as it is written


def test_what_the_writer_hashed_is_not_read_again(tmp_path, monkeypatch):
    reads, file_hash = [], files.file_hash
    monkeypatch.setattr(files, "file_hash", lambda path, *more: reads.append(path.name) or file_hash(path, *more))
    with written_folder(tmp_path / "checkpoint") as folder:
        save_tensors(folder / "a.safetensors", of_all_dtypes(), {"format": "pt"})
        with files.replaced_folder(folder / "transformer") as inner:  # renamed after it was written
            save_tensors(inner / "b.safetensors", {"x": torch.arange(1000)})
        write_json(folder / "state.json", {})
    assert reads == ["state.json"]
    recorded = json.loads((tmp_path / "checkpoint/manifest.json").read_text())["files"]
    assert set(recorded) == {"a.safetensors", "transformer/b.safetensors", "state.json"}
    for name, entry in recorded.items():
        content = (tmp_path / "checkpoint" / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}, name
    assert find_damage(tmp_path / "checkpoint") is None and not files.noted


def test_a_file_that_was_written_over_is_read(tmp_path):
    with written_folder(tmp_path / "checkpoint") as folder:
        save_tensors(folder / "a.safetensors", {"x": torch.ones(3)})
        (folder / "a.safetensors").write_bytes(b"by another hand")
    assert find_damage(tmp_path / "checkpoint") is None


def test_a_disk_that_keeps_other_bytes_is_found_out(tmp_path):
    """Hashing what is read back at once would call them right."""
    with written_folder(tmp_path / "checkpoint") as folder:
        path = folder / "a.safetensors"
        save_tensors(path, {"x": torch.ones(3)})
        times = path.stat()
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "a.safetensors was changed" in find_damage(tmp_path / "checkpoint")


def test_nothing_is_hashed_where_nobody_asks(tmp_path, monkeypatch):
    """A prepared clip has no manifest, nor has the result of a run."""
    monkeypatch.setattr(tensor_file, "Hasher", lambda *values: pytest.fail("hashed"))
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    with files.replaced_folder(tmp_path / "transformer") as folder:
        save_tensors(folder / "a.safetensors", {"x": torch.ones(3)})


@pytest.mark.parametrize("is_hashed", [False, True])
def test_a_tensor_is_made_while_the_one_before_is_written_and_no_earlier(is_hashed, tmp_path, monkeypatch):
    """A model's tensors come from the GPU: neither waits for the other, and at most two are in memory."""
    alive, made, asked, act = weakref.WeakSet(), [], threading.Event(), tensor_file.InThread.act

    def tensor_of(name):
        asked.set()
        tensor = torch.full((2**17,), float(len(made)))
        alive.add(tensor.untyped_storage())
        made.append(len(alive))
        return tensor

    def written_when_the_next_is_asked_for(self):
        if len(made) < 9:
            assert asked.wait(60)
            asked.clear()
        act(self)

    if not is_hashed:  # with both threads at work, an event for each would be needed
        monkeypatch.setattr(tensor_file.InThread, "act", written_when_the_next_is_asked_for)
    sizes = {f"{number}": (torch.float32, [2**17]) for number in range(9)}
    with written_folder(tmp_path / "c") if is_hashed else contextlib.nullcontext(tmp_path) as folder:
        tensor_file.write_as_library(folder / "a.safetensors", sizes, tensor_of)
        assert len(made) == 9 and max(made) == 2
        assert [int(tensor[0]) for _, tensor in read_tensors(folder / "a.safetensors")] == list(range(9))


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 1000)
    tensors = {"a": torch.randn(33, 1001).to("cuda"), "b": torch.arange(7).to("cuda"), "c": torch.zeros(0).to("cuda")}
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert (tmp_path / "a.safetensors").read_bytes() == library_bytes({name: x.cpu() for name, x in tensors.items()})


@pytest.mark.parametrize("count", [1, 3])
def test_a_full_disk_is_an_error_whichever_tensor_it_is(count):
    """Though a thread writes."""
    with pytest.raises(OSError, match="No space left"):
        save_tensors(Path("/dev/full"), {f"{number}": torch.zeros(2**16) for number in range(count)})


# ---------------------------------------------------------------- read, and hashed as it is read


@pytest.fixture
def file(tmp_path, monkeypatch):
    """(a file of all dtypes, its SHA-256), read in chunks of 8 bytes."""
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 8)
    save_tensors(tmp_path / "a.safetensors", of_all_dtypes(), {"key": "value"})
    return tmp_path / "a.safetensors", hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("is_hashed", [False, True])
@pytest.mark.parametrize("writer", [save_tensors, save_file], ids=["ours", "the library"])
def test_what_was_written_is_read_in_the_order_of_the_file(writer, is_hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 8)
    path, tensors = tmp_path / "a.safetensors", of_all_dtypes()
    tensors["turned"] = tensors["turned"].contiguous()
    tensors |= {f"again {name}": tensor.clone() for name, tensor in tensors.items()}
    writer(tensors, path) if writer is save_file else writer(path, tensors, {"format": "pt"})
    found = dict(read_tensors(path, hashlib.sha256(path.read_bytes()).hexdigest() if is_hashed else None))
    assert list(found) == list(open_header(path)[0]) and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert bytes(tensor_file.bytes_of(found[name])) == bytes(tensor_file.bytes_of(tensor)), name
    assert open_header(path)[1] == ({} if writer is save_file else {"format": "pt"})


def test_every_changed_byte_is_found(file):
    """Each byte in turn, and bytes that came or went: of the header, of a tensor, at the end."""
    path, digest = file
    whole = path.read_bytes()
    assert dict(read_tensors(path, digest)).keys() == of_all_dtypes().keys()
    changes = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in range(0, len(whole), 3)]
    for data in (*changes, whole + b"\0", whole[:-1], b"", whole[:5]):
        path.write_bytes(data)
        with pytest.raises(DamagedFile, match=r"a\.safetensors"):
            dict(read_tensors(path, digest))


def header_of(text):
    return len(text).to_bytes(8, "little") + text


BAD_HEADERS = {
    "no JSON": header_of(b"{" * 8),
    "a list": header_of(b"[]"),
    "longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "no dtype": header_of(b'{"a": {"shape": [], "data_offsets": [0, 0]}}'),
    "an unknown dtype": header_of(b'{"a": {"dtype": "F1", "shape": [0], "data_offsets": [0, 0]}}'),
    "a shape of more": header_of(b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}') + b"1234",
    "a negative shape": header_of(b'{"a": {"dtype": "I8", "shape": [-2, -2], "data_offsets": [0, 4]}}') + b"1234",
    "a gap": header_of(b'{"a": {"dtype": "I8", "shape": [2], "data_offsets": [2, 4]}}') + b"1234",
    "more behind": header_of(b'{"a": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}') + b"1234",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_a_header_that_does_not_fit_the_file_is_refused_without_a_hash_too(kind, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(BAD_HEADERS[kind])
    with pytest.raises(DamagedFile, match=r"a\.safetensors has no valid safetensors header"):
        next(read_tensors(path))


def is_tensors(name):
    return name.endswith(".safetensors")


@pytest.fixture
def checkpoint(tmp_path):
    with written_folder(tmp_path / "checkpoint") as folder:
        for name in "ab":
            save_tensors(folder / f"{name}.safetensors", {"x": torch.arange(1000), "y": torch.ones(3)})
        write_json(folder / "state.json", {})
    return tmp_path / "checkpoint"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_is_loaded_is_read_once(checkpoint, monkeypatch):
    reads, file_hash = [], files.file_hash
    monkeypatch.setattr(files, "file_hash", lambda path, *more: reads.append(path.name) or file_hash(path, *more))
    assert find_damage(checkpoint, is_tensors) is None
    assert reads == ["state.json"]
    with verified_folder(checkpoint, is_tensors):
        dict(read_tensors(checkpoint / "a.safetensors"))
    assert reads == ["state.json", "b.safetensors"] and not manifest.unverified  # b: read by nobody


@pytest.mark.parametrize("reader", [read_tensors, lambda path: [next(read_tensors(path))], lambda path: []])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_changed_file_is_found_however_much_of_it_is_read(name, reader, checkpoint):
    flip(checkpoint / f"{name}.safetensors")
    assert find_damage(checkpoint, is_tensors) is None  # it is left for later
    with (
        pytest.raises(DamagedFile, match=rf"^{name}\.safetensors was changed"),
        verified_folder(checkpoint, is_tensors),
    ):
        for path in ("a", "b"):
            list(reader(checkpoint / f"{path}.safetensors"))
    assert not manifest.unverified


def test_an_error_from_a_changed_file_is_its_damage_and_any_other_is_itself(checkpoint):
    with pytest.raises(KeyError), verified_folder(checkpoint, is_tensors):
        open_header(checkpoint / "a.safetensors")[0]["z"]
    path = checkpoint / "b.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"y"', b'"z"'))
    with pytest.raises(DamagedFile, match=r"^b\.safetensors was changed"), verified_folder(checkpoint, is_tensors):
        open_header(path)[0]["y"]
    write_manifest(checkpoint)  # by whom it is as meant: then it is no damage
    with pytest.raises(KeyError), verified_folder(checkpoint, is_tensors):
        open_header(path)[0]["y"]
    assert read_manifest(checkpoint).keys() == {"a.safetensors", "b.safetensors", "manifest.json", "state.json"}


# ---------------------------------------------------------------- the model's files


@pytest.fixture
def transformer(tiny):
    return load_transformer(tiny("2b"), torch.float32)


@pytest.mark.parametrize("size", ["10GB", "100KB"])
@pytest.mark.parametrize("kind", ["2b", "5b-i2v"], ids=["", "with a buffer"])
def test_a_transformer_lies_on_the_disk_as_diffusers_saves_it(kind, size, tiny, tmp_path, monkeypatch):
    transformer = load_transformer(tiny(kind), torch.float32)
    weights = {name: param.detach() * 1.01 for name, param in transformer.named_parameters()}
    monkeypatch.setattr(sft, "SHARD_SIZE", size)
    save_transformer(transformer, weights, torch.float16, tmp_path, {})
    for name, param in transformer.named_parameters():
        param.data = weights[name].half()
    transformer.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "config.json"}
        for name in ("transformer", "theirs")
    )
    assert ours == theirs and (len(ours) > 2) == (size == "100KB")
    loaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer", dtype=torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), transformer.parameters(), strict=True))


def test_two_weights_at_a_time_are_copied(transformer, tmp_path, monkeypatch):
    """Of a model of 10 GiB a second one in memory is too many."""
    made, alive, pieces_of = [], weakref.WeakSet(), tensor_file.pieces_of

    def seen(tensor):
        alive.add(tensor.untyped_storage())
        made.append(len(alive))
        return pieces_of(tensor)

    monkeypatch.setattr(tensor_file, "pieces_of", seen)
    weights = dict(transformer.named_parameters())
    save_transformer(transformer, weights, torch.bfloat16, tmp_path, {})
    assert len(made) == len(weights) and max(made) <= 2


class MadeOnAccess(Mapping):
    """Weights that exist while they are used: none twice, and beside one only that before it, which is being written."""

    def __init__(self, model):
        self.params, self.asked, self.alive = dict(model.named_parameters()), [], weakref.WeakSet()

    def __getitem__(self, name):
        assert len(self.alive) < 2, f"one before {self.asked[-1]} is kept"
        self.asked.append(name)
        made = self.params[name].detach() * 1.01
        self.alive.add(made.untyped_storage())
        return made

    def __iter__(self):
        return iter(self.params)

    def __len__(self):
        return len(self.params)

    def was_made_once(self):
        asked, self.asked = self.asked, []
        return sorted(asked) == sorted(self.params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_made_on_access_are_made_once_and_one_by_one(dtype, transformer, tmp_path):
    weights = MadeOnAccess(transformer)
    gc.disable()  # what only the collector frees is kept
    try:
        refuse_bad_numbers(weights.values())
        assert weights.was_made_once()
        with written_folder(tmp_path / "checkpoint") as folder:  # hashed in a thread
            save_transformer(transformer, weights, dtype, folder, {})
            assert weights.was_made_once()
            check_saved_transformer(transformer, weights, dtype, folder)
            assert weights.was_made_once()
            save_weights(transformer, weights, folder / "masters.safetensors")
            assert weights.was_made_once()
    finally:
        gc.enable()


@pytest.mark.parametrize("is_hashed", [False, True])
def test_loading_holds_one_tensor_at_a_time(is_hashed, transformer, tmp_path, monkeypatch):
    alive, read_tensor = [], tensor_file.read_tensor

    def seen(*arguments):
        assert all(earlier() is None for earlier in alive)
        tensor = read_tensor(*arguments)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(tensor_file, "read_tensor", seen)
    weights = dict(transformer.named_parameters())
    with written_folder(tmp_path / "checkpoint") as folder:
        save_weights(transformer, weights, folder / "masters.safetensors")
        save_transformer(transformer, weights, torch.bfloat16, folder, {})
    path, loaded = tmp_path / "checkpoint/masters.safetensors", []
    gc.disable()
    try:
        with verified_folder(path.parent, is_tensors) if is_hashed else contextlib.nullcontext():
            load_weights(transformer, lambda name, tensor: loaded.append(name), path)
        check_saved_transformer(transformer, weights, torch.bfloat16, path.parent)
    finally:
        gc.enable()
    assert sorted(loaded) == sorted(weights) and len(alive) == 2 * len(weights)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_may_be_read_by_whom_the_umask_lets(mask, mode, transformer, tmp_path):
    weights = dict(transformer.named_parameters())
    before = os.umask(mask)
    try:
        save_transformer(transformer, weights, torch.bfloat16, tmp_path, {"image_latent_scale": "raw"})
        save_weights(transformer, weights, tmp_path / "masters.safetensors")
        write_json(tmp_path / "state.json", {})
        write_shared(tmp_path / "cache.json", "{}")
    finally:
        os.umask(before)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(found) == 6 and {path.stat().st_mode & 0o777 for path in found} == {mode}


# ---------------------------------------------------------------- killed while it writes


def write_a_transformer(folder, transformer, version):
    weights = {name: torch.full_like(param, version) for name, param in transformer.named_parameters()}
    save_transformer(transformer, weights, torch.bfloat16, folder, {"version": version})


def writers(name, tiny, tmp_path):
    """What writes version 1 or 2 of something into a folder."""
    if name == "merged model":
        for version in (1, 2):
            transformer = trained_transformer(tiny("2b"), 4, 4 * version)
            save_lora(transformer, tmp_path / "loras" / str(version), TEXT_TO_VIDEO_PIPELINE)
        source = tiny("2b") / "transformer"
        return lambda folder, version: merge_lora(
            tmp_path / "loras" / str(version) / "pytorch_lora_weights.safetensors", source, folder / "transformer"
        )
    if name == "LoRA":
        adapted = {version: trained_transformer(tiny("2b"), 4, 4 * version) for version in (1, 2)}
        return lambda folder, version: save_lora(adapted[version], folder, TEXT_TO_VIDEO_PIPELINE)
    if name == "transformer":
        model = load_transformer(tiny("2b"), torch.float32)
        return lambda folder, version: write_a_transformer(folder, model, version)
    return {
        "prepared clip": lambda folder, version: write_prepared(
            folder / "a.safetensors", {"moments": torch.full((4,), float(version))}, "key"
        ),
        "JSON": lambda folder, version: write_json(folder / "args.json", {"version": version}),
        "cache": lambda folder, version: write_shared(folder / "hashes.json", str(version)),
    }[name]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NAMES = ["LoRA", "transformer", "merged model", "prepared clip", "JSON", "cache"]


@pytest.mark.parametrize("name", NAMES)
def test_a_writer_killed_anywhere_leaves_the_old_or_the_new_and_no_remains(name, tiny, tmp_path):
    write = writers(name, tiny, tmp_path)
    versions = []
    for version in (1, 2):
        folder = tmp_path / f"whole{version}"
        folder.mkdir()
        write(folder, version)
        versions.append(contents(folder))
    assert versions[0] != versions[1] and versions[0].keys() == versions[1].keys()

    folder, reached = tmp_path / "copy", set()

    def start_again():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole1", folder)

    start_again()
    operations = count_operations(lambda: write(folder, 2), tmp_path)
    assert "replace" in operations or "rename" in operations
    step = max(1, len(operations) // 40)  # a transformer has an operation for each weight
    for last in sorted(
        {*range(1, len(operations) + 1, step), *range(max(1, len(operations) - 12), len(operations) + 1)}
    ):
        start_again()
        assert in_child(lambda last=last: (kill_at(last), write(folder, 2))) == KILLED
        clean_up(folder)
        assert contents(folder) in versions, f"killed at operation {last}, {operations[last - 1]}"
        assert not list(folder.rglob(".*"))
        reached.add(versions.index(contents(folder)))
    assert reached == {0, 1} or (reached == {0} and operations[-1] in ("rename", "replace"))  # then all is done


def test_a_picture_that_is_not_drawn_to_its_end_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "loss.png").write_bytes(b"the old one")

    def killed(figure, path):
        path.write_bytes(b"half a pict")
        os._exit(KILLED)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", killed)
    drawn = [{"run": tmp_path / "metrics.jsonl"}, tmp_path / "loss.png"]
    assert in_child(lambda: curves.draw_losses(*drawn)) == KILLED
    assert (tmp_path / "loss.png").read_bytes() == b"the old one"
    clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_killed_run_leaves_nothing_among_its_samples(tmp_path):
    left = tmp_path / "out/samples/step_2/.tmp-1-0_0.txt"
    left.parent.mkdir(parents=True)
    left.write_text("a b")
    (left.parent / "0_0.mp4").write_bytes(b"")
    open_output_dir(flags(tmp_path / "out"), MAIN)
    assert [path.name for path in left.parent.iterdir()] == ["0_0.mp4"]


# ---------------------------------------------------------------- folders without a lock


def test_in_a_shared_folder_what_was_abandoned_goes_and_what_others_write_stays(tmp_path):
    for name, age in (("of a process that writes", 0), ("of one that was killed", 2 * files.ABANDONED)):
        path = tmp_path / f"{files.TEMPORARY}{name}"
        path.write_text("{")
        os.utime(path, (time.time() - age, time.time() - age))
    write_shared(tmp_path / "a.json", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-of a process that writes", "a.json"]
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_shared_folder_that_takes_no_renaming_is_the_systems_error(tmp_path, monkeypatch):
    """Those who ask to remember something go on without; a StorageError would end the run."""

    def refuse(path, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Operation not permitted"):
        write_shared(tmp_path / "a.json", "1")
    assert list(tmp_path.iterdir()) == []
