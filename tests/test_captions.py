"""Captions through T5: what it cannot read is a warning, and all ranks map one file of embeddings."""

import importlib
import json
import multiprocessing
import os
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from args import parse_prepare_args, parse_training_args
from base import files
from base.errors import StorageError, UsageError
from cogvideox import encoding, loading
from cogvideox.encoding import encode_captions
from data import captions
from data.captions import CaptionEmbeds
from run.exits import run_script
from script_runs import DEFAULTS, EVERY_SCRIPT, SCRIPTS, TEXT_FILES, run_ranks


CPU = torch.device("cpu")
TEXTS = {"": [], "a red square": ["0.mp4", "2.mp4"], "a dog": ["1.mp4"]}
BUCKETS = ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "9", "--target_fps", "8"]
RAW = [*TEXT_FILES, "--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "9", "--fps", "8"]


def flags(out, *more):
    argv = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", str(out), *more]
    return parse_training_args("t2v_lora", argv)


def embeds_of(model_dir, out, texts=TEXTS, dtype=torch.float32, rank=0, encode=encode_captions):
    run, model = SimpleNamespace(rank=rank, device=CPU), SimpleNamespace(folder=model_dir, text_shape=(226, 32))
    return captions.encode_from_args(flags(out), run, model, texts, dtype, None, encode)


def in_memory(model_dir, texts=TEXTS, dtype=torch.float32):
    return dict(zip(texts, encode_captions(model_dir, list(texts), dtype, CPU, 226), strict=True))


def same(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[prompt], theirs[prompt]) for prompt in theirs)


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_what_t5_gave_in_its_dtype_and_once(dtype, tiny, tmp_path):
    embeds = embeds_of(tiny("5b"), tmp_path, dtype=dtype)
    assert same(embeds, in_memory(tiny("5b"), dtype=dtype)) and embeds["a dog"].dtype == dtype
    (path,) = tmp_path.iterdir()
    with safe_open(path, framework="pt") as tensors:  # also for others to read
        assert tensors.get_slice("prompt_embeds").get_shape() == [3, 226, 32]
    assert path.stat().st_size - 3 * 226 * 32 * dtype.itemsize < 1000


def test_a_table_is_mapped_not_read(tmp_path):
    path = tmp_path / "table.safetensors"
    save_file({"prompt_embeds": torch.ones(64, 1024, 1024)}, path)  # 256 MiB
    process = psutil.Process()
    before = process.memory_info().rss
    embeds = CaptionEmbeds(path, [str(row) for row in range(64)])
    assert embeds["63"].sum() == 2**20
    assert process.memory_info().rss - before < 64 * 2**20
    path.unlink()  # by a rank that is done: those that have it mapped read on
    assert embeds["1"].sum() == 2**20


def test_a_table_larger_than_the_memory_is_mapped_and_recognized(tmp_path):
    """A private mapping of that size is refused by the system's overcommit heuristic."""
    size = psutil.virtual_memory().total + psutil.swap_memory().total + 2**30
    path, rows = tmp_path / "table.safetensors", size // (226 * 4096 * 2)
    header = captions.file_header("the key", (rows, 226, 4096), torch.bfloat16)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + rows * 226 * 4096 * 2)  # sparse: no room on the disk
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")  # 1 in bf16
    embeds = CaptionEmbeds(path, [str(row) for row in range(rows)])
    assert embeds[str(rows - 1)][-1, -1] == 1 and embeds["0"].shape == (226, 4096) and embeds["0"].sum() == 0
    assert captions.recorded_key(path) == "the key"


def test_an_interrupted_runs_file_is_used_where_it_fits(tiny, tmp_path):
    made = []

    def counting(model_dir, prompts, *given):
        made.append(len(prompts))
        return encode_captions(model_dir, prompts, *given)

    def ask(**changes):
        made.clear()
        model_dir = changes.pop("model_dir", tiny("5b"))
        embeds = embeds_of(model_dir, tmp_path, encode=counting, **changes)
        changes = {name: value for name, value in changes.items() if name != "encode"}
        assert same(embeds, in_memory(model_dir, **changes))
        return sum(made)

    assert ask() == 3
    assert ask() == 0
    assert ask(texts={**TEXTS, "a cat": ["3.mp4"]}) == 4
    assert ask(dtype=torch.bfloat16) == 3
    assert ask(model_dir=tiny("2b"), dtype=torch.bfloat16) == 3  # another T5: weights in fp16
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert ask(model_dir=tiny("2b"), dtype=torch.bfloat16) == 3


