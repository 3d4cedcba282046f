"""Whatever the codec, container, group of pictures, start and rate: the frames read are those of a plain decode."""

import random

import av
import numpy as np
import pytest

from base.errors import DataError
from data.buckets import frame_times, num_sampled_frames
from data.decode import TIE_SECONDS, read_frames
from synthetic_clips import draw_case, numbers, probe, write_case


def decode_plainly(path):
    """(seconds from the first frame, its pixels) of all frames from the first key frame on, without any seek."""
    with av.open(str(path)) as container:
        key = next((packet.pts for packet in container.demux(video=0) if packet.is_keyframe), None)
    seconds, pixels = [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        period = 1 / float(stream.average_rate or stream.guessed_rate or 1)
        try:
            for frame in container.decode(stream):
                if frame.pts is not None and key is not None and frame.pts < key:
                    continue
                seconds.append(len(seconds) * period if frame.pts is None else float(frame.pts * stream.time_base))
                pixels.append(frame.to_ndarray(format="rgb24"))
        except av.FFmpegError:
            pass  # the end of what can be decoded
    return np.array(seconds) - seconds[0], pixels


def check_clip(path, backend, rng):
    """True if a draw of training is read right, False if the clip is refused by name."""
    try:
        info = probe(path)
    except DataError as error:
        assert str(error).startswith(f"{path}: ")
        return False
    fps = rng.choice([8, 8, 16])
    most = num_sampled_frames(info.num_frames, info.fps, fps)
    num_frames = rng.randint(1, min(49, most))
    spare = int(info.num_frames - 1 - (num_frames - 1) * info.fps / fps + 1e-6)  # as VideoDataset draws a start
    times = frame_times(num_frames, fps, rng.randint(0, max(0, spare)) / info.fps)
    frames = read_frames(path, times, backend, num_threads=1)
    seconds, pixels = decode_plainly(path)
    for time, frame in zip(times, frames, strict=True):
        distance = abs(seconds - time)
        nearest = [pixels[number] for number in np.flatnonzero(distance <= distance.min() + 2.5 * TIE_SECONDS)]
        assert any(np.array_equal(frame, other) for other in nearest), (path.name, time, numbers(frame[None]))
    return True


def check_draws(tmp_path, seeds, backend):
    read = 0
    for seed in seeds:
        rng = random.Random(seed)
        path = write_case(tmp_path, draw_case(rng), rng)
        read += check_clip(path, backend, rng)
        path.unlink()
    assert read >= 0.9 * len(seeds)  # few of them are beyond reading


@pytest.fixture(params=["pyav", "decord"])
def backend(request):
    if request.param == "decord":
        pytest.importorskip("decord")
    return request.param


def test_40_draws(tmp_path, backend):
    check_draws(tmp_path, range(40), backend)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 600, 50))
def test_500_draws(tmp_path, backend, first):
    check_draws(tmp_path, range(first, first + 50), backend)
