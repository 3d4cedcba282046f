"""What a wrapper prints with DRY_RUN=1, and its commands as lists of words."""

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def dry_run(words: list[str], settings: dict[str, str]) -> str:
    """The output of a wrapper of this repository, whose DATA_ROOT is made as a folder of prepared data."""
    with tempfile.TemporaryDirectory() as folder:
        if settings.get("DATA_ROOT"):
            (Path(folder) / settings["DATA_ROOT"] / "video_latents").mkdir(parents=True)
        wrapper, *arguments = words
        env = {"PATH": os.defpath, **settings, "DRY_RUN": "1"}
        command = [ROOT / wrapper, *arguments]
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return result.stdout


def printed_commands(output: str) -> list[tuple[dict[str, str], list[str]]]:
    """(settings in front, words) of each command of a dry run."""
    # A value with a control character is printed as $'...', which shlex does not know
    assert "$'" not in output
    found = []
    for line in output.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        num_settings = next((place for place, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0)
        if words:
            found.append((dict(word.split("=", 1) for word in words[:num_settings]), words[num_settings:]))
    return found