@pytest.fixture
def text_model(tmp_path):
    """A folder with what the key looks at."""
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / f"model/{part}").mkdir(parents=True)
        (tmp_path / f"model/{part}/content").write_text("content")
    return tmp_path / "model"


def test_whatever_decides_the_embeddings_is_in_their_key(text_model, tmp_path):
    prompts = ["a dog", "a cat"]

    def key(*more, prompts=prompts, dtype=torch.float32, length=226):
        return captions.key_of_embeds(flags(tmp_path, *more), text_model, prompts, dtype, length)

    keys = {
        "as it was": key(),
        "the weights' variant": key("--variant", "fp16"),
        "other texts": key(prompts=["a dog", "a bird"]),
        "rows in another order": key(prompts=prompts[::-1]),
        "dtype": key(dtype=torch.bfloat16),
        "tokens": key(length=64),
    }
    for part in ("text_encoder", "tokenizer"):
        (text_model / part / "content").write_text("other content")
        keys[part] = key()
    (text_model / "text_encoder/more").write_text("")
    keys["another file"] = key()
    assert len(set(keys.values())) == len(keys), keys
    assert key("--rank", "8", "--seed", "3") == key()


def encode_on_a_rank(rank, port, model_dir, out, results):
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    made = []

    def noting(model_dir, prompts, *given):
        made.extend(prompts)
        return encode_captions(model_dir, prompts, *given)

    embeds = embeds_of(model_dir, out, rank=rank, encode=noting)
    results.put((made, same(embeds, in_memory(model_dir))))
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_the_file(tiny, tmp_path):
    results = multiprocessing.get_context("fork").Queue()
    given = (tiny("5b"), tmp_path / "out", results)
    rank_main = lambda: encode_on_a_rank(int(os.environ["RANK"]), os.environ["MASTER_PORT"], *given)  # noqa: E731
    assert run_ranks(rank_main, 2) == [0, 0]
    (made, fits), (others, others_fit) = results.get(timeout=10), results.get(timeout=10)
    assert fits and others_fit and sorted(made + others) == sorted(TEXTS) and made and others
    assert len(list((tmp_path / "out").iterdir())) == 1


# ---------------------------------------------------------------- runs


@pytest.fixture
def train(tiny, sample_data, tmp_path):
    def run(name, out, *more):
        script = SCRIPTS[name]
        argv = ["--pretrained_model_name_or_path", str(tiny(script.kind)), "--data_root", str(sample_data), *RAW]
        argv += [
            "--output_dir",
            str(tmp_path / out),
            *DEFAULTS,
            *script.flags,
            "--seed",
            "0",
            "--max_train_steps",
            "2",
        ]
        importlib.import_module(script.module).main(parse_training_args(script.key, [*argv, *more]))
        return tmp_path / out

    return run


@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_a_run_on_videos_trains_what_embeddings_in_memory_train(name, train, sample_data, monkeypatch):
    more = ["--validation_data_root", str(sample_data), "--validation_num_clips", "2", "--text_dropout", "0.5"]
    mapped = train(name, "mapped", *more)
    assert not list(mapped.glob("caption_embeds*"))

    asked = []

    def held_in_memory(args, run, model, texts, dtype, *rest):
        asked.append(len(texts))
        return in_memory(model.folder, texts, dtype)

    monkeypatch.setattr(captions, "encode_from_args", held_in_memory)
    held = train(name, "held", *more)
    assert asked
    results = [sorted(out.glob("checkpoint-2/**/*.safetensors")) for out in (mapped, held)]
    assert results[0] and [path.read_bytes() for path in results[0]] == [path.read_bytes() for path in results[1]]
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (mapped, held)]
    losses = [[row["loss"] for row in part if "loss" in row] for part in rows]
    assert losses[0] == losses[1]


