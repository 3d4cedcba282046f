"""Encodes a run's captions with T5 into one file that all ranks of a machine memory-map; warns about unreadable texts.

T5-XXL gives 1.8 MiB per caption in bf16, 36 GiB for 20,000. Rows of a mapped file are read on use, and the system can
drop them again when memory is short. Axes: N captions, S text tokens, D text width.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer

from base.errors import StorageError, first_few
from base.files import TEMPORARY, flush, free_bytes, rename, undo
from base.hashes import file_stamp
from base.manifest import DamagedFile
from base.ranks import exchange_on_host
from base.startup import STARTUP
from base.tensor_file import describe, encoded, map_tensor, open_header


logger = logging.getLogger(__name__)

STEM, TENSOR = "caption_embeds", "prompt_embeds"  # names of the file and of the tensor in it
SPACE = "\u2581"  # sentencepiece's marker at the start of a word
SHOWN_CHARACTERS = 40  # characters of a validation prompt shown in warnings


class CaptionEmbeds(Mapping):
    """{prompt: embedding [S, D]}, views into the memory-mapped file."""

    def __init__(self, path: Path, prompts: list[str]):
        self.rows = {prompt: row for row, prompt in enumerate(prompts)}
        self.table = map_tensor(path, TENSOR)  # [N, S, D]

    def __getitem__(self, prompt: str) -> torch.Tensor:
        return self.table[self.rows[prompt]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


# ---------------------------------------------------------------- the texts


def read_texts_from_args(args, dataset, validation_set) -> dict[str, list[str]]:
    """{text: the clips or flags that use it} of every distinct text that a run encodes, the empty one included.

    Nothing if it encodes none: prepared data, and no prompts.
    """
    if args.load_tensors and not validation_set.prompts:
        return {}
    texts, held_out = {"": []}, validation_set.held_out
    if not args.load_tensors:
        held_out_sources = held_out.dataset.sources if held_out.dataset else []
        clips = [*zip(dataset.prompts, dataset.sources, strict=True)]
        clips += zip(held_out.prompts, held_out_sources, strict=False)  # sources may be a longer list
        for caption, source in clips:
            texts.setdefault(caption, []).append(source)
    for prompt in validation_set.prompts:
        texts.setdefault(prompt, []).append(f"--validation_prompt {shortened(prompt)}")
    return texts


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def warn_of_texts_from_args(args, model_dir: Path, texts: dict[str, list[str]], max_length: int) -> None:
    """Warn about texts with characters unknown to T5, and about truncated ones: one line each, with the first few."""
    if args.id_token:
        texts = texts | {args.id_token: ["--id_token", *texts.get(args.id_token, [])]}
    tokenizer = AutoTokenizer.from_pretrained(model_dir, subfolder="tokenizer")
    unknown = tokenizer.unk_token_id
    # Not words of the text: end of sequence and the bare word marker
    unsaid = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(SPACE)} - {unknown}
    unread, cut = [], []  # names
    num_unknown = num_said = longest = 0
    for names, ids in zip(texts.values(), tokenizer(list(texts), verbose=False).input_ids, strict=True):
        if unknown in ids:
            unread.append(names)
            num_unknown += ids.count(unknown)
            num_said += sum(token not in unsaid for token in ids)
        if len(ids) > max_length:
            cut.append(names)
            longest = max(longest, len(ids))
    if unread:
        logger.warning(
            "T5 cannot read all of %d of %d texts, %.0f %% of whose tokens are <unk> to it: %s; write them in English",
            len(unread), len(texts), 100 * num_unknown / num_said, first_few(sum(unread, [])),
        )  # fmt: skip
    if cut:
        logger.warning(
            "%d of %d texts are cut at %d tokens, the longest has %d: %s",
            len(cut), len(texts), max_length, longest, first_few(sum(cut, [])),
        )  # fmt: skip


# ---------------------------------------------------------------- the file


def encode_from_args(
    args, run, model, texts: dict[str, list[str]], dtype: torch.dtype, level: str | None, encode: Callable
) -> Mapping[str, torch.Tensor]:
    """The embeddings of `texts`: from the file of an interrupted run if it matches, else encoded now.

    The ranks of a machine split the texts between them and read the common file. `encode`: encoding.encode_captions.
    """
    if not texts:
        return {}
    prompts, max_length = list(texts), model.text_shape[0]
    if run.rank == 0:
        warn_of_texts_from_args(args, model.folder, texts, max_length)
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    machine, local_rank = divmod(run.rank, num_local)  # ranks are numbered machine by machine
    path = Path(args.output_dir, f"{STEM}-{machine}.safetensors")
    key = key_of_embeds(args, model.folder, prompts, dtype, max_length)
    if any(exchange_on_host("captions-looked-for", "" if recorded_key(path) == key else "to be made")):
        shape = len(prompts), *model.text_shape
        header = file_header(key, shape, dtype)
        problem = reserve(path, header, shape, dtype) if local_rank == 0 else ""
        if problems := [problem for problem in exchange_on_host("captions-room", problem) if problem]:
            raise StorageError(problems[0])
        own = range(local_rank, len(prompts), num_local)
        given = (model.folder, prompts[local_rank::num_local], dtype, run.device, max_length, args.variant, level)
        write_rows(unfinished(path), len(header), own, encode(*given))
        exchange_on_host("captions-written")
        if local_rank == 0:
            flush(unfinished(path))
            rename(unfinished(path), path)
        exchange_on_host("captions-in-place")
    STARTUP.mark("encoding")
    return CaptionEmbeds(path, prompts)


def empty_embeds_from_args(args, dataset, embeds: Mapping, device: torch.device) -> torch.Tensor | None:
    """The empty prompt's embedding [S, D] for --text_dropout, from prepared data or `embeds`; None without the flag."""
    if not args.text_dropout:
        return None
    return (dataset.empty_prompt_embeds() if args.load_tensors else embeds[""]).to(device)


