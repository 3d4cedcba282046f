"""Displays decoded frames as a player does: crop, pixel aspect, rotation, colour conversion.

Container and stream metadata are applied in this order. What is not applied (HDR, interlacing, stereo 3D) becomes a
`Caution`: the clips are named in a warning, with the ffmpeg filter that converts them.
"""

import io
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

from data.containers import boxes, file_boxes, matroska_videos


IDENTITY_MATRIX = (1, 0, 0, 1)
UNCROPPED = (0, 0, 0, 0)
MAX_PIXEL_ASPECT = 8  # pixel aspect; more is a writer's mistake
SD_LINES = 576  # for untagged colours, players assume BT.709 above this height and BT.601 otherwise
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
PROGRESSIVE = (0, 1)  # AV_FIELD_UNKNOWN, AV_FIELD_PROGRESSIVE
MATROSKA_CROP = (0x54BB, 0x54AA, 0x54CC, 0x54DD)  # PixelCropTop, -Bottom, -Left, -Right

# AVColorTransferCharacteristic, AVColorPrimaries; unlisted values are BT.709, close to it, or untagged
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
LINEAR_TRANSFERS = {8: "linear", 9: "logarithmic", 10: "logarithmic"}
WIDE_PRIMARIES = {8: "film", 9: "BT.2020", 10: "XYZ", 11: "DCI-P3", 12: "Display P3"}
# AVStereo3DType: (what it is, the input of ffmpeg's stereo3d filter)
STEREO_LAYOUTS = {
    1: ("side by side", "sbsl"), 2: ("one above the other", "abl"), 3: ("frame by frame", "al"),
    4: ("as a checkerboard", "checkerl"), 5: ("side by side", "sbsl"), 6: ("line by line", "irl"),
    7: ("column by column", "icl"),
}  # fmt: skip
STEREO_BOXES = {b"\1": 2, b"\2": 1}  # Google's st3d box: top-bottom, side by side
SPHERICAL_V1 = bytes.fromhex("ffcc8263f8554a938814587a02521fdd")  # Google's uuid box in a track
RECTILINEAR = 4  # AVSphericalProjection
QUARTER_TURN = 0.02  # tolerance for rounding, relative to the larger matrix entry

TO_SDR = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
TO_BT709 = "zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p"
ON_WHITE = "format=rgba,split[a][b];[a]drawbox=c=white:t=fill:replace=1[a];[a][b]overlay,format=yuv420p"


class Caution(NamedTuple):
    """Something that is not applied when a clip is read, and the ffmpeg filter that converts the clip."""

    what: str  # completes "3 of 9 clips are ..."
    filter: str


INTERLACED = Caution("interlaced, so that moving edges are read with combing", "bwdif")
TRANSPARENT = Caution("transparent in part, and read as if opaque", ON_WHITE)
SPHERICAL = Caution("360-degree pictures", "v360=equirect:flat")