def test_a_run_that_broke_off_leaves_them_for_the_next(train, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(loading, "load_transformer", lambda *given, **named: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train("t2v_lora", "out")
    monkeypatch.setattr(encoding, "load_text_encoder", lambda *given: pytest.fail("T5 was loaded again"))
    files.release_locks()
    assert not list(train("t2v_lora", "out").glob("caption_embeds*"))


def test_a_command_that_is_refused_later_leaves_nothing(train, tmp_path, monkeypatch):
    def refuse(*given, **named):
        assert list((tmp_path / "out").glob("caption_embeds*"))
        raise UsageError("no")

    monkeypatch.setattr(loading, "load_transformer", refuse)
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda: train("t2v_lora", "out"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_too_small_is_told_before_t5_is_loaded(train, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    monkeypatch.setattr(encoding, "load_text_encoder", lambda *given: pytest.fail("T5 was loaded"))
    with pytest.raises(StorageError, match="embeddings of 7 captions take .* are free there") as caught:
        train("t2v_lora", "out")
    assert caught.value.exit_code == 74 and "\n" not in str(caught.value)


def test_the_plan_counts_embeddings_as_disk(train, capsys):
    out = train("t2v_lora", "out", "--memory", "plan")
    printed = capsys.readouterr().out
    assert "disk: 0.0 GiB for the embeddings of 7 captions" in printed and "fits: yes" in printed
    assert not out.exists()


# ---------------------------------------------------------------- what is said of the texts


@pytest.mark.parametrize(
    ("texts", "more", "words"),
    [
        ({"\u4e00\u4e2a\u5706": ["a.mp4"], "a dog": ["b.mp4"]}, [], ["1 of 2 texts, 100 %", "a.mp4; write them in"]),
        ({"a dog \U0001f436": ["a.mp4", "b.mp4"]}, [], ["1 of 1 texts, ", "a.mp4, b.mp4; "]),
        ({"\u0441\u043e\u0431\u0430\u043a\u0430": ["a"], "\u0643\u0644\u0628": ["b"]}, [], ["2 of 2 texts, 100 %"]),
        ({"a dog": ["b.mp4"]}, ["--id_token", "\u98ce\u683c"], ["1 of 2 texts, 100 %", ": --id_token; "]),
        ({"a dog": [], "\u732b": ["--validation_prompt \u732b"]}, [], ["--validation_prompt \u732b; "]),
        ({"\u732b" * 300: ["a.mp4"]}, [], ["1 of 1 texts, 100 %"]),  # one unknown token: not cut
        ({"red square " * 200: ["a.mp4"], "a dog": ["b.mp4"]}, [], ["1 of 2 texts are cut at 226 tokens", ": a.mp4"]),
    ],
)
def test_what_t5_cannot_read_or_cuts_is_one_line_with_the_clips(texts, more, words, tiny, tmp_path, caplog):
    captions.warn_of_texts_from_args(flags(tmp_path, *more), tiny("5b"), texts, 226)
    (line,) = caplog.messages
    assert not [word for word in words if word not in line]


def test_nothing_is_said_of_english(tiny, tmp_path, caplog):
    captions.warn_of_texts_from_args(flags(tmp_path, "--id_token", "BW_STYLE"), tiny("5b"), TEXTS, 226)
    assert not caplog.messages


@pytest.fixture
def chinese_data(sample_data, tmp_path):
    """The sample clips, of which two have a caption in Chinese."""
    folder = tmp_path / "chinese"
    folder.mkdir()
    (folder / "videos").symlink_to(sample_data / "videos")
    sources, prompts = [(sample_data / name).read_text().splitlines() for name in ("videos.txt", "prompts.txt")]
    prompts[1:3] = ["\u7ea2\u8272\u7684\u5706", "\u84dd\u8272\u7684\u65b9\u5757"]
    (folder / "videos.txt").write_text("".join(f"{source}\n" for source in sources))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return folder, ", ".join(sources[1:3])


def test_training_on_videos_names_the_clips(train, chinese_data, caplog):
    folder, named = chinese_data
    more = ["--validation_prompt", "\u732b", "--num_inference_steps", "1", "--validation_data_root", str(folder)]
    train("t2v_lora", "out", "--data_root", str(folder), "--allow_outside_root", *more, "--validation_num_clips", "2")
    (line,) = [message for message in caplog.messages if "cannot read" in message]
    assert "3 of 8 texts" in line and named.split(", ")[0] in line and "--validation_prompt \u732b" in line


def test_preparing_names_the_clips(tiny, chinese_data, tmp_path, caplog):
    folder, named = chinese_data
    argv = ["--model_id", str(tiny("5b")), "--data_root", str(folder), "--output_dir", str(tmp_path / "prepared")]
    argv += [*TEXT_FILES, *BUCKETS, "--save_latents_and_embeddings", "--allow_outside_root"]
    importlib.import_module("prepare_dataset").main(parse_prepare_args(argv))
    (line,) = [message for message in caplog.messages if "cannot read" in message]
    assert "2 of 6 texts, 100 %" in line and f"{named}; " in line
