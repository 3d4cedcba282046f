"""What a clone brings: the same bytes on every machine, and a project file that names its licence."""

import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.licenses import canonicalize_license_expression


ROOT = Path(__file__).resolve().parent.parent
NEEDS_LF = [*ROOT.glob("*.sh"), *ROOT.glob("*/*.sh"), ROOT / "Makefile", ROOT / ".ci" / "run"]


def git(*words, given=b""):
    settings = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "core.safecrlf=false"]
    return subprocess.run(["git", *settings, *map(str, words)], check=True, capture_output=True, input=given).stdout


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    """A clone of this working tree as git for Windows makes it by default."""
    folder = tmp_path_factory.mktemp("cloned")
    git("init", "-q", folder / "origin")
    here = [f"--git-dir={folder / 'origin' / '.git'}", f"--work-tree={ROOT}"]
    names = git("-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    git(*here, "add", "--pathspec-from-file=-", "--pathspec-file-nul", given=names)
    git(*here, "commit", "-q", "-m", "all")
    git("clone", "-q", "-c", "core.autocrlf=true", folder / "origin", folder / "clone")
    return folder / "clone"


def test_a_clone_with_autocrlf_has_the_same_bytes(cloned):
    names = git("-C", cloned, "ls-files", "-z").decode().split("\0")[:-1]
    files = [name for name in names if not (cloned / name).is_symlink()]
    assert {path.relative_to(ROOT).as_posix() for path in NEEDS_LF} <= set(files)
    assert [name for name in files if (cloned / name).read_bytes() != (ROOT / name).read_bytes()] == []


def test_a_wrapper_of_such_a_clone_runs(cloned):
    done = subprocess.run([cloned / "prepare_dataset.sh"], capture_output=True, text=True)
    assert "DATA_ROOT" in done.stderr and "\r" not in done.stderr


def test_what_an_editor_saves_with_carriage_returns_is_committed_without(cloned):
    script, clip = cloned / "new.sh", cloned / "new.mp4"
    script.write_bytes(b"echo\r\n")
    clip.write_bytes(b"\r\n")
    git("-C", cloned, "add", script, clip)
    assert git("-C", cloned, "show", ":new.sh") == b"echo\n"
    assert git("-C", cloned, "show", ":new.mp4") == b"\r\n"


def test_the_project_names_its_licence_and_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert canonicalize_license_expression(project["license"]) == "Apache-2.0"
    for name in project["license-files"]:
        assert "Apache License" in (ROOT / name).read_text(encoding="utf-8")[:100]
    assert (ROOT / project["readme"]).is_file()
