import csv
import os
import unicodedata

import pytest

from base.errors import DataError
from data.clip_lists import read_clips, unique_stems, with_id_token


def make_root(tmp_path, captions, videos, names=("prompts.txt", "videos.txt"), existing=None):
    """A data root; captions and videos are lists of lines or the files' bytes."""
    root = tmp_path / "data"
    (root / "videos").mkdir(parents=True)
    for name, lines in zip(names, (captions, videos), strict=True):
        data = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        (root / name).write_bytes(data)
    for video in videos if existing is None else existing:
        (root / video).touch()
    return root


def read_text(root):
    return read_clips(root, None, "prompts.txt", "videos.txt")


def write_csv(root, rows):
    path = root / "metadata.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def one_video(tmp_path):
    return make_root(tmp_path, ["a cat"], ["videos/a.mp4"])


def error_of(function, *arguments):
    with pytest.raises(DataError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- two text files


def test_text_files_are_read_line_by_line(tmp_path):
    captions = ["NA", "null", "007", '  spaced, "quoted" ', "two\u2028in one\x0b\x85", "🐈 مرحبا"]
    videos = [f"videos/{i} $(x).mp4" for i in range(6)]
    root = make_root(tmp_path, captions, videos)
    clips = read_text(root)
    assert [clip.prompt for clip in clips] == captions
    assert [clip.source for clip in clips] == videos
    assert [clip.row for clip in clips] == [1, 2, 3, 4, 5, 6]
    assert all(clip.video == root / clip.source for clip in clips)


@pytest.mark.parametrize("captions", [b"\xef\xbb\xbfone\r\ntwo \r\n", b"one\ntwo ", b"one\ntwo \n\n  \n"])
def test_bom_crlf_and_trailing_blank_lines_do_not_count(tmp_path, captions):
    root = make_root(
        tmp_path, captions, b"videos/a.mp4\r\nvideos/b.mp4\n\n", existing=["videos/a.mp4", "videos/b.mp4"]
    )
    assert [(clip.prompt, clip.source) for clip in read_text(root)] == [
        ("one", "videos/a.mp4"),
        ("two ", "videos/b.mp4"),
    ]


def test_other_encodings_are_named_with_the_byte(tmp_path):
    root = make_root(tmp_path, b"fine\nol\xe9\n", b"videos/a.mp4\nvideos/b.mp4\n", existing=[])
    message = error_of(read_text, root)
    assert "prompts.txt:2" in message and "byte offset 7" in message and "iconv" in message
    (root / "prompts.txt").write_bytes(b"\xef\xbb\xbfol\xe9\n")
    assert "byte offset 5" in error_of(read_text, root)
    (root / "prompts.txt").write_text("a\nb\n", encoding="utf-16")
    assert "UTF-16" in error_of(read_text, root)
    (root / "prompts.txt").write_bytes(b"one\rtwo\r")
    assert "carriage return" in error_of(read_text, root)


def test_blank_captions_in_the_middle_are_named_by_row(tmp_path):
    root = make_root(tmp_path, ["one", "", "three"], ["videos/a.mp4", "videos/b.mp4", "videos/c.mp4"])
    assert "prompts.txt:2: blank caption" in error_of(read_text, root)


def test_different_counts_give_both(tmp_path):
    root = make_root(tmp_path, ["one", "two", "three"], ["videos/a.mp4", "videos/b.mp4"])
    message = error_of(read_text, root)
    assert "3 captions" in message and "2 videos" in message


def test_all_missing_videos_are_counted_and_five_named(tmp_path):
    videos = [f"videos/{i}.mp4" for i in range(10)]
    root = make_root(tmp_path, ["x"] * 10, videos, existing=videos[:3])
    message = error_of(read_text, root)
    assert "7 in all" in message and "'videos/7.mp4' (row 8)" in message and "videos/8.mp4" not in message


def test_an_empty_dataset_shows_the_layouts(tmp_path):
    root = make_root(tmp_path, [], [])
    message = error_of(read_text, root)
    assert "no clips" in message and "videos.txt" in message and "--dataset_file" in message


def test_missing_files_name_the_flag(one_video, tmp_path):
    assert "--caption_column" in error_of(read_clips, one_video, None, "captions.txt", "videos.txt")
    assert "--video_column" in error_of(read_clips, one_video, None, "prompts.txt", "clips.txt")
    assert "--data_root" in error_of(read_clips, tmp_path / "nowhere", None, "prompts.txt", "videos.txt")
    assert "--dataset_file" in error_of(read_clips, one_video, one_video / "no.csv", "caption", "video")


@pytest.mark.parametrize("captions", ["prompts.txt", "prompt.txt"])
def test_the_default_columns_point_to_the_files_that_are_there(tmp_path, captions):
    root = make_root(tmp_path, ["a"], ["videos/a.mp4"], names=(captions, "videos.txt"))
    message = error_of(read_clips, root, None, "text", "video")
    assert f"pass --caption_column {captions} --video_column videos.txt" in message


def test_a_csv_alone_is_pointed_to(tmp_path):
    write_csv(tmp_path, [["video", "caption"]])
    assert f"--dataset_file {tmp_path / 'metadata.csv'}" in error_of(read_clips, tmp_path, None, "text", "video")


# ---------------------------------------------------------------- CSV


def test_csv_captions_come_out_as_they_went_in(one_video):
    captions = [
        "NA",
        "null",
        "None",
        "nan",
        "007",
        "1e5",
        'a "b", c',
        "two\nlines",
        "crlf\r\ninside",
        " x ",
        "a\u2028b",
    ]
    path = write_csv(
        one_video, [["id", "video", "caption"], *[[i, "videos/a.mp4", c] for i, c in enumerate(captions)]]
    )
    for data_root in (one_video, None):
        clips = read_clips(data_root, path, "caption", "video")
        assert [clip.prompt for clip in clips] == captions
        assert clips[0].row == 2 and clips[0].video == one_video / "videos/a.mp4"


def test_csv_paths_are_relative_to_data_root_where_given(one_video, tmp_path):
    path = write_csv(tmp_path, [["video", "caption"], ["videos/a.mp4", "a"]])
    assert read_clips(one_video, path, "caption", "video")[0].video == one_video / "videos/a.mp4"
    assert "'videos/a.mp4' (row 2)" in error_of(read_clips, None, path, "caption", "video")


def test_csv_with_bom_and_crlf(one_video):
    (one_video / "m.csv").write_bytes(b"\xef\xbb\xbfvideo,caption\r\nvideos/a.mp4,\xc3\xa9t\xc3\xa9\r\n\r\n")
    assert read_clips(one_video, one_video / "m.csv", "caption", "video")[0].prompt == "\xe9t\xe9"


def test_csv_mistakes(one_video):
    def error(rows, caption="caption"):
        return error_of(read_clips, one_video, write_csv(one_video, rows), caption, "video")

    message = error([["video", "caption"], ["videos/a.mp4", "a"]], caption="captoin")
    assert "columns: video, caption" in message and "did you mean 'caption'" in message
    assert "2 times" in error([["video", "caption", "caption"], ["videos/a.mp4", "a", "b"]])
    assert "metadata.csv:3: blank caption" in error(
        [["video", "caption"], ["videos/a.mp4", "a"], ["videos/a.mp4", ""]]
    )
    assert "quote captions with commas" in error([["video", "caption"], ["videos/a.mp4", "a", "b"]])
    assert "no rows" in error([["video", "caption"]])
    (one_video / "m.csv").write_text('video,caption\nvideos/a.mp4,"open\n')
    assert "quote" in error_of(read_clips, one_video, one_video / "m.csv", "caption", "video")


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "source", ["../outside.mp4", "videos/../../outside.mp4", "/etc/passwd", "http://x/a.mp4", "concat:a|b", "pipe:0"]
)
def test_nothing_outside_of_the_root_is_read(tmp_path, source):
    (tmp_path / "outside.mp4").touch()
    root = make_root(tmp_path, ["a"], [source], existing=[])
    message = error_of(read_text, root)
    assert f"videos.txt:1: '{source}'" in message


