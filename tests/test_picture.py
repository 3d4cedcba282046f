"""Frames are what a player shows: cropped, stretched, turned, in the right colours; or the clip is named."""

import struct
import subprocess

import av
import numpy as np
import pytest
from PIL import Image

from base.errors import DataError
from data.buckets import make_buckets
from data.clip_lists import Clip
from data.decode import read_frames
from data.headers import read_header
from data.picture import TO_SDR
from data.videos import VideoDatasetWithResizing
from synthetic_clips import X264, encode, ffmpeg, ffmpeg_path, probe
from test_decode import write_variable


PLAIN_X264 = (*X264, "-pix_fmt", "yuv420p", "-crf", "8")
H265 = ("-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p10le")


def flat(color, height=48, width=64, num_frames=4):
    return np.broadcast_to(np.array(color, np.uint8), (num_frames, height, width, 3)).copy()


def left_white(height=64, width=96):
    frames = flat((0, 0, 0), height, width)
    frames[:, :, : width // 2] = 255
    return frames


def circle(height, width):
    """A filled circle as a frame of these sizes stores it, drawn so that it is round on a square."""
    y, x = np.mgrid[:height, :width]
    inside = ((y + 0.5) / height - 0.5) ** 2 + ((x + 0.5) / width - 0.5) ** 2 < 0.3**2
    return np.repeat((255 * inside[None, :, :, None]).astype(np.uint8), 3, axis=3).repeat(2, axis=0)


def shown_by_ffmpeg(path, height, width):
    """The first frame as ffmpeg's own player path shows it: cropped and turned by the container, pixels made square."""
    square = "scale='if(gt(sar,1),iw*sar,iw)':'if(lt(sar,1),ih/sar,ih)'"
    command = [
        ffmpeg_path(),
        "-v",
        "error",
        "-i",
        path,
        "-vf",
        square,
        "-frames:v",
        "1",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    pixels = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def cautions_of(path):
    return [caution.what for caution in read_header(path).picture.cautions]


# ---------------------------------------------------------------- turned


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied_as_players_do(tmp_path, backend, degrees, suffix):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:16, :16, 0] = 255  # red marks the top left corner, green the top right
    image[:16, -16:, 1] = 255
    path = write_variable(tmp_path / f"turned{suffix}", range(0, 400, 40), np.stack([image] * 10), rotation=degrees)
    shown = np.rot90(image, degrees // 90)  # against the clock
    frame = read_frames(path, [0.0], backend)[0]
    assert probe(path)[2:] == frame.shape[:2] == shown.shape[:2]
    assert np.abs(frame.astype(int) - shown)[::8, ::8].mean() < 20


def test_mirrored_clips(tmp_path):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :32] = 255
    path = tmp_path / "mirrored.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.set_display_rotation(0, hflip=True)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    frame = read_frames(path, [0.0])[0]
    assert frame[24, 8, 0] < 50 and frame[24, 56, 0] > 200


@pytest.fixture
def turned_photo(tmp_path):
    """A photo stored 64 wide and 48 high, red at its stored left, whose EXIF says: turn by a quarter."""

    def make(name, orientation=6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = flat((0, 0, 200))[0]
        pixels[:, :32] = (200, 0, 0)
        options = {"quality": 98, "subsampling": 0} if name.endswith("jpg") else {}
        options |= {"lossless": True} if name.endswith("webp") else {}
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, **options)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_photos_are_turned_by_their_exif(turned_photo, name):
    path = turned_photo(name)
    image = read_frames(path, [0.0])[0]
    assert probe(path)[2:] == image.shape[:2] == (64, 48)
    assert image[8, 24, 0] > 150 > image[8, 24, 2] and image[56, 24, 2] > 150  # the left is up


@pytest.mark.parametrize(("orientation", "place"), [(2, (24, 56)), (4, (24, 8)), (5, (8, 24)), (8, (56, 24))])
def test_every_orientation_is_known(turned_photo, orientation, place):
    image = read_frames(turned_photo("a.jpg", orientation), [0.0])[0]
    assert image[*place, 0] > 150 > image[*place, 2]


def test_side_data_that_the_library_does_not_know_costs_nothing(turned_photo, tmp_path):
    ffmpeg("-loop", "1", "-framerate", "8", "-t", "1", "-i", turned_photo("a.jpg"), "-c", "copy", tmp_path / "a.avi")
    assert probe(tmp_path / "a.avi") == (8, 8, 64, 48)
    assert read_frames(tmp_path / "a.avi", [0.0, 0.5])[1, 8, 24, 0] > 150


# ---------------------------------------------------------------- stretched and cropped


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts", "avi", "flv"])
@pytest.mark.parametrize(
    ("aspect", "size"), [("2", (64, 128)), ("1/2", (128, 64)), ("32/27", (64, 76)), ("1", (64, 64))]
)
def test_a_circle_is_round_whatever_its_pixels_aspect(tmp_path, suffix, aspect, size):
    path = encode(tmp_path / f"a.{suffix}", circle(64, 64), "8", *PLAIN_X264, "-vf", f"setsar={aspect}")
    info, image = probe(path), read_frames(path, [0.0])[0]
    assert info[2:] == image.shape[:2] == size
    ratio = (image[size[0] // 2, :, 0] > 127).sum() / (image[:, size[1] // 2, 0] > 127).sum()
    assert abs(ratio - size[1] / size[0]) < 0.05


def test_pixels_are_stretched_before_the_picture_is_turned(tmp_path):
    encode(tmp_path / "a.mp4", circle(64, 64), "8", *PLAIN_X264, "-vf", "setsar=2")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4")
    assert probe(tmp_path / "turned.mp4")[2:] == read_frames(tmp_path / "turned.mp4", [0.0]).shape[1:3] == (128, 64)


def test_the_bucket_goes_by_the_shown_size(tmp_path):
    encode(tmp_path / "a.mp4", flat((9, 9, 9), 64, 64), "8", *PLAIN_X264, "-vf", "setsar=2")
    clip = Clip(tmp_path / "a.mp4", "", 1, "a.mp4")
    videos = VideoDatasetWithResizing([clip], make_buckets([1], [64], [64, 128]), fps=8)
    assert videos.clip_buckets == [(1, 64, 128)] and videos[0]["pixels"].shape == (1, 3, 64, 128)


def with_aperture(data, width, height, x=0, y=0):
    """An mp4 whose moov box comes last, with a `clap` box in its sample entry and all sizes set right."""
    box = struct.pack(">I4s8i", 40, b"clap", width, 1, height, 1, x, 1, y, 1)

    def grown(start, end, path):
        out = b""
        while start + 8 <= end:
            size, name = struct.unpack(">I4s", data[start : start + 8])
            body = data[start : start + size]
            if name == path[0]:
                head = 16 if name == b"stsd" else 8
                inner = grown(start + head, start + size, path[1:]) if len(path) > 1 else body[head:] + box
                body = struct.pack(">I", head + len(inner)) + body[4:head] + inner
            out += body
            start += size
        return out

    return grown(0, len(data), (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("aperture", [(64, 48, 0, 0), (60, 40, 6, -4), (96, 64, 0, 0)])
def test_a_clean_aperture_is_cut_as_players_do(tmp_path, suffix, aperture):
    path = encode(tmp_path / "a.mp4", left_white(), "8", *PLAIN_X264)
    cropped = tmp_path / "cropped.mp4"
    cropped.write_bytes(with_aperture(path.read_bytes(), *aperture))
    if suffix == ".mkv":
        ffmpeg("-i", cropped, "-c", "copy", tmp_path / "cropped.mkv")
        cropped = tmp_path / "cropped.mkv"
    image = read_frames(cropped, [0.0])[0]
    assert probe(cropped)[2:] == image.shape[:2] == (aperture[1], aperture[0])
    assert abs(image.astype(int) - shown_by_ffmpeg(cropped, aperture[1], aperture[0])).max() <= 3


@pytest.mark.parametrize("aperture", [(0, 0, 0, 0), (200, 48, 0, 0), (64, 48, 30, 0), (-8, 48, 0, 0)])
def test_an_aperture_that_makes_no_sense_is_left_alone(tmp_path, aperture):
    path = encode(tmp_path / "a.mp4", left_white(), "8", *PLAIN_X264)
    (tmp_path / "cropped.mp4").write_bytes(with_aperture(path.read_bytes(), *aperture))
    assert probe(tmp_path / "cropped.mp4")[2:] == (64, 96)


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("matrix", ["bt709", "bt601", "bt2020"])
@pytest.mark.parametrize("value_range", ["tv", "pc"])
def test_colours_go_by_what_the_stream_says(tmp_path, matrix, value_range):
    tag = {"bt601": "smpte170m", "bt2020": "bt2020nc"}.get(matrix, matrix)
    scale = f"scale=out_color_matrix={matrix}:out_range={value_range},format=yuv444p"
    flags = ("-vf", scale, "-colorspace", tag, "-color_range", value_range)
    path = encode(tmp_path / "a.mp4", flat((200, 60, 30)), "8", *X264, "-crf", "4", *flags)
    assert abs(read_frames(path, [0.0])[0, 20, 20].astype(int) - (200, 60, 30)).max() <= 4


@pytest.mark.parametrize(("height", "matrix"), [(480, "bt601"), (720, "bt709")])
def test_colours_that_are_not_described_go_by_the_height_as_in_players(tmp_path, backend, height, matrix):
    scale = f"scale=out_color_matrix={matrix}:out_range=tv,format=yuv444p,setparams=colorspace=unknown"
    path = encode(tmp_path / "a.mkv", flat((200, 60, 30), height, 64, 2), "8", "-c:v", "ffv1", "-vf", scale)
    assert abs(read_frames(path, [0.0], backend)[0, 20, 20].astype(int) - (200, 60, 30)).max() <= 4


@pytest.fixture(params=["pyav", "decord"])
def backend(request):
    if request.param == "decord":
        pytest.importorskip("decord")
    return request.param


HDR = "colorprim=bt2020:colormatrix=bt2020nc:log-level=none:transfer="
WAYS_NOT_APPLIED = [  # name, encoder's flags, what is said
    ("pq.mp4", (*H265, "-x265-params", f"{HDR}smpte2084"), "HDR (PQ)"),
    ("hlg.mkv", (*H265, "-x265-params", f"{HDR}arib-std-b67"), "HDR (HLG)"),
    ("wide.mp4", (*H265, "-x265-params", f"{HDR}bt2020-10"), "BT.2020"),
    ("p3.mov", (*PLAIN_X264, "-x264-params", "colorprim=smpte432:transfer=bt709"), "Display P3"),
    ("interlaced.mp4", (*PLAIN_X264, "-flags", "+ildct+ilme", "-x264-params", "tff=1"), "interlaced"),
    ("interlaced.mpg", ("-c:v", "mpeg2video", "-r", "25", "-flags", "+ildct+ilme"), "interlaced"),
    ("two.mkv", (*PLAIN_X264, "-x264-params", "frame-packing=3"), "two pictures in one (side by side)"),
    (
        "above.mkv",
        (*PLAIN_X264, "-metadata:s:v", "stereo_mode=top_bottom"),
        "two pictures in one (one above the other)",
    ),
    (
        "alpha.webm",
        ("-c:v", "libvpx-vp9", "-vf", "format=rgba,colorchannelmixer=aa=0.5,format=yuva420p"),
        "transparent",
    ),
    ("alpha.apng", ("-c:v", "apng", "-vf", "format=rgba,colorchannelmixer=aa=0.5"), "transparent"),
]


@pytest.mark.parametrize(("name", "flags", "what"), WAYS_NOT_APPLIED, ids=[way[0] for way in WAYS_NOT_APPLIED])
def test_what_is_not_applied_is_named_once_with_what_converts_it(tmp_path, caplog, name, flags, what):
    encode(tmp_path / name, flat((255, 255, 255), 64, 64), "8", *flags)
    encode(tmp_path / "plain.mp4", flat((255, 255, 255), 64, 64), "8", *PLAIN_X264)
    clips = [Clip(tmp_path / source, "", row, source) for row, source in enumerate((name, "plain.mp4", name), start=1)]
    VideoDatasetWithResizing(clips, make_buckets([1], [64], [64]), fps=8)
    (line,) = [record.getMessage() for record in caplog.records]
    assert what in line and line.startswith("2 of 3 clips are ") and f"{name}, {name}" in line
    assert "plain.mp4" not in line and "ffmpeg -i IN -vf " in line


@pytest.mark.parametrize("name", [way[0] for way in WAYS_NOT_APPLIED])
def test_the_filter_that_is_named_makes_a_clip_without_it(tmp_path, name):
    flags = next(flags for way, flags, _ in WAYS_NOT_APPLIED if way == name)
    path = encode(tmp_path / name, flat((255, 255, 255), 64, 64), "8", *flags)
    for caution in read_header(path).picture.cautions:
        ffmpeg("-i", path, "-vf", caution.filter, "-pix_fmt", "yuv420p", tmp_path / "converted.mp4")
        path = tmp_path / "converted.mp4"
    assert cautions_of(path) == [] and read_frames(path, [0.0]).shape[0] == 1


def test_hdr_white_is_white_once_converted(tmp_path):
    """203 cd/m2, the white of HDR, is 58 % of PQ's signal (ITU-R BT.2408)."""
    path = encode(tmp_path / "pq.mp4", flat((148, 148, 148), 64, 64), "8", *H265, "-x265-params", f"{HDR}smpte2084")
    assert read_frames(path, [0.0])[0, 32, 32, 0] < 160  # what the warning is for
    ffmpeg("-i", path, "-vf", TO_SDR, tmp_path / "sdr.mp4")
    assert read_frames(tmp_path / "sdr.mp4", [0.0])[0, 32, 32, 0] > 190


def test_opaque_pictures_with_an_alpha_channel_are_not_named(tmp_path):
    path = encode(tmp_path / "a.apng", flat((9, 9, 9)), "8", "-c:v", "apng", "-pix_fmt", "rgba")
    assert cautions_of(path) == []


@pytest.mark.parametrize(
    ("name", "flags", "what"),
    [
        ("two.mp4", (*PLAIN_X264, "-x264-params", "frame-packing=3"), "two pictures in one"),
        (
            "alpha.mov",
            ("-c:v", "prores_ks", "-vf", "format=rgba,colorchannelmixer=aa=0.5,format=yuva444p10le"),
            "transparent",
        ),
        ("rle.mov", ("-c:v", "qtrle", "-vf", "format=argb,colorchannelmixer=aa=0.5"), "transparent"),
        ("comb.mp4", ("-c:v", "mpeg4", "-q:v", "3", "-flags", "+ildct+ilme"), "interlaced"),
    ],
)
def test_what_only_a_frame_tells_is_named_once_it_is_read(tmp_path, caplog, name, flags, what):
    path = encode(tmp_path / name, flat((255, 255, 255), 64, 64), "8", *flags)
    for _ in range(2):
        read_frames(path, [0.0, 0.25])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path} is {what}") and "ffmpeg -i IN -vf " in line


def test_tags_of_the_container_count_where_the_stream_has_none(tmp_path):
    plain = encode(tmp_path / "a.mp4", flat((148, 148, 148), 64, 64), "8", *H265, "-x265-params", "log-level=none")
    tags = ("-color_trc", "smpte2084", "-colorspace", "bt2020nc", "-color_primaries", "bt2020")
    for suffix in ("mkv", "mp4"):
        ffmpeg("-i", plain, "-c", "copy", *tags, tmp_path / f"tagged.{suffix}")
        assert "HDR (PQ)" in cautions_of(tmp_path / f"tagged.{suffix}")[0]


def test_other_than_quarter_turns_are_named(tmp_path):
    encode(tmp_path / "a.mp4", left_white(), "8", *PLAIN_X264)
    ffmpeg("-display_rotation", "30", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4")
    assert "quarter turns" in cautions_of(tmp_path / "turned.mp4")[0]


# ---------------------------------------------------------------- stills


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tiff", "a.gif", "a.avif", "100%d.jpg", "b*[1].png"]
)
def test_stills_are_clips_of_one_frame(tmp_path, name):
    Image.fromarray(flat((200, 60, 30))[0]).save(tmp_path / name)
    assert probe(tmp_path / name)[:1] + probe(tmp_path / name)[2:] == (1, 48, 64)
    assert abs(read_frames(tmp_path / name, [0.0])[0, 20, 20].astype(int) - (200, 60, 30)).max() <= 12


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.jpeg", "a.JPG", "progressive.jpg", "a.png", "jpeg_called.png", "cmyk.jpg"]
)
def test_photos_of_real_sizes_are_read(tmp_path, name):
    """FFmpeg looks at a small file's content, and at a larger one's name."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    image = Image.fromarray(noise).convert("CMYK" if name.startswith("cmyk") else "RGB")
    kind = "png" if name == "a.png" else "jpeg"
    image.save(tmp_path / name, kind, quality=95, progressive=name.startswith("progressive"))
    assert probe(tmp_path / name)[:1] + probe(tmp_path / name)[2:] == (1, 480, 640)
    assert read_frames(tmp_path / name, [0.0]).shape == (1, 480, 640, 3)


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_an_avif_is_turned_in_its_header_too(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(left_white()[0]).save(tmp_path / "a.avif", exif=exif)
    assert probe(tmp_path / "a.avif")[2:] == read_frames(tmp_path / "a.avif", [0.0]).shape[1:3]
    assert (probe(tmp_path / "a.avif").height == 96) == (orientation != 3)


@pytest.mark.parametrize("pixels", [2, 8, 16])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_crop_in_the_stream_is_made_to_the_pixel(tmp_path, suffix, pixels):
    path = encode(tmp_path / "a.mp4", left_white(64, 96), "8", *PLAIN_X264)
    crop = ("-bsf:v", f"h264_metadata=crop_left={pixels}:crop_top={pixels}")
    ffmpeg("-i", path, *crop, "-c", "copy", tmp_path / f"cropped.{suffix}")
    image = read_frames(tmp_path / f"cropped.{suffix}", [0.0])[0]
    assert probe(tmp_path / f"cropped.{suffix}")[2:] == image.shape[:2] == (64 - pixels, 96 - pixels)
    assert abs(image.astype(int) - left_white(64, 96)[0, pixels:, pixels:]).mean() < 4


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.avif"])
def test_all_frames_of_an_animated_picture_are_read(tmp_path, name):
    first, *others = [Image.fromarray(flat((40 + 20 * number, 0, 0))[0]) for number in range(8)]
    first.save(tmp_path / name, save_all=True, append_images=others, duration=120)
    info = probe(tmp_path / name)
    assert info.num_frames == 8
    red = read_frames(tmp_path / name, [k / info.fps for k in range(8)])[:, 20, 20, 0]
    assert abs(red.astype(int) - [40 + 20 * number for number in range(8)]).max() <= 12


def test_an_animated_webp_is_called_what_it_is(tmp_path):
    first, *others = [Image.fromarray(flat((40 + 20 * number, 0, 0))[0]) for number in range(8)]
    first.save(tmp_path / "a.webp", save_all=True, append_images=others, duration=125)
    with pytest.raises(DataError, match="an animated WebP, which FFmpeg cannot read; convert it to"):
        probe(tmp_path / "a.webp")
