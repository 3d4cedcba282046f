"""A start does not look for garbage among what it imports, and collects as usual afterwards."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from base import startup


TRAINING = Path(__file__).resolve().parents[1] / "training"
SCRIPTS = [path for path in sorted(TRAINING.glob("*.py")) if "run_script(" in path.read_text(encoding="utf-8")]
RUN = """
import gc, runpy, sys
usual = gc.get_threshold()
path, folder, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, folder)
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as stop:
    print(stop.code, gc.get_freeze_count() > 100_000, gc.get_threshold() == usual, gc.isenabled())
"""


def test_ending_imports_that_were_not_expected_changes_nothing():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    startup.end_imports()
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)


def test_what_a_script_imports_is_set_aside(tmp_path):
    script = TRAINING / "cogvideox_text_to_video_lora.py"
    folders = ["--pretrained_model_name_or_path", "gone", "--data_root", "gone", "--output_dir", "out"]
    command = [sys.executable, "-c", RUN, script, TRAINING, *folders]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "2 True True True", ran.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_expects_its_imports(path):
    before_imports = path.read_text(encoding="utf-8").partition("\n\nimport ")[0]
    assert "    startup.expect_imports()\n" in before_imports + "\n"
