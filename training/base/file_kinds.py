"""Recognizes files that are not what their name says: Git LFS pointers, web pages, archives, cut downloads."""

HEAD_BYTES = 512  # bytes
# First bytes of the file -> what it is, and what to do
PLACEHOLDERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself; run git lfs pull in its repository",
    b"version https://hawser.github.com/spec/": "a Git LFS pointer, not the file itself; run git lfs pull in its repository",
    b"# xet version": "a Xet pointer, not the file itself; download it from the hub",
    b"/annex/objects/": "a git-annex pointer, not the file itself; run git annex get",
}
ARCHIVES = {
    b"PK\3\4": "a zip archive, as a spreadsheet program's own files are; unpack it, or export the table as CSV",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"Rar!\x1a\x07": "a RAR archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"\xfd7zXZ\0": "an xz archive; unpack it",
    b"(\xb5/\xfd": "a Zstandard archive; unpack it",
}
TEXT = "a text, not a video or picture"
PRINTABLE = {*b"\t\n\r", *range(32, 127)}
WEB_PAGES = (b"<!doctype html", b"<html", b"<?xml", b'{"error"', b'{"message"')


def placeholder(path) -> str | None:
    """What a download or version control left in place of the file; None if it may be the file itself."""
    head = read_head(path)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(WEB_PAGES):
        return "a web page or an error message of a server, not the file itself; download it again"
    if len(head) == HEAD_BYTES and not head.strip(b"\0"):
        return "zeros only at its beginning, like an interrupted download; download it again"
    return match_head(head, PLACEHOLDERS)


def unexpected_content(path) -> str | None:
    """`placeholder`, and also archives and text, which are legitimate for some files."""
    head = read_head(path)
    return placeholder(path) or archive(path) or (TEXT if is_text(head) else None)


def is_text(head: bytes) -> bool:
    return bool(head) and all(byte in PRINTABLE for byte in head)


def archive(path) -> str | None:
    return match_head(read_head(path), ARCHIVES)


def read_head(path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def match_head(head: bytes, beginnings: dict[bytes, str]) -> str | None:
    return next((what for start, what in beginnings.items() if head.startswith(start)), None)
