"""A file that is not what its name says is called what it is, wherever it is met."""

import gzip
import io
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from base.errors import DataError, UserError
from base.file_kinds import unexpected_content
from cogvideox.folder import resolve_model_dir
from data.clip_lists import read_clips
from data.latents import read_tensor
from engine.lora_file import read_lora
from synthetic_clips import probe


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("clip.mp4", b"0" * 600)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
CONTENTS = {
    "Git LFS pointer": LFS,
    "git-annex pointer": b"/annex/objects/SHA256E-s48--0123.mp4\n",
    "zip archive": zipped(),
    "a text": b"the video will follow\n" * 30,
    "gzip archive": gzip.compress(b"0" * 600),
    "web page": b"\n<!DOCTYPE HTML>\n<html><title>404</title></html>",
    "message of a server": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "error message of a server": b'{"error": "Repository not found"}',
    "zeros only": bytes(5000),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_a_video_that_is_something_else(tmp_path, what):
    (tmp_path / "a.mp4").write_bytes(CONTENTS[what])
    with pytest.raises(DataError) as caught:
        probe(tmp_path / "a.mp4")
    assert str(caught.value).startswith(f"{tmp_path / 'a.mp4'}: ") and what in str(caught.value)
    assert "truncated" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_damaged_is_not_called_something_else(tmp_path):
    (tmp_path / "a.mp4").write_bytes(bytes(range(256)) * 10)
    assert unexpected_content(tmp_path / "a.mp4") is None
    with pytest.raises(DataError, match="truncated download"):
        probe(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["prompts.txt", "videos.txt"])
def test_a_list_that_is_a_pointer(tmp_path, sample_data, name):
    shutil.copytree(sample_data, tmp_path / "data")
    (tmp_path / "data" / name).write_bytes(LFS)
    with pytest.raises(DataError, match=f"{name}: a Git LFS pointer, not the file itself; run git lfs pull"):
        read_clips(tmp_path / "data", None, "prompts.txt", "videos.txt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_prepared_tensor_that_is_a_pointer(tmp_path, name):
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(DataError, match=f"{name}: a Git LFS pointer"):
        read_tensor(tmp_path / name, "moments")
    save_file({"moments": torch.zeros(2)}, tmp_path / "b.safetensors")
    assert len(read_tensor(tmp_path / "b.safetensors", "moments")) == 2


@pytest.mark.parametrize(
    "name", ["vae/diffusion_pytorch_model.safetensors", "tokenizer/spiece.model", "vae/config.json"]
)
def test_a_model_that_is_a_pointer(tmp_path, tiny, name):
    model = tmp_path / "model"
    shutil.copytree(tiny("2b"), model)
    (model / name).write_bytes(LFS)
    with pytest.raises(UserError, match="a Git LFS pointer"):
        resolve_model_dir(str(model), ["vae", "tokenizer"])


def test_a_lora_that_is_a_pointer(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(LFS)
    with pytest.raises(UserError, match="lora.safetensors: a Git LFS pointer"):
        read_lora(tmp_path / "lora.safetensors")


def test_a_table_that_is_a_workbook(tmp_path, sample_data):
    (tmp_path / "m.csv").write_bytes(zipped())
    with pytest.raises(DataError, match="m.csv: a zip archive, as a spreadsheet program's own files are"):
        read_clips(sample_data, tmp_path / "m.csv", "caption", "video")