class Picture(NamedTuple):
    """How stored frames become displayed ones: crop, then pixel aspect, then display matrix."""

    crop: tuple[int, int, int, int]  # pixels off top, bottom, left, right
    aspect: Fraction  # width / height of a pixel
    matrix: tuple[int, int, int, int]  # see `nearest_quarter_turn`; decoded frames use their own
    cautions: tuple[Caution, ...]

    @property
    def is_plain(self) -> bool:
        """True if frames are displayed exactly as stored."""
        return (self.crop, self.aspect, self.matrix, self.cautions) == (UNCROPPED, 1, IDENTITY_MATRIX, ())

    def square_pixel_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width with square pixels: the shorter pixel side is scaled up."""
        if self.aspect == 1:
            return height, width
        if self.aspect > 1:
            return height, round(width * self.aspect)
        return round(height / self.aspect), width

    def shown(self, height: int, width: int) -> tuple[int, int]:
        """Height and width as displayed."""
        top, bottom, left, right = self.crop
        height, width = self.square_pixel_size(height - top - bottom, width - left - right)
        return (width, height) if self.matrix[0] == 0 else (height, width)


def formats_of(container) -> set[str]:
    return set(container.format.name.split(","))


def describe(
    path,
    container,
    stream,
    frame: av.VideoFrame | None = None,
    colors: tuple[Caution, ...] = (),
    movies: list[bytes] | None = None,
) -> Picture:
    """The Picture of a video stream, from its headers and, if given, a decoded frame. `colors`: cautions from the
    container's tags, taken before a frame was decoded; `movies`: what `read_movies` gives, if it is known.
    """
    crop, height, width = UNCROPPED, stream.codec_context.height, stream.codec_context.width
    track = find_track(read_movies(path, container) if movies is None else movies, stream.id)
    entry = sample_entry(track)
    if track:
        crop = clean_aperture(entry, height, width)
    elif "matroska" in formats_of(container):
        crop = matroska_crop(path, container.streams.video.index(stream))
    matrix = track_matrix(track) if frame is None else frame_matrix(frame)
    cautions = [*colors, *color_cautions(stream), *layout_cautions(stream, track, entry), *rotation_cautions(matrix)]
    if frame is not None:
        cautions += frame_cautions(frame)
    crop = sensible_crop(crop, height, width)
    return Picture(crop, pixel_aspect(stream), nearest_quarter_turn(matrix), tuple(dict.fromkeys(cautions)))


def show(frame: av.VideoFrame, picture: Picture, to_rgb: VideoReformatter) -> np.ndarray:
    """A decoded frame as a player shows it, uint8 [H, W, 3] RGB. `to_rgb`: one for all frames of a clip, since its
    tables take as long to build as a small frame to convert.
    """
    hd = frame.colorspace == UNSPECIFIED and frame.height > SD_LINES and not frame.format.is_rgb
    # threads=1: starting threads takes longer than converting a frame
    colors = {"src_colorspace": "ITU709"} if hd else {}
    image = to_rgb.reformat(frame, format="rgb24", threads=1, **colors).to_ndarray()
    if picture.crop != UNCROPPED:
        top, bottom, left, right = picture.crop
        image = image[top : frame.height - bottom, left : frame.width - right]
    if picture.aspect != 1:
        height, width = picture.square_pixel_size(*image.shape[:2])
        stored = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        image = stored.reformat(width, height, interpolation="BICUBIC", threads=1).to_ndarray()
    return upright(image, nearest_quarter_turn(frame_matrix(frame)))


# ---------------------------------------------------------------- rotation


def add_unknown_type(cls, value: int) -> Type:
    """An enum member for side data types that FFmpeg knows and PyAV does not (18: EXIF, and later ones).

    Without it PyAV raises ValueError on such files.
    """
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return member


Type._missing_ = classmethod(add_unknown_type)


def frame_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of x' = a x + c y, y' = b x + d y, in any unit; IDENTITY_MATRIX if the frame has no display matrix."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return IDENTITY_MATRIX if data is None else linear_part(struct.unpack("=9i", bytes(data)))


def track_matrix(track: bytes) -> tuple[int, int, int, int]:
    """The matrix in an mp4's track header (ISO 14496-12, 8.3.2), which PyAV exposes only on decoded frames."""
    header = first_box(track, b"tkhd")
    start = 28 + 3 * time_bytes(header)
    return (
        linear_part(struct.unpack(">9i", header[start : start + 36])) if len(header) >= start + 36 else IDENTITY_MATRIX
    )


