"""A model's files: finding or downloading them, their dtype, which of them load, and their hashes."""

import functools
import hashlib
import inspect
import json
import re
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError, safe_open

from base.bars import download_bar
from base.dtypes import WEIGHT_DTYPES
from base.errors import UsageError, first_line
from base.file_kinds import placeholder
from base.hashes import HashCache
from base.tensor_file import weight_files
from cogvideox.config import (
    WeightFiles,
    check_class,
    load_scheduler,
    load_vae_config,
)


WEIGHT_NAME = re.compile(r"\.(safetensors|bin)$|\.index\.(\w+\.)?json$")  # weight files, and indices of sharded ones
SETTINGS_SUFFIXES = {".json", ".model", ".txt"}


def resolve_model_dir(model: str, components: list[str], revision: str | None = None, cache_dir: str | None = None):
    """The local folder of `model`, a folder or hub id; downloads only `components`, which are subfolders or files."""
    model_dir = Path(model)
    if not model_dir.is_dir():
        model_dir = download_model(model, components, revision, cache_dir)
    missing = [name for name in ["model_index.json", *components] if not (model_dir / name).exists()]
    if missing:
        raise UsageError(
            f"{model_dir}: not a complete CogVideoX folder, it lacks {', '.join(missing)}; "
            "give a diffusers folder or a hub id such as zai-org/CogVideoX-2b"
        )
    for name in ["model_index.json", *components]:
        path = model_dir / name
        check_model_files(sorted(path.iterdir()) if path.is_dir() else [path])
    return model_dir


def check_model_files(paths: list[Path]) -> None:
    """Refuse damaged or missing files now, by their headers; otherwise they would fail one by one, minutes later."""
    for path in paths:
        if path.is_dir():
            continue
        try:
            if other := placeholder(path):
                raise UsageError(f"{path}: {other}")
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                shards = set(content.get("weight_map", {}).values()) if path.name.endswith(".index.json") else ()
                if lacking := [name for name in sorted(shards) if not (path.parent / name).exists()]:
                    raise UsageError(f"{path.parent}: lacks {', '.join(lacking)}; download the model again")
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (SafetensorError, ValueError, OSError) as error:
            raise UsageError(f"{path}: not readable ({error}); download the model again") from error


def download_model(model: str, components: list[str], revision: str | None, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    patterns = ["model_index.json", *(name if name.endswith(".json") else f"{name}/*" for name in components)]
    try:
        options = {"revision": revision, "cache_dir": cache_dir, "tqdm_class": download_bar(model)}
        return Path(snapshot_download(model, allow_patterns=patterns, **options))
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"{model}: neither a folder nor a model that the hub serves here ({first_line(error)}); if it cannot be "
            "reached, set HF_ENDPOINT=https://... to a mirror, or give the folder of a downloaded model"
        ) from error


def stored_dtype(model_dir: Path, variant: str | None = None) -> torch.dtype:
    """The dtype of the transformer's weights on disk, read from a header, never guessed from a name."""
    folder = transformer_folder(model_dir)
    files = [path for path in sorted(folder.glob("*.safetensors")) if variant_of(path.name) == variant]
    if not files:
        others = sorted({variant_of(path.name) or "(none)" for path in folder.glob("*.safetensors")})
        advice = f"it holds those of --variant {', '.join(others)}" if others else "download the model again"
        raise UsageError(f"{folder}: no weights of --variant {variant or '(none)'}; {advice}")
    try:
        with safe_open(files[0], framework="pt") as weights:
            name = next(iter(weights.keys()))
            return WEIGHT_DTYPES[weights.get_slice(name).get_dtype()]
    except (SafetensorError, KeyError) as error:
        raise UsageError(f"{files[0]}: not readable as model weights ({error}); download the model again") from error


def widest_dtype(model_dir: Path, variant: str | None = None) -> torch.dtype:
    """The smallest dtype that holds all of the transformer's weights exactly."""
    found = set()
    for path in weight_files(transformer_folder(model_dir), variant):
        with safe_open(path, framework="pt") as weights:
            found |= {WEIGHT_DTYPES[weights.get_slice(name).get_dtype()] for name in sorted(weights.keys())}
    return functools.reduce(torch.promote_types, found)


def weights_from_args(args, model_dir: Path) -> WeightFiles:
    """Weights of the transformer that training starts from: the model's own, or --init_transformer."""
    if args.init_transformer is None:
        return WeightFiles(model_dir / "transformer", args.variant)
    folder = find_transformer(args.init_transformer)
    has_variant = args.variant and any(folder.glob(f"*.{args.variant}*.safetensors"))
    return WeightFiles(folder, args.variant if has_variant else None)


# ---------------------------------------------------------------- a transformer of an earlier run


def find_transformer(start: str) -> Path:
    """The folder with the weights of --init_transformer: that folder, or inside a run, checkpoint or pipeline."""
    root = Path(start)
    folder = transformer_folder(root)
    if (folder / "config.json").is_file():
        check_model_files(sorted(folder.iterdir()))
        return folder
    advice = "give the output folder of a full fine-tuning, a checkpoint of it, or the transformer folder there"
    checkpoints = [path.parent.parent for path in root.glob("checkpoint-*/transformer/config.json")]
    checkpoints = [path for path in checkpoints if path.name.removeprefix("checkpoint-").isdigit()]
    if not root.is_dir():
        advice = "no such folder; if it is on the hub, download it first: hf download MODEL --local-dir FOLDER"
    elif checkpoints:
        newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        advice = f"the run there has no result yet; its newest checkpoint is {newest}"
    elif any(root.glob("*lora*.safetensors")):
        advice = "holds a LoRA; give it as --init_lora, or --export merged there and give its transformer folder"
    raise UsageError(f"--init_transformer {start}: {advice}")


