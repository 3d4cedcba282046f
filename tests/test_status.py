"""status.json: what it says, of which run, and who may change it."""

import json
import os
import time

import pytest

from args import parse_prepare_args, parse_training_args
from base import status
from base.status import THIS_RUN, begin_run, clear_refusal, is_of_this_run, read_status, record_refusal, write_status


OTHER_RUN = {"state": "complete", "exit_code": 0, "step": 9, "run": "another"}
OLDER_VERSION = {"state": "complete", "exit_code": 0, "step": 9}


def put(folder, content, clock=0):
    """status.json as it lies on a file server whose clock differs by so many seconds."""
    folder.mkdir(exist_ok=True)
    path = folder / "status.json"
    path.write_text(json.dumps(content, indent=2))
    os.utime(path, (time.time() + clock, time.time() + clock))
    return path


@pytest.fixture
def wrapper(monkeypatch):
    """As if a wrapper had started this process."""
    monkeypatch.setenv(status.RUN_ID_VARIABLE, "of-the-wrapper")
    monkeypatch.setattr(THIS_RUN, "id", "of-the-wrapper")


by_clock = pytest.mark.parametrize("clock", [-600, 0, 600])


@by_clock
@pytest.mark.parametrize("earlier", [OTHER_RUN, OLDER_VERSION, {"refused": {"run": "another"}}])
def test_a_run_that_begins_drops_the_status_of_another(tmp_path, clock, earlier):
    path = put(tmp_path, earlier, clock)
    begin_run(tmp_path, is_main_process=False)
    assert path.exists()
    begin_run(tmp_path, is_main_process=True)
    assert not path.exists()
    begin_run(tmp_path, is_main_process=True)


@by_clock
def test_a_run_that_begins_keeps_what_another_of_its_ranks_said(tmp_path, clock):
    for of_this_run in ({**OTHER_RUN, "run": THIS_RUN.id}, {**OTHER_RUN, "refused": {"run": THIS_RUN.id}}):
        put(tmp_path, of_this_run, clock)
        begin_run(tmp_path, is_main_process=True)
        assert read_status(tmp_path) == of_this_run and is_of_this_run(of_this_run)


@pytest.mark.parametrize("text", ["", "{", "[]", '"complete"', "\x00\xff"])
def test_a_damaged_status_says_nothing(tmp_path, text):
    (tmp_path / "status.json").write_text(text, encoding="latin-1")
    assert read_status(tmp_path) == {} == read_status(tmp_path / "nowhere") == read_status(tmp_path / "status.json")


def test_every_status_names_its_run(tmp_path, wrapper):
    write_status(tmp_path / "new", "failed", 65, step=3)
    assert read_status(tmp_path / "new") == {"state": "failed", "exit_code": 65, "step": 3, "run": "of-the-wrapper"}


@pytest.mark.parametrize("earlier", [OTHER_RUN, OLDER_VERSION])
def test_a_refusal_is_added_to_what_is_said_of_the_run_and_goes_again(tmp_path, wrapper, earlier):
    put(tmp_path, earlier)
    record_refusal(tmp_path, "other flags")
    refused = {"run": "of-the-wrapper", "exit_code": 2, "message": "other flags"}
    assert read_status(tmp_path) == {**earlier, "refused": refused}
    clear_refusal(tmp_path)
    assert read_status(tmp_path) == earlier
    record_refusal(tmp_path, "other flags")
    write_status(tmp_path, "complete", 0)
    assert "refused" not in read_status(tmp_path)


def test_without_a_wrapper_a_refusal_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.delenv(status.RUN_ID_VARIABLE, raising=False)
    path = put(tmp_path, OTHER_RUN)
    before = path.read_bytes(), path.stat().st_mtime_ns
    for folder in (tmp_path, tmp_path / "new"):
        record_refusal(folder, "other flags")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before and not (tmp_path / "new").exists()


# ---------------------------------------------------------------- refused by the parser

BASE = {
    parse_prepare_args: ["--data_root", "d", "--model_id", "m"],
    lambda argv: parse_training_args("i2v_lora", argv): ["--data_root", "d", "--pretrained_model_name_or_path", "m"],
}


@pytest.mark.parametrize("parse", BASE, ids=["prepare", "training"])
@pytest.mark.parametrize(
    "wrong", [["--rankk", "3"], ["--seed"], ["--seed", "x"], ["--frame_buckets", "7"], ["--config"], ["stray"]]
)
def test_what_the_parser_refuses_is_noted_in_the_folder_that_is_named(parse, wrong, tmp_path, wrapper, capsys):
    for named in (["--output_dir", str(tmp_path / "out")], [f"--output_dir={tmp_path / 'out'}"]):
        put(tmp_path / "out", OTHER_RUN)
        with pytest.raises(SystemExit) as left:
            parse([*BASE[parse], "--output_dir", str(tmp_path / "first"), *named, *wrong])
        assert left.value.code == 2 and not (tmp_path / "first").exists()
        noted = read_status(tmp_path / "out")
        assert noted.pop("refused")["message"] in capsys.readouterr().err and noted == OTHER_RUN


@pytest.mark.parametrize("parse", BASE, ids=["prepare", "training"])
def test_a_place_that_cannot_be_written_hides_no_mistake(parse, tmp_path, wrapper, capsys):
    (tmp_path / "file").touch()
    for folder in ([], ["--output_dir"], ["--output_dir", str(tmp_path / "file")]):
        with pytest.raises(SystemExit) as left:
            parse([*BASE[parse], "--rankk", "3", *folder])
        assert left.value.code == 2 and "unknown flag --rankk" in capsys.readouterr().err
