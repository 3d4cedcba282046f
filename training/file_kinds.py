"""What a file is that does not hold what its name says: as downloads and version control leave them."""

LOOKED_AT = 512  # bytes
# How the file begins: what it is, and what to do
BEGINNINGS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself; run git lfs pull in its repository",
    b"version https://hawser.github.com/spec/": "a Git LFS pointer, not the file itself; run git lfs pull in its repository",
    b"# xet version": "a Xet pointer, not the file itself; download it with huggingface-cli or git xet",
    b"PK\3\4": "a zip archive; unpack it",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"Rar!\x1a\x07": "a RAR archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"\xfd7zXZ\0": "an xz archive; unpack it",
    b"(\xb5/\xfd": "a Zstandard archive; unpack it",
    b"%PDF-": "a PDF",
}
WEB_PAGES = (b"<!doctype html", b"<html", b"<?xml", b'{"error"', b'{"message"')


def other_content(path) -> str | None:
    """What lies there in place of a video, picture, model or list; None if it is nothing that is known to lie about."""
    with open(path, "rb") as file:
        head = file.read(LOOKED_AT)
    for beginning, what in BEGINNINGS.items():
        if head.startswith(beginning):
            return what
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(WEB_PAGES):
        return "a web page or an error message of a server, not the file itself; download it again"
    if head.startswith(b"/annex/objects/"):
        return "a git-annex pointer, not the file itself; run git annex get"
    if len(head) == LOOKED_AT and not head.strip(b"\0"):
        return "nothing but zeros at its beginning, as a download leaves it that was broken off; download it again"
    return None