def test_legal_paths(tmp_path):
    sources = ["videos/../videos/a.mp4", "./videos/a.mp4", "videos/part 1: start.mp4", "Scene: one.mp4"]
    root = make_root(tmp_path, ["a"] * 4, sources)
    assert [clip.source for clip in read_text(root)] == sources
    (root / "prompts.txt").write_text("a\n")
    (root / "videos.txt").write_text(f"{root}/videos/a.mp4\n")
    assert read_text(root)[0].video == root / "videos/a.mp4"
    os.symlink(root, tmp_path / "link")
    assert read_text(tmp_path / "link")[0].video.is_file()


# ---------------------------------------------------------------- what people write


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("name", ["caf\u00e9.mp4", "\u30ac\u30b9/\ud55c\uae00.mp4", "\u00c5/a.mp4"])
def test_names_are_found_whatever_their_normalization(tmp_path, listed, stored, name):
    on_disk = f"videos/{unicodedata.normalize(stored, name)}"
    (tmp_path / "data" / on_disk).parent.mkdir(parents=True)
    written = f"videos/{unicodedata.normalize(listed, name)}"
    (tmp_path / "data" / on_disk).touch()
    (tmp_path / "data/prompts.txt").write_text("a\n", encoding="utf-8")
    (tmp_path / "data/videos.txt").write_text(f"{written}\n", encoding="utf-8")
    [clip] = read_text(tmp_path / "data")
    assert clip.video.is_file() and clip.source == written


def test_a_name_of_another_normalization_leads_out_of_the_root_no_more_than_any(tmp_path):
    root = make_root(tmp_path, ["a"], ["videos/caf\u00e9.mp4"], existing=[])
    (tmp_path / "secret.mp4").touch()
    os.symlink(tmp_path / "secret.mp4", root / "videos/cafe\u0301.mp4")
    assert "outside of" in error_of(read_text, root)


