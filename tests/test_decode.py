import io
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
from fractions import Fraction

import av
import numpy as np
import pytest
from make_clips import encode_video

from base.errors import ERROR_LOG_VARIABLE, DataError, UsageError
from data import decode, headers
from data.buckets import frame_times, make_buckets, num_sampled_frames
from data.clip_lists import Clip
from data.decode import read_frames
from data.videos import VideoDataset
from synthetic_clips import X264, encode, ffmpeg, ffmpeg_path, numbered_frames, numbers, probe


def numbered_clip(path, num_frames, fps=8):
    encode_video(path, numbered_frames(num_frames), fps)
    return path


def write_variable(path, pts, frames, rotation=None, codec="libx264", pix_fmt="yuv420p"):
    """Frames shown at the given milliseconds, with rotation metadata in degrees against the clock."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for milliseconds, image in zip(pts, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source, target, **options):
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def damage(tmp_path, clip):
    """The clip's bytes with a hole in the middle of its frames."""
    data = bytearray(remux(clip, tmp_path / "fast.mp4", movflags="faststart").read_bytes())
    start = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[start : start + 4000] = bytes(4000)
    return bytes(data)


def error_of(function, *arguments):
    with pytest.raises(DataError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return numbered_clip(tmp_path_factory.mktemp("decode") / "clip.mp4", 200, fps=16)


@pytest.fixture(params=["pyav", "decord"])
def backend(request):
    if request.param == "decord":
        pytest.importorskip("decord")
    return request.param


# ---------------------------------------------------------------- which frames


def test_frames_are_chosen_by_time(clip, backend):
    assert numbers(read_frames(clip, frame_times(5, 8), backend)) == [0, 2, 4, 6, 8]
    assert numbers(read_frames(clip, frame_times(4, 16, 2 / 16), backend)) == [2, 3, 4, 5]
    assert numbers(read_frames(clip, [0.0, 0.06, 0.07, 12.4375, 12.46], backend)) == [0, 1, 1, 199, 199]


def test_slow_clips_repeat_frames_and_ties_take_the_earlier(clip, backend):
    assert numbers(read_frames(clip, frame_times(5, 32), backend)) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(("source_fps", "target_fps"), [(24, 16), (30, 20), (30, 12), (60, 40), (12, 8), (16, 32)])
def test_all_ties_take_the_earlier_frame(tmp_path, backend, source_fps, target_fps, suffix):
    path = numbered_clip(tmp_path / f"ties{suffix}", 120, source_fps)
    places = [Fraction(k * source_fps, target_fps) for k in range(60) if k * source_fps <= 119 * target_fps]
    expected = [math.ceil(place - Fraction(1, 2)) for place in places]
    assert numbers(read_frames(path, frame_times(len(places), target_fps), backend)) == expected


@pytest.mark.parametrize("margin", [-5.0, -1.0, 0.0])
def test_a_seek_that_lands_too_late_is_not_used(tmp_path, monkeypatch, margin):
    path = numbered_clip(tmp_path / "long.mp4", 255, fps=8)
    with av.open(str(path)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > 1, "needs a key frame to land on"
    monkeypatch.setattr(decode, "SEEK_MARGIN", margin)
    for start in (3.0, 20.0, 30.0, 31.0):
        assert numbers(read_frames(path, frame_times(5, 8, start)))[0] == start * 8


@pytest.mark.parametrize("start", [1.9, 2.1, 5.0, 9.99, 11.0])
def test_late_starts_are_exact(clip, backend, start):
    times = frame_times(9, 8, start)
    early_frames = read_frames(clip, [0.0, *times], backend)[1:]  # a start at 0 does not seek
    assert (read_frames(clip, times, backend) == early_frames).all()
    assert abs(numbers(early_frames)[0] - start * 16) <= 0.5


def test_mkv_without_a_frame_count(clip, tmp_path, backend):
    mkv = remux(clip, tmp_path / "clip.mkv")
    assert probe(mkv) == probe(clip) == (200, 16.0, 32, 128)
    times = frame_times(49, 8, 4.0)
    assert (read_frames(mkv, times, backend) == read_frames(clip, times, backend)).all()


def test_variable_rates_go_by_timestamps(tmp_path, backend):
    pts = np.cumsum([0, *random.Random(0).choices([40, 80, 120, 320], k=59)])
    path = write_variable(tmp_path / "variable.mp4", pts.tolist(), numbered_frames(60))
    times = np.arange(0, pts[-1] / 1000, 0.1101)
    expected = [int(np.abs(pts / 1000 - time).argmin()) for time in times]
    assert numbers(read_frames(path, times.tolist(), backend)) == expected


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_every_time_that_the_header_promises_can_be_read(tmp_path, backend, suffix):
    for seed in range(5):
        rng = random.Random(seed)
        pts = np.cumsum([0, *rng.choices([40, 80, 400, 2000], k=rng.randint(20, 60))]).tolist()
        path = write_variable(tmp_path / f"{seed}{suffix}", pts, numbered_frames(len(pts)))
        info = probe(path)
        assert info.num_frames == len(pts)
        times = frame_times(num_sampled_frames(info.num_frames, info.fps, 8), 8)
        assert len(read_frames(path, times, backend)) == len(times)
        assert times[-1] > 0.5 * pts[-1] / 1000


@pytest.mark.parametrize("name", ["a.webm", "a.gif", "ten_bit.mp4", "gray.mkv"])
def test_other_formats(tmp_path, name):
    codec, pix_fmt = {
        "a.webm": ("libvpx-vp9", "yuv420p"),
        "a.gif": ("gif", "rgb8"),
        "ten_bit.mp4": ("libx265", "yuv420p10le"),
        "gray.mkv": ("ffv1", "gray"),
    }[name]
    if codec not in av.codecs_available:
        pytest.skip(f"{codec} is not built in")
    path = write_variable(tmp_path / name, range(0, 800, 40), numbered_frames(20), codec=codec, pix_fmt=pix_fmt)
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (20, 32, 128)
    assert numbers(read_frames(path, frame_times(10, 12.5))) == list(range(0, 20, 2))


# ---------------------------------------------------------------- what is not believed

PLAIN_X264 = (*X264, "-pix_fmt", "yuv420p")


def every_number(path, backend="auto"):
    """What all frames of a file show, read at the times that its header gives them."""
    info = probe(path)
    return numbers(read_frames(path, frame_times(info.num_frames, info.fps), backend))


@pytest.mark.parametrize(("group", "num_frames", "start"), [(110, 200, 2.2), (250, 100, 2.2), (30, 200, 5.0)])
def test_a_seek_that_lands_late_or_nowhere_is_made_up_for(tmp_path, group, num_frames, start):
    """MPEG-TS has no index: a seek lands between key frames, or finds none at all."""
    path = encode(tmp_path / "a.ts", numbered_frames(num_frames), "25", *PLAIN_X264, "-bf", "3", "-g", group)
    times = frame_times(9, 8, start)
    assert numbers(read_frames(path, times)) == [math.ceil(time * 25 - 0.5) for time in times]  # ties: the earlier


def test_a_seek_whose_packets_do_not_decode_is_made_up_for(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered_frames(200), "25", *PLAIN_X264, "-g", "25")
    decoded, calls = decode.decoded, []

    def failing_after_a_seek(container, stream):
        calls.append(container)
        if calls.count(container) > 1:  # the second time in one file is after a seek
            raise av.InvalidDataError(1, "made up")
        return decoded(container, stream)

    monkeypatch.setattr(decode, "decoded", failing_after_a_seek)
    assert numbers(read_frames(path, [4.0, 5.0])) == [100, 125]
    assert len(calls) == 3


@pytest.mark.parametrize("flags", ["+dash", "+frag_keyframe+empty_moov", "+frag_every_frame+empty_moov+delay_moov"])
def test_all_frames_of_an_mp4_in_fragments_are_counted(tmp_path, flags):
    path = encode(tmp_path / "a.mp4", numbered_frames(200), "25", *PLAIN_X264, "-g", "50", "-movflags", flags)
    assert probe(path)[:2] == (200, 25)
    assert every_number(path) == list(range(200))


@pytest.mark.parametrize("suffix", [".ts", ".h264", ".mpg"])
def test_what_lies_before_the_first_key_frame_does_not_count(tmp_path, suffix):
    codec = ("-c:v", "mpeg2video", "-q:v", "2") if suffix == ".mpg" else PLAIN_X264
    path = encode(tmp_path / f"whole{suffix}", numbered_frames(200), "25", *codec, "-g", "40")
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(path.read_bytes()[path.stat().st_size // 3 :])
    first = every_number(cut)[0]
    assert first > 20
    assert every_number(cut) == list(range(first, 200))


def test_every_start_that_training_may_draw_can_be_read(tmp_path):
    path = encode(tmp_path / "whole.ts", numbered_frames(200), "25", *PLAIN_X264, "-g", "40")
    cut = tmp_path / "cut.ts"
    cut.write_bytes(path.read_bytes()[path.stat().st_size // 3 :])
    videos = VideoDataset([Clip(cut, "", 1, "cut.ts")], make_buckets([9], [32], [128]), fps=8)
    starts = {videos.start_time(epoch, 0) for epoch in range(200)}
    assert len(starts) > 20
    for start in sorted(starts):
        assert len(read_frames(cut, frame_times(9, 8, start))) == 9


def test_frames_that_an_edit_list_hides_are_neither_counted_nor_read(tmp_path, backend):
    path = encode(tmp_path / "a.mp4", numbered_frames(200), "25", *PLAIN_X264, "-bf", "2", "-g", "50")
    ffmpeg("-ss", "1.4", "-i", path, "-c", "copy", tmp_path / "trimmed.mp4")
    assert every_number(tmp_path / "trimmed.mp4", backend) == list(range(35, 200))


def with_edits(data, edits):
    """An mp4 whose moov box comes last, with another edit list: (seconds, from which second of the media on)."""

    def grown(start, end, path, content):
        out = b""
        while start + 8 <= end:
            size, name = struct.unpack(">I4s", data[start : start + 8])
            body = data[start : start + size]
            if name == path[0]:
                inner = content if len(path) == 1 else grown(start + 8, start + size, path[1:], content)
                body = struct.pack(">I4s", 8 + len(inner), name) + inner
            out += body
            start += size
        return out

    with av.open(io.BytesIO(data)) as container:
        rate = container.streams.video[0].time_base.denominator
    rows = b"".join(struct.pack(">IiI", round(length * 1000), round(start * rate), 1 << 16) for length, start in edits)
    content = struct.pack(">II", 0, len(edits)) + rows  # lengths in the movie's time scale, which ffmpeg makes 1000
    return grown(0, len(data), (b"moov", b"trak", b"edts", b"elst"), content)


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([(2, 0), (3, 5)], [*range(50), *range(125, 200)]),
        ([(2, 1), (2, 1)], [*range(25, 75), *range(25, 75)]),
        ([(8, 2)], range(50, 200)),
        ([(2, 5), (2, 0)], [*range(125, 175), *range(50)]),
    ],
    ids=["a piece cut out", "a piece twice", "a length from before the cut", "pieces exchanged"],
)
def test_edit_lists_are_played(tmp_path, edits, expected):
    path = encode(tmp_path / "a.mp4", numbered_frames(200), "25", *PLAIN_X264, "-g", "25")
    (tmp_path / "edited.mp4").write_bytes(with_edits(path.read_bytes(), edits))
    seen = every_number(tmp_path / "edited.mp4")
    assert (
        abs(len(seen) - len(expected)) <= 2
        and seen[: len(expected) - 2] == list(expected)[: len(seen)][: len(expected) - 2]
    )


@pytest.mark.parametrize("name", ["h264.avi", "h264.asf", "xvid.avi", "mpeg4.avi"])
def test_formats_that_store_when_a_frame_is_decoded(tmp_path, name):
    codec = {"h264": (*PLAIN_X264, "-bf", "3"), "xvid": ("-c:v", "libxvid", "-q:v", "3", "-bf", "2")}
    flags = codec.get(name.split(".")[0], ("-c:v", "mpeg4", "-q:v", "3", "-bf", "2"))
    path = encode(tmp_path / name, numbered_frames(150), "25", *flags, "-g", "50")
    seen = every_number(path)
    assert len(seen) >= 148 and seen[:147] == list(range(147))
    times = frame_times(9, 8, 3.0)
    assert numbers(read_frames(path, times)) == [math.ceil(time * 25 - 0.5) for time in times]


def test_an_avi_written_into_a_pipe_has_no_length_and_is_whole(tmp_path):
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "128x32", "-r", "25", "-i", "-")
    command = [ffmpeg_path(), "-v", "error", *raw, "-c:v", "mjpeg", "-q:v", "3", "-f", "avi", "-"]
    piped = subprocess.run(command, input=numbered_frames(50).tobytes(), capture_output=True, check=True).stdout
    (tmp_path / "piped.avi").write_bytes(piped)
    assert every_number(tmp_path / "piped.avi") == list(range(50))
    whole = encode(tmp_path / "a.avi", numbered_frames(50), "25", "-c:v", "mjpeg").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    assert "cut off" in error_of(probe, tmp_path / "cut.avi")


def test_recordings_that_overlap_are_refused_before_training(tmp_path):
    path = encode(tmp_path / "a.ts", numbered_frames(50), "25", *PLAIN_X264)
    ffmpeg("-i", path, "-c", "copy", "-output_ts_offset", "1.6", tmp_path / "b.ts")
    (tmp_path / "joined.ts").write_bytes(path.read_bytes() + (tmp_path / "b.ts").read_bytes())
    assert "its times go back" in error_of(probe, tmp_path / "joined.ts")


def test_decord_is_not_asked_for_a_file_with_a_gap(tmp_path):
    pytest.importorskip("decord")
    path = encode(tmp_path / "a.mkv", numbered_frames(200), "25", *PLAIN_X264, "-g", "10")
    data = path.read_bytes()
    (tmp_path / "gap.mkv").write_bytes(data[: len(data) // 2] + data[len(data) * 11 // 20 :])
    times = frame_times(20, 8, 3.0)
    try:
        expected = read_frames(tmp_path / "gap.mkv", times, "pyav")
    except DataError:
        error_of(read_frames, tmp_path / "gap.mkv", times, "decord")
    else:
        assert (read_frames(tmp_path / "gap.mkv", times, "decord") == expected).all()


def test_packets_without_data_are_frames_that_stay(tmp_path):
    dropped = ("-vf", "select='not(between(n,10,14))'", "-fps_mode", "passthrough")
    path = encode(tmp_path / "a.avi", numbered_frames(40), "25", "-c:v", "mpeg4", "-q:v", "2", *dropped)
    assert probe(path).num_frames == 35
    assert numbers(read_frames(path, frame_times(20, 25))) == [*range(10), 9, 9, 9, 15, 15, *range(15, 20)]


@pytest.mark.parametrize("suffix", [".ts", ".nut", ".flv", ".avi", ".mkv"])
def test_a_file_that_ends_within_a_frame_is_read_up_to_there_or_refused(tmp_path, suffix):
    path = encode(tmp_path / f"whole{suffix}", numbered_frames(100), "25", *PLAIN_X264, "-g", "40")
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    try:
        info = probe(cut)
    except DataError as error:
        assert str(cut) in str(error) and "cut off" in str(error)
        return
    assert every_number(cut) == list(range(info.num_frames))


def test_joined_bytes_are_refused(tmp_path):
    path = encode(tmp_path / "a.ts", numbered_frames(50), "25", *PLAIN_X264)
    (tmp_path / "joined.ts").write_bytes(2 * path.read_bytes())
    assert "its times go back" in error_of(probe, tmp_path / "joined.ts")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("444.mp4", (*X264, "-pix_fmt", "yuv444p")),
        ("open.mkv", (*PLAIN_X264, "-bf", "2", "-x264-params", "open-gop=1")),
        ("refresh.mp4", (*PLAIN_X264, "-x264-params", "intra-refresh=1")),
        (
            "ten_bit.webm",
            ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-pix_fmt", "yuv420p10le", "-profile:v", "2"),
        ),
        ("b.ts", (*PLAIN_X264, "-bf", "2")),
        ("b.avi", ("-c:v", "mpeg4", "-q:v", "3", "-bf", "2")),
        ("hevc.mp4", ("-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p")),
        ("av1.mp4", ("-c:v", "libsvtav1", "-preset", "12", "-pix_fmt", "yuv420p")),
    ],
)
def test_decord_gives_the_frames_of_pyav_or_leaves_them_to_it(tmp_path, caplog, name, flags):
    pytest.importorskip("decord")
    caplog.set_level("INFO")
    path = encode(tmp_path / name, numbered_frames(120), "25", *flags, "-g", "50")
    for start in (0.0, 1.3, 3.0):
        times = frame_times(9, 8, start)
        assert (read_frames(path, times, "decord") == read_frames(path, times, "pyav")).all()
    assert len([record for record in caplog.records if "read with PyAV" in record.message]) <= 1


# ---------------------------------------------------------------- what nobody foresaw


def test_what_a_decoder_raises_is_one_line_and_a_traceback_in_the_log(tmp_path, clip, monkeypatch):
    def broken(*arguments):
        raise ValueError("31 is not a valid Type\nand more")

    monkeypatch.setenv(ERROR_LOG_VARIABLE, str(tmp_path / "errors.log"))
    monkeypatch.setattr(decode, "describe", broken)
    monkeypatch.setattr(headers, "describe", broken)
    for function, arguments in ((probe, [clip]), (read_frames, [clip, [0.0]])):
        message = error_of(function, *arguments)
        assert message.startswith(f"{clip}: ") and "ValueError: 31 is not a valid Type;" in message
        assert str(tmp_path / "errors.log") in message
    log = (tmp_path / "errors.log").read_text()
    assert log.count("Traceback") == 2 and "in broken" in log


def test_the_log_has_a_place_where_the_output_folder_is_not_there(tmp_path, clip, monkeypatch):
    monkeypatch.setenv(ERROR_LOG_VARIABLE, str(tmp_path / "nowhere" / "errors.log"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(headers, "describe", lambda *arguments: 1 / 0)
    assert str(tmp_path / "cogvideox-errors.log") in error_of(probe, clip)
    assert "ZeroDivisionError" in (tmp_path / "cogvideox-errors.log").read_text()


# ---------------------------------------------------------------- damage


def test_files_that_are_no_video(tmp_path, clip):
    def error(name, data):
        (tmp_path / name).write_bytes(data)
        message = error_of(probe, tmp_path / name)
        assert message == error_of(read_frames, tmp_path / name, [0.0])
        assert message.startswith(str(tmp_path / name))
        return message

    data = clip.read_bytes()
    assert "empty file" in error("empty.mp4", b"")
    assert "a text, not a video" in error("text.mp4", b"hello\n" * 100)
    assert "truncated download?" in error("cut.mp4", data[: len(data) // 2])
    assert "no such file" in error_of(probe, tmp_path / "nothing.mp4")


def test_a_playlist_cannot_reach_other_files(tmp_path, clip):
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/{clip.name}\n#EXT-X-ENDLIST\n")
    error_of(read_frames, tmp_path / "list.mp4", [0.0])


def test_sound_without_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 20480), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "no video stream" in error_of(probe, path)


def test_a_file_cut_after_its_index_is_noticed_from_the_header(tmp_path, clip):
    data = remux(clip, tmp_path / "fast.mp4", movflags="faststart").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    message = error_of(probe, tmp_path / "cut.mp4")
    assert "of 200 frames are in the file" in message


def test_a_cut_mkv_is_noticed(tmp_path, clip):
    data = remux(clip, tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 3 // 4])
    assert "of 12.5 s are in the file" in error_of(probe, tmp_path / "cut.mkv")


def test_damage_inside_says_how_many_frames_are_readable(tmp_path, clip):
    (tmp_path / "damaged.mp4").write_bytes(damage(tmp_path, clip))
    assert probe(tmp_path / "damaged.mp4").num_frames == 200
    assert numbers(read_frames(tmp_path / "damaged.mp4", [0.0, 0.125])) == [0, 2]
    message = error_of(read_frames, tmp_path / "damaged.mp4", frame_times(100, 8))
    readable = int(message.split(": ", 1)[1].split()[0])
    assert 20 <= readable <= 150 and "of 200 frames readable" in message


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_no_decoder_outlives_its_error(tmp_path, clip):
    """A process forked with one alive hangs when it collects it."""
    (tmp_path / "damaged.mp4").write_bytes(damage(tmp_path, clip))
    before = set(os.listdir("/proc/self/task"))
    with pytest.raises(DataError) as caught:
        read_frames(tmp_path / "damaged.mp4", frame_times(100, 8), num_threads=3)
    assert "frames readable" in str(caught.value)
    assert set(os.listdir("/proc/self/task")) <= before  # others may end meanwhile


def test_flipped_bits_that_the_decoder_hides_are_refused(tmp_path, real_clips):
    data = bytearray((real_clips / "videos/pool_cleaning.mp4").read_bytes())
    rng = random.Random(0)
    start = data.index(b"mdat") + 8
    for _ in range(30):
        data[rng.randrange(start, start + 600_000)] ^= 1 << rng.randrange(8)
    (tmp_path / "flipped.mp4").write_bytes(data)
    assert "frames readable (damaged data)" in error_of(read_frames, tmp_path / "flipped.mp4", frame_times(80, 8))


def test_times_past_the_end_are_refused(clip, backend):
    assert numbers(read_frames(clip, [12.49], backend)) == [199]
    assert "200" in error_of(read_frames, clip, [0.0, 12.6], backend)


def test_decord_that_is_not_installed(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UsageError, match="pip install decord"):
        read_frames(clip, [0.0], "decord")
    assert len(read_frames(clip, [0.0], "auto")) == 1


# ---------------------------------------------------------------- real clips


def test_both_backends_agree_on_the_real_clips(real_clips):
    pytest.importorskip("decord")
    for path in sorted((real_clips / "videos").iterdir()):
        for times in (frame_times(49, 8), frame_times(17, 16, 3.3)):
            assert (read_frames(path, times, "pyav") == read_frames(path, times, "decord")).all(), path


def test_sizes_of_the_real_clips(real_clips):
    infos = {path.name: tuple(probe(path)) for path in (real_clips / "videos").iterdir()}
    assert infos["horse.mp4"] == (49, 8, 480, 720)
    assert infos["arm_wrestling.mp4"] == (280, 28, 256, 427)  # 340 stored, with pixels of 427:340
    assert infos["flipping_a_pancake.mkv"] == (310, 30, 240, 426)