def linear_part(matrix: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The matrix without translation; IDENTITY_MATRIX if singular: some writers leave it all zero."""
    a, b, _, c, d, *_ = matrix
    return IDENTITY_MATRIX if a * d == b * c else (a, b, c, d)


def nearest_quarter_turn(matrix: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The matrix rounded to the nearest quarter turn, with entries 1, 0 and -1."""
    a, b, c, d = matrix
    a, b, c, d = (0, b, c, 0) if abs(b) > abs(a) else (a, 0, 0, d)
    quarter = tuple((value > 0) - (value < 0) for value in (a, b, c, d))
    return quarter if (a or b) and (c or d) else IDENTITY_MATRIX


def read_movies(path, container) -> list[bytes]:
    """Contents of an mp4's `moov` boxes, of which it has one; none of other files."""
    return list(file_boxes(path, b"moov")) if "mp4" in formats_of(container) else []


def find_track(movies: list[bytes], track_id: int) -> bytes:
    """Content of the `trak` box with that id, empty if there is none."""
    for movie in movies:
        for track in boxes(io.BytesIO(movie), 0, len(movie), (b"trak",)):
            header = first_box(track, b"tkhd")
            offset = 4 + 2 * time_bytes(header)
            if int.from_bytes(header[offset : offset + 4]) == track_id:
                return track
    return b""


def first_box(data: bytes, *names: bytes) -> bytes:
    return next(boxes(io.BytesIO(data), 0, len(data), names), b"")


def time_bytes(header: bytes) -> int:
    """Bytes per timestamp in a full box: 8 in version 1, 4 in version 0."""
    return 8 if header[:1] == b"\1" else 4


def upright(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Rotate and mirror an image [H, W, 3] by its display matrix."""
    a, b, c, d = matrix
    if a == 0:
        image = image.transpose(1, 0, 2)
    return image[:: b + d, :: a + c]


# ---------------------------------------------------------------- crop and aspect


def pixel_aspect(stream) -> Fraction:
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else Fraction(1)


def sample_entry(track: bytes) -> bytes:
    """The track's first sample description: codec, sizes, and the boxes that say how to display the picture."""
    return first_box(track, b"mdia", b"minf", b"stbl", b"stsd")[8:]


def clean_aperture(entry: bytes, height: int, width: int) -> tuple[int, int, int, int]:
    """Crop (top, bottom, left, right) by a `clap` box (ISO 14496-12, 12.1.4), which libavcodec does not apply."""
    offset = entry.find(b"clap") + 4
    values = struct.unpack(">8i", entry[offset : offset + 32]) if 4 <= offset <= len(entry) - 32 else ()
    if not values or min(values[1::2]) <= 0:
        return UNCROPPED
    shown_width, shown_height, x, y = (Fraction(*values[i : i + 2]) for i in range(0, 8, 2))
    top = round((height - shown_height) / 2 + y)  # y: offset from the frame's centre to the aperture's
    left = round((width - shown_width) / 2 + x)
    return top, height - top - round(shown_height), left, width - left - round(shown_width)


def matroska_crop(path, number: int) -> tuple[int, int, int, int]:
    """Crop of the Matroska file's video track `number`."""
    videos = matroska_videos(path)
    return tuple(videos[number].get(name, 0) for name in MATROSKA_CROP) if number < len(videos) else UNCROPPED


def sensible_crop(crop: tuple[int, int, int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """The crop, or UNCROPPED if it extends beyond the frame or leaves nothing."""
    top, bottom, left, right = crop
    return crop if min(crop) >= 0 and top + bottom < height and left + right < width else UNCROPPED


# ---------------------------------------------------------------- not applied


def color_cautions(stream) -> Iterator[Caution]:
    """HDR and wide-gamut cautions, from the codec context."""
    codec = stream.codec_context
    # zscale refuses an untagged matrix
    first = "setparams=colorspace=bt709," if codec.colorspace == UNSPECIFIED else ""
    if codec.color_trc in HDR_TRANSFERS:
        yield Caution(f"HDR ({HDR_TRANSFERS[codec.color_trc]}), so that white is read as grey", first + TO_SDR)
    elif codec.color_trc in LINEAR_TRANSFERS:
        yield Caution(f"of {LINEAR_TRANSFERS[codec.color_trc]} brightness, which is not converted", first + TO_BT709)
    elif codec.color_primaries in WIDE_PRIMARIES:
        gamut = WIDE_PRIMARIES[codec.color_primaries]
        yield Caution(f"of a wide gamut ({gamut}), so that colours are read too pale", first + TO_BT709)


def layout_cautions(stream, track: bytes, entry: bytes) -> Iterator[Caution]:
    """Interlacing, alpha, 360-degree and stereo cautions, from the stream's header, an mp4's `trak` box and its
    `sample_entry`.
    """
    if stream.codec_context.field_order not in PROGRESSIVE:
        yield INTERLACED
    if stream.metadata.get("alpha_mode") == "1":
        yield TRANSPARENT
    if entry[4:8] in (b"dvh1", b"dvhe", b"dav1"):
        yield Caution("Dolby Vision without a picture for other players", TO_SDR)
    if b"sv3d" in entry or SPHERICAL_V1 in track:
        yield SPHERICAL
    offset = entry.find(b"st3d") + 8  # skip the name, version and flags
    if offset >= 8 and entry[offset : offset + 1] in STEREO_BOXES:
        yield stereo_caution(STEREO_BOXES[entry[offset : offset + 1]])


def rotation_cautions(matrix: tuple[int, int, int, int]) -> Iterator[Caution]:
    a, b, *_ = map(abs, matrix)
    if min(a, b) > QUARTER_TURN * max(a, b):
        # "null": ffmpeg applies the rotation by itself
        yield Caution("rotated by other than quarter turns; the nearest quarter turn is used", "null")


def frame_cautions(frame: av.VideoFrame) -> Iterator[Caution]:
    """Cautions that only a decoded frame reveals."""
    stereo, spherical = (side_data_number(frame, name) for name in ("STEREO3D", "SPHERICAL"))
    if stereo in STEREO_LAYOUTS:
        yield stereo_caution(stereo)
    if spherical not in (None, RECTILINEAR):
        yield SPHERICAL
    if frame.interlaced_frame:
        yield INTERLACED
    if has_transparency(frame):
        yield TRANSPARENT


def stereo_caution(layout: int) -> Caution:
    name, source = STEREO_LAYOUTS[layout]
    return Caution(f"two pictures in one ({name}), for two eyes", f"stereo3d={source}:ml")


def side_data_number(frame: av.VideoFrame, name: str) -> int | None:
    """The first 32-bit integer of a frame's side data."""
    data = frame.side_data.get(name)
    return None if data is None else int.from_bytes(bytes(data)[:4], sys.byteorder)


def has_transparency(frame: av.VideoFrame) -> bool:
    if frame.format.name != "pal8" and not any(component.is_alpha for component in frame.format.components):
        return False
    return bool(frame.to_ndarray(format="rgba", threads=1)[..., 3].min() < 255)