def test_a_folder_of_frames_is_called_what_it_is(tmp_path):
    root = make_root(tmp_path, ["a", "b"], ["videos/a.mp4", "videos/frames"], existing=["videos/a.mp4"])
    (root / "videos/frames").mkdir()
    message = error_of(read_text, root)
    assert "'videos/frames' (row 2): a folder in place of a video" in message and "ffmpeg -framerate" in message


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("videos\\a.mp4", "'videos/a.mp4' is there: folders are separated by /"),
        ("videos/a.mp4 ", "'videos/a.mp4' is there: quotes and spaces count"),
        ("'videos/a.mp4'", "'videos/a.mp4' is there: quotes and spaces count"),
        ("videos/A.MP4", "holds 'a.mp4'"),
        ("videos/a", "holds 'a.mp4'"),
        ("videos/a.mov", "holds 'a.mp4'"),
        ("videos/gone.mp4", "not found in"),
    ],
)
def test_what_was_likely_meant_is_said(tmp_path, written, hint):
    root = make_root(tmp_path, ["a"], [written], existing=["videos/a.mp4"])
    assert error_of(read_text, root).endswith(hint) or hint == "not found in"
    assert "not found in" in error_of(read_text, root)


def test_a_link_to_nothing_is_called_what_it_is(tmp_path):
    root = make_root(tmp_path, ["a"], ["videos/a.mp4"], existing=[])
    os.symlink("../.git/annex/objects/ab/SHA256E-s4.mp4", root / "videos/a.mp4")
    assert "is a link to ../.git/annex/objects/ab/SHA256E-s4.mp4, which is not there; run git annex get" in error_of(
        read_text, root
    )


@pytest.mark.parametrize("captions", [["", "", ""], ["a", "", ""], ["", "b", ""], [" ", "", "c"]])
def test_blank_captions_are_legal_with_an_id_token(tmp_path, captions):
    root = make_root(tmp_path, captions, ["videos/a.mp4", "videos/b.mp4", "videos/c.mp4"])
    assert "prompts.txt" in error_of(read_text, root)
    clips = read_clips(root, None, "prompts.txt", "videos.txt", blank_captions=True)
    assert [clip.prompt for clip in clips] == captions
    assert [with_id_token(clip.prompt, "TOK") for clip in clips] == [
        f"TOK {c}" if c.strip() else "TOK" for c in captions
    ]
    path = write_csv(root, [["caption", "video"], *zip(captions, ("videos/a.mp4",) * 3, strict=True)])
    assert "or give --id_token" in error_of(read_clips, None, path, "caption", "video")
    assert len(read_clips(None, path, "caption", "video", blank_captions=True)) == 3


def test_captions_that_are_missing_are_no_blank_ones(tmp_path):
    root = make_root(tmp_path, ["", ""], ["videos/a.mp4", "videos/b.mp4", "videos/c.mp4"])
    with pytest.raises(DataError, match="has 2 captions and .* 3 videos"):
        read_clips(root, None, "prompts.txt", "videos.txt", blank_captions=True)


# ---------------------------------------------------------------- names


def test_id_token_gets_one_space():
    assert with_id_token("a cat", "BW_STYLE") == "BW_STYLE a cat"
    assert with_id_token("a cat", None) == with_id_token("a cat", "") == "a cat"


def test_stems_are_unique_safe_and_stable():
    sources = ["a.v1.mp4", "a.v2.mp4", "x/1.mp4", "y/1.mp4", "A.mp4", "a.mp4", "x" * 250 + ".mp4", "-rf $(x).mp4"]
    sources += ["\u65e5\u672c.mp4", "\u4e2d\u56fd.mp4", ".hidden", "x/1.mp4"]
    stems = unique_stems(sources)
    assert len({stem.lower() for stem in stems}) == len(stems)
    for stem in stems:
        assert len(stem.encode()) <= 200 and stem[0] not in "-._"
        assert all(char.isascii() and (char.isalnum() or char in "._-") for char in stem)
    assert stems[-1] == stems[2] + "-2"
    assert unique_stems(["new.mp4", *sources])[1:] == stems


def test_stems_are_unique_where_their_hashes_are_not():
    """Clips of one name in 200,000 folders: some of the hashes, of 32 bits, are equal."""
    stems = unique_stems(f"{number}/clip.mp4" for number in range(200_000))
    assert len(set(stems)) == len(stems) and any(stem.endswith("-2") for stem in stems)


def test_the_sample_data_reads_the_same_in_both_layouts(sample_data):
    text = read_clips(sample_data, None, "prompts.txt", "videos.txt")
    table = read_clips(None, sample_data / "metadata.csv", "caption", "video")
    assert [clip[:2] for clip in text] == [clip[:2] for clip in table]
    assert text


def test_the_real_clips_read_the_same_in_both_layouts(real_clips):
    text = read_clips(real_clips, None, "prompts.txt", "videos.txt")
    table = read_clips(None, real_clips / "metadata.csv", "caption", "video")
    assert len(text) == 6
    assert [clip[:2] for clip in text] == [clip[:2] for clip in table]