def transformer_folder(model_dir: Path) -> Path:
    """The transformer's folder inside a pipeline's; otherwise the folder itself."""
    folder = Path(model_dir, "transformer")
    return folder if folder.is_dir() else Path(model_dir)


def read_start_config_from_args(args, model_config) -> dict:
    """The config of --init_transformer; UsageError unless it is a transformer of the same kind and size.

    It may lack the model's learned positions, if --drop_learned_positions removed them.
    """
    folder, model = find_transformer(args.init_transformer), args.pretrained_model_name_or_path
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check_class(folder, config)
    ours, theirs = (all_settings(CogVideoXTransformer3DModel, each) for each in (model_config, config))
    dropped = {"use_learned_positional_embeddings"} if not theirs["use_learned_positional_embeddings"] else set()
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing := [f"{name} {theirs.get(name)}, not {ours.get(name)}" for name in names if name not in dropped]:
        raise UsageError(f"--init_transformer {args.init_transformer}: does not fit {model} ({'; '.join(differing)})")
    check_start_weights(args, folder, config)
    notes_path = folder / "training.json"
    inference_notes = json.loads(notes_path.read_text(encoding="utf-8")) if notes_path.is_file() else {}
    scale = inference_notes.get("image_latent_scale", args.image_latent_scale)
    if scale != args.image_latent_scale:
        raise UsageError(
            f"--init_transformer {args.init_transformer}: was trained with --image_latent_scale {scale}; give the same"
        )
    return config


def check_start_weights(args, folder: Path, config: dict) -> None:
    """UsageError unless the files, by their headers, hold every weight of the model in its shape."""
    found = {}
    for path in filter(Path.is_file, weight_files(*weights_from_args(args, folder))):
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(config)
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if differing := sorted(name for name, shape in wanted.items() if found.get(name) != shape):
        raise UsageError(
            f"--init_transformer {args.init_transformer}: {len(differing)} weights of its config.json are missing or of "
            f"another shape, e.g. {differing[0]}"
        )


# ---------------------------------------------------------------- which model it is, by content


def all_settings(model_class: type, config) -> dict:
    """A component's config with defaults filled in: diffusers versions write more or fewer of them."""
    parameters = inspect.signature(model_class.__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(defaults | given))


def changed_settings(model_class: type, config) -> dict:
    """Settings that differ from the class's defaults: the same in every diffusers version."""
    settings, defaults = all_settings(model_class, config), all_settings(model_class, {})
    return {name: value for name, value in settings.items() if name not in defaults or defaults[name] != value}


def hash_model_from_args(args, model_dir: Path, weights: WeightFiles) -> dict[str, str]:
    """Hashes of the weights that training starts from, and of everything else in the model that a run depends on.

    With prepared data that is only settings. Names of files, folders and repositories do not count.
    """
    with HashCache() as hashes:
        config = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
        transformer, scheduler = hash_weights(*weights, hashes), load_scheduler(model_dir)
        settings = [(CogVideoXTransformer3DModel, config), (type(scheduler), scheduler.config)]
        others = [load_vae_config(model_dir), *(changed_settings(*each) for each in settings)]
        if not args.load_tensors:
            others += [hash_weights(model_dir / part, args.variant, hashes) for part in ("vae", "text_encoder")]
            others += [hashes.hash(path, "sha256") for path in sorted((model_dir / "tokenizer").glob("*.model"))]
    return {"transformer": transformer, "others": hash_json(others)}


def hash_weights(folder: Path, variant: str | None, hashes: HashCache) -> str:
    """SHA-256 of the weight file, or a combined hash of several, whatever they are called."""
    paths = [path for path in files_that_load(folder, variant) if path.suffix in (".safetensors", ".bin")]
    each = sorted(hashes.hash(path, "sha256") for path in paths)
    return each[0] if len(each) == 1 else hash_json(each)


def hash_json(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- files


def files_that_load(folder: Path, variant: str | None) -> list[Path]:
    """Files that determine what a VAE, text encoder or tokenizer computes: settings, and the weights of `variant`."""
    paths = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    weights = [path for path in paths if WEIGHT_NAME.search(path.name)]
    chosen = [path for path in weights if variant_of(path.name) == variant] or weights
    is_safe = any(path.suffix == ".safetensors" for path in chosen)  # the library then reads only these
    chosen = [path for path in chosen if "safetensors" in path.name or not is_safe]
    return [path for path in paths if path not in weights and path.suffix in SETTINGS_SUFFIXES] + chosen


def variant_of(name: str) -> str | None:
    """`fp16` of model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and model.safetensors.index.fp16.json."""
    parts = re.sub(r"-\d+-of-\d+", "", name).split(".")[1:]
    return next((part for part in parts if part not in ("safetensors", "bin", "index", "json")), None)