def key_of_embeds(args, model_dir: Path, prompts: list[str], dtype: torch.dtype, max_length: int) -> str:
    """Hash of everything that determines the file's content. T5's files count by size and time: hashing takes long."""
    paths = [path for part in ("text_encoder", "tokenizer") for path in sorted((model_dir / part).iterdir())]
    parts = {
        "prompts": prompts, "encoder": [[path.name, *file_stamp(path)] for path in paths], "variant": args.variant,
        "dtype": str(dtype), "tokens": max_length,
    }  # fmt: skip
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def recorded_key(path: Path) -> str | None:
    """The key of the file's content; None if there is no file, or a damaged one."""
    if not path.exists():
        return None
    try:
        return open_header(path)[1].get("key")
    except (OSError, DamagedFile) as error:
        logger.warning("%s: not readable (%s), made again", path, error)
        return None


def unfinished(path: Path) -> Path:
    """The temporary file that all ranks write to; a killed run's is removed when its folder is next opened."""
    return path.with_name(f"{TEMPORARY}{path.name}")


def reserve(path: Path, header: bytes, shape: tuple[int, int, int], dtype: torch.dtype) -> str:
    """Create the temporary file at full size, before T5 is loaded; returns one line if the disk has no room for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # outdated
    needed, free = embeds_bytes(shape, dtype), free_bytes(path.parent)
    if needed > free:
        return (
            f"{path}: the embeddings of {shape[0]} captions take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            "are free there; make room, or choose an --output_dir on another disk"
        )
    undo.extend([path.unlink, unfinished(path).unlink])  # if the command is refused later
    with open(unfinished(path), "wb") as file:
        file.write(header)
        file.truncate(len(header) + needed)
    return ""


def embeds_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def file_header(key: str, shape: tuple[int, int, int], dtype: torch.dtype) -> bytes:
    """Header of a safetensors file with one tensor, whose rows are written one by one."""
    return encoded(describe({TENSOR: (dtype, shape)}, {"key": key}))


def write_rows(path: Path, start: int, rows: range, embeds: Iterator[torch.Tensor]) -> None:
    """Write each embedding [S, D] to its row of the tensor that begins at byte `start`."""
    with open(path, "r+b") as file:
        for row, embedding in zip(rows, embeds, strict=True):
            file.seek(start + row * embedding.nbytes)
            file.write(embedding.contiguous().view(torch.uint8).numpy())


def remove_caption_embeds(output_dir: Path) -> None:
    """Remove the file at the end of a run, which cannot be resumed any more."""
    for path in output_dir.glob(f"{STEM}-*.safetensors"):
        path.unlink(missing_ok=True)  # another rank may have removed it
