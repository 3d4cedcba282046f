import os
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from base.errors import NumbersError
from base.files import written_beside
from data.artifacts import WriterPool, recorded_key, write_image, write_tensors, write_video
from data.decode import read_frames
from synthetic_clips import probe


KEY = '{"caption": "a \\"red\\" circle, caf\u00e9"}'


@pytest.fixture
def frames():
    """Smooth moving pictures [9, 32, 48, 3] that an encoder keeps within a few levels."""
    ramp = np.linspace(0, 200, 48)[None, None, :, None] + np.arange(9)[:, None, None, None] * 5
    return np.broadcast_to(ramp, (9, 32, 48, 3)).astype(np.uint8)


# ---------------------------------------------------------------- keys


def test_a_file_remembers_its_key(tmp_path, frames):
    write_tensors(tmp_path / "a.safetensors", {"moments": torch.ones(2, 3)}, KEY)
    write_image(tmp_path / "a.png", frames[0], KEY)
    assert recorded_key(tmp_path / "a.safetensors") == recorded_key(tmp_path / "a.png") == KEY
    assert recorded_key(tmp_path / "b.safetensors") is None


def test_a_damaged_file_has_no_key_and_is_named(tmp_path, frames, caplog):
    """Wherever it is cut: a rerun then makes it again."""
    write_tensors(tmp_path / "a.safetensors", {"moments": torch.ones(2, 3)}, KEY)
    write_image(tmp_path / "a.png", frames[0], KEY)
    for path in (tmp_path / "a.safetensors", tmp_path / "a.png"):
        content = path.read_bytes()
        for length in range(0, len(content) - 24, 3):  # the last bytes of a PNG are checksums, not picture
            path.write_bytes(content[:length])
            caplog.clear()
            assert recorded_key(path) is None, length
            assert str(path) in caplog.text


def test_a_file_without_a_key_is_no_result(tmp_path, frames):
    (tmp_path / "text.safetensors").write_bytes(b"moments")
    Image.fromarray(frames[0]).save(tmp_path / "other.png")
    assert recorded_key(tmp_path / "text.safetensors") is None
    assert recorded_key(tmp_path / "other.png") is None


# ---------------------------------------------------------------- writing


def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), written_beside(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise OSError("full")
    assert os.listdir(tmp_path) == ["data.jsonl"] and path.read_text() == "old"
    with written_beside(path) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["data.jsonl"] and path.read_text() == "new"


def test_folders_are_made(tmp_path):
    write_tensors(tmp_path / "a/b/c.safetensors", {"moments": torch.ones(1)}, KEY)
    assert (tmp_path / "a/b/c.safetensors").is_file()


def test_tensors_are_written_whole_whatever_their_strides(tmp_path):
    base = torch.arange(24.0).view(2, 3, 4)
    for name, tensor in {"view": base[1], "turned": base.transpose(0, 2), "half": base.bfloat16()}.items():
        write_tensors(tmp_path / name, {"moments": tensor}, KEY)
        stored = load_file(tmp_path / name)["moments"]
        assert torch.equal(stored, tensor) and stored.dtype == tensor.dtype
        assert (tmp_path / name).stat().st_size < 400  # a view does not bring its base along


def test_others_may_read_the_files(tmp_path, frames):
    mask = os.umask(0o022)
    try:
        write_tensors(tmp_path / "a.safetensors", {"moments": torch.ones(1)}, KEY)
        write_image(tmp_path / "a.png", frames[0], KEY)
        write_video(tmp_path / "a.mp4", frames, 8)
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("dtype", "advice"), [(torch.float16, "--dtype fp32"), (torch.float32, "damaged")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, dtype, advice):
    with pytest.raises(NumbersError) as caught:
        write_tensors(tmp_path / "a.safetensors", {"moments": torch.tensor([1.0, value], dtype=dtype)}, KEY)
    assert "a.safetensors: moments is not finite" in str(caught.value) and advice in str(caught.value)
    assert not os.listdir(tmp_path)


def test_a_video_has_the_frames_given_and_always_the_same_bytes(tmp_path, frames):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, 8)
    assert probe(tmp_path / "a.mp4") == (9, 8.0, 32, 48)
    stored = read_frames(tmp_path / "a.mp4", [i / 8 for i in range(9)])
    assert np.abs(stored.astype(int) - frames).mean() < 2
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


# ---------------------------------------------------------------- the writing threads


def test_everything_submitted_is_written():
    written = []
    with WriterPool(3) as writer:
        for number in range(50):
            writer.submit(written.append, number)
    assert sorted(written) == list(range(50))


def test_what_waits_is_bounded():
    """Submitting faster than the disk writes blocks, or a data set would pile up in memory."""
    release, submitted = threading.Event(), []

    def produce():
        with WriterPool(2) as writer:
            for number in range(20):
                writer.submit(release.wait)
                submitted.append(number)

    thread = threading.Thread(target=produce)
    thread.start()
    time.sleep(0.3)
    waiting = len(submitted)
    release.set()
    thread.join(10)
    assert 2 <= waiting <= 6 and len(submitted) == 20


def full(seconds=0.0):
    time.sleep(seconds)
    raise OSError("full")


def test_an_error_surfaces_at_the_next_file():
    submitted = 0
    with pytest.raises(OSError, match="full"), WriterPool(4) as writer:
        for submitted in range(50):  # noqa: B007
            writer.submit(full)
            time.sleep(0.02)  # encoding takes longer than writing
    assert submitted <= 2


def test_the_last_files_error_is_not_lost():
    with pytest.raises(OSError, match="full"), WriterPool(4) as writer:
        writer.submit(full, 0.1)


def test_the_loops_own_error_comes_first():
    with pytest.raises(KeyboardInterrupt), WriterPool(1) as writer:
        writer.submit(full, 0.1)
        raise KeyboardInterrupt
