"""All that is known of CogVideoX: its folders, encoders, latents and position embeddings.

The rule behind every function: the transformer sees in training what the stock diffusers pipeline feeds it.
Axes: B batch, F' pixel frames, F latent frames, C latent channels, h/w pixels, H/W latent size (h = 8H), S text
tokens, D text width. Latents outside of this file are always [B, F, C, H, W].
"""

import functools
import gc
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, T5EncoderModel

from bars import download_bar, tracked
from errors import UsageError, first_line
from file_kinds import stand_in
from hashes import Hashes
from streaming import free_on_gpu, stream_weights


logger = logging.getLogger(__name__)

TEXT_TO_VIDEO_PIPELINE = CogVideoXPipeline
IMAGE_TO_VIDEO_PIPELINE = CogVideoXImageToVideoPipeline
SPATIAL_FACTOR, TEMPORAL_FACTOR = 8, 4  # pixels per latent; the VAE's first latent frame covers one pixel frame
CONFIGS = ["transformer/config.json", "vae/config.json"]  # kilobytes that say which model it is
IMAGE_NOISE_MEAN, IMAGE_NOISE_STD = -3.0, 0.5  # of log sigma, the noise on image-to-video's first frame
WEIGHT_NAME = re.compile(r"\.(safetensors|bin)$|\.index\.(\w+\.)?json$")  # files of weights, and indices of several
SETTINGS_SUFFIXES = {".json", ".model", ".txt"}
SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class VaeConfig(NamedTuple):
    """The two numbers that latents need of the VAE; a run on precomputed latents loads nothing else of it."""

    scaling_factor: float
    invert_scale_latents: bool


class Weights(NamedTuple):
    """A transformer's files: their folder, and the variant that is read."""

    folder: Path
    variant: str | None


class ModelFacts(NamedTuple):
    """What a model card must know of the base model."""

    pipeline: str  # diffusers' classes
    transformer: str
    image_to_video: bool
    apache_licence: bool  # else the CogVideoX LICENSE
    fps: int


# ---------------------------------------------------------------- loading


def resolve_model_dir(model: str, components: list[str], revision: str | None = None, cache_dir: str | None = None):
    """The local folder of `model` (a folder or a hub id) with `components` in it, subfolders or files; only these are fetched."""
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
    """Refuse damaged or missing files now, by their headers: they would else be met one after the other, minutes later."""
    for path in paths:
        if path.is_dir():
            continue
        try:
            if other := stand_in(path):
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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["model_index.json", *(name if name.endswith(".json") else f"{name}/*" for name in components)]
    try:
        options = {"revision": revision, "cache_dir": cache_dir, "tqdm_class": download_bar(model)}
        return Path(snapshot_download(model, allow_patterns=patterns, **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"{model}: neither a folder nor a model that the hub serves here ({first_line(error)}); where it cannot be "
            "reached, name a mirror by HF_ENDPOINT=https://..., or give the folder of a downloaded model"
        ) from error


def read_config(model_dir: Path, component: str) -> dict:
    """The component's JSON configuration; UsageError for a transformer that is no CogVideoX."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    config = json.loads((model_dir / component / name).read_text(encoding="utf-8"))
    if component == "transformer":
        check_class(model_dir, config)
    return config


def check_class(place: Path, transformer_config) -> None:
    wanted, found = CogVideoXTransformer3DModel.__name__, transformer_config.get("_class_name")
    if found != wanted:
        raise UsageError(f"{place}: no CogVideoX model, its transformer is {found}, not {wanted}")


def stored_dtype(model_dir: Path, variant: str | None = None) -> torch.dtype:
    """The dtype in which the transformer's weights lie on disk: read from a header, never from a name."""
    folder = transformer_folder(model_dir)
    files = [path for path in sorted(folder.glob("*.safetensors")) if variant_of(path.name) == variant]
    if not files:
        others = sorted({variant_of(path.name) or "(none)" for path in folder.glob("*.safetensors")})
        advice = f"it holds those of --variant {', '.join(others)}" if others else "download the model again"
        raise UsageError(f"{folder}: no weights of --variant {variant or '(none)'}; {advice}")
    try:
        with safe_open(files[0], framework="pt") as weights:
            name = next(iter(weights.keys()))
            return SAFETENSORS_DTYPES[weights.get_slice(name).get_dtype()]
    except (SafetensorError, KeyError) as error:
        raise UsageError(f"{files[0]}: not readable as model weights ({error}); download the model again") from error


def read_configs_from_args(args, image_to_video: bool) -> tuple[dict, VaeConfig]:
    """The transformer's configuration and the VAE's, fetched alone: gigabytes follow for a model of the script's task
    and for data that can be read.
    """
    model = args.pretrained_model_name_or_path
    model_dir = resolve_model_dir(model, CONFIGS, args.revision, args.cache_dir)
    config = read_config(model_dir, "transformer")
    check_task(model, config, image_to_video)
    if args.init_transformer is not None:
        config = read_start_config_from_args(args, config)
    return config, load_vae_config(model_dir)


def resolve_model_from_args(args, with_encoders: bool) -> tuple[Path, Weights]:
    """The model's folder with all that is needed of it, and the transformer's weights.

    Of the VAE two numbers are needed, unless something is encoded; of the transformer none but --init_transformer.
    """
    weights = ["vae", "text_encoder", "tokenizer"] if with_encoders else ["vae/config.json"]
    transformer = "transformer" if args.init_transformer is None else "transformer/config.json"
    components = [transformer, "scheduler", *weights]
    model_dir = resolve_model_dir(args.pretrained_model_name_or_path, components, args.revision, args.cache_dir)
    return model_dir, weights_from_args(args, model_dir)


def weights_from_args(args, model_dir: Path) -> Weights:
    """Of the transformer that training starts from: the model's own, or --init_transformer."""
    if args.init_transformer is None:
        return Weights(model_dir / "transformer", args.variant)
    folder = find_transformer(args.init_transformer)
    has_variant = args.variant and any(folder.glob(f"*.{args.variant}*.safetensors"))
    return Weights(folder, args.variant if has_variant else None)


# ---------------------------------------------------------------- a transformer of an earlier run


def find_transformer(start: str) -> Path:
    """The folder of the weights that --init_transformer names: itself, or in the folder of a run, checkpoint or pipeline."""
    root = Path(start)
    folder = transformer_folder(root)
    if (folder / "config.json").is_file():
        check_model_files(sorted(folder.iterdir()))
        return folder
    advice = "give the output folder of a full fine-tuning, a checkpoint of it, or the transformer folder there"
    checkpoints = [path.parent.parent for path in root.glob("checkpoint-*/transformer/config.json")]
    checkpoints = [path for path in checkpoints if path.name.removeprefix("checkpoint-").isdigit()]
    if not root.is_dir():
        advice = "no such folder; of a model on the hub, download it first: hf download MODEL --local-dir FOLDER"
    elif checkpoints:
        newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        advice = f"the run there has no result yet; its newest checkpoint is {newest}"
    elif any(root.glob("*lora*.safetensors")):
        advice = "holds a LoRA; give it as --init_lora, or --export merged there and give its transformer folder"
    raise UsageError(f"--init_transformer {start}: {advice}")


def transformer_folder(model_dir: Path) -> Path:
    """The transformer's folder in that of a pipeline; else it is that itself."""
    folder = Path(model_dir, "transformer")
    return folder if folder.is_dir() else Path(model_dir)


def read_start_config_from_args(args, model_config) -> dict:
    """The configuration of --init_transformer; UsageError unless it is a transformer of the same kind and size.

    It may lack learned positions that the model has, which --drop_learned_positions took out.
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
    facts_path = folder / "training.json"
    facts = json.loads(facts_path.read_text(encoding="utf-8")) if facts_path.is_file() else {}
    scale = facts.get("image_latent_scale", args.image_latent_scale)
    if scale != args.image_latent_scale:
        raise UsageError(
            f"--init_transformer {args.init_transformer}: was trained with --image_latent_scale {scale}; give the same"
        )
    return config


def check_start_weights(args, folder: Path, config: dict) -> None:
    """UsageError unless the files hold every weight of the model, each of its shape: by their headers."""
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
    """A component's configuration with defaults filled in: versions of diffusers write more or fewer of them."""
    parameters = inspect.signature(model_class.__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(defaults | given))


def changed_settings(model_class: type, config) -> dict:
    """Settings that are not the class's defaults: the same for every version."""
    settings, defaults = all_settings(model_class, config), all_settings(model_class, {})
    return {name: value for name, value in settings.items() if name not in defaults or defaults[name] != value}


def hash_model_from_args(args, model_dir: Path, weights: Weights) -> dict[str, str]:
    """Of the weights that training starts from, and of what else of the model a run depends on.

    With prepared data that is settings alone. Names of files, folders and repositories do not count.
    """
    with Hashes() as hashes:
        config = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
        transformer, scheduler = hash_weights(*weights, hashes), load_scheduler(model_dir)
        settings = [(CogVideoXTransformer3DModel, config), (type(scheduler), scheduler.config)]
        others = [load_vae_config(model_dir), *(changed_settings(*each) for each in settings)]
        if not args.load_tensors:
            others += [hash_weights(model_dir / part, args.variant, hashes) for part in ("vae", "text_encoder")]
            others += [hashes.of(path, "sha256") for path in sorted((model_dir / "tokenizer").glob("*.model"))]
    return {"transformer": transformer, "others": hash_json(others)}


def hash_weights(folder: Path, variant: str | None, hashes: Hashes) -> str:
    """The SHA-256 of the one file of weights, or of those of several, whatever they are called."""
    paths = [path for path in files_that_load(folder, variant) if path.suffix in (".safetensors", ".bin")]
    each = sorted(hashes.of(path, "sha256") for path in paths)
    return each[0] if len(each) == 1 else hash_json(each)


def hash_json(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- facts of a configuration


def is_version_1_5(transformer_config) -> bool:
    """True for CogVideoX 1.5, which patches two latent frames into one token and was trained at 16 fps."""
    return transformer_config.get("patch_size_t") is not None


def default_fps(transformer_config) -> int:
    """Frames per second that the checkpoint was trained at: 8 (1.0) or 16 (1.5)."""
    return 16 if is_version_1_5(transformer_config) else 8


def describe_model(transformer_config) -> ModelFacts:
    """2b, the one without rotary positions, is under Apache-2.0; all others are under the CogVideoX LICENSE."""
    image_to_video = takes_image(transformer_config)
    return ModelFacts(
        pipeline=(IMAGE_TO_VIDEO_PIPELINE if image_to_video else TEXT_TO_VIDEO_PIPELINE).__name__,
        transformer=CogVideoXTransformer3DModel.__name__,
        image_to_video=image_to_video,
        apache_licence=not transformer_config.get("use_rotary_positional_embeddings", False),
        fps=default_fps(transformer_config),
    )


def takes_image(transformer_config) -> bool:
    """True for an image-to-video transformer, which takes image latents beside the video's."""
    return transformer_config["in_channels"] == 2 * transformer_config.get("out_channels", 16)


def text_length(transformer_config) -> int:
    """Text tokens that the checkpoint was trained with."""
    return transformer_config.get("max_text_seq_length", 226)


def text_shape(transformer_config) -> tuple[int, int]:
    """[S, D] of a prompt's embedding."""
    return text_length(transformer_config), transformer_config.get("text_embed_dim", 4096)


def check_task(model: str, transformer_config, image_to_video: bool) -> None:
    """Refuse a checkpoint of the other task."""
    has_image = takes_image(transformer_config)
    if has_image != image_to_video:
        names = {True: "an image-to-video", False: "a text-to-video"}
        raise UsageError(f"{model}: {names[has_image]} model, and this script trains {names[image_to_video]} model")


def num_parameters(transformer_config) -> float:
    """About how many parameters: 12 d^2 of attention and feed-forward, 6 x 2 x d x time_embed_dim of modulation."""
    width = transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
    per_block = 12 * width**2 + 12 * width * transformer_config.get("time_embed_dim", 512)
    return transformer_config["num_layers"] * per_block


class TransformerWithoutBlocks(CogVideoXTransformer3DModel):
    """Read without a word on the blocks' weights, which the files hold as well."""

    _keys_to_ignore_on_load_unexpected = [r"^transformer_blocks\."]


def load_transformer(
    model_dir: Path,
    dtype: torch.dtype,
    variant: str | None = None,
    drop_learned_positions: bool = False,
    load_blocks: Callable | None = None,
) -> CogVideoXTransformer3DModel:
    """The transformer in `dtype`, on the CPU, frozen; without 5b-I2V's learned positions if they are dropped.

    `model_dir`: a pipeline's folder, or the transformer's own.
    `load_blocks(blocks, prefix, files, dtype)` may fill the blocks, which then come without memory, by itself.
    """
    changes = {"use_learned_positional_embeddings": False} if drop_learned_positions else {}
    cls = CogVideoXTransformer3DModel
    if load_blocks is not None:
        cls, changes["num_layers"] = TransformerWithoutBlocks, 0
    folder = transformer_folder(model_dir)
    transformer = load_whole(cls, folder, dtype=dtype, variant=variant, **changes)
    if load_blocks is not None:
        transformer.__class__ = CogVideoXTransformer3DModel
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        blocks = empty_transformer(config).transformer_blocks
        load_blocks(blocks, "transformer_blocks.", weight_files(folder, variant), dtype)
        transformer.transformer_blocks = blocks
        transformer.register_to_config(num_layers=len(blocks), _class_name=type(transformer).__name__)
    return transformer.requires_grad_(False).eval()


def load_whole(model_class, folder: Path, dtype: torch.dtype, **options):
    """`model_class.from_pretrained`; UsageError where files lack weights, which libraries draw at random with a warning."""
    model, loading = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise UsageError(f"{folder}: lacks {min(loading['missing_keys'])}; download the model again")
    return model


def empty_transformer(transformer_config) -> CogVideoXTransformer3DModel:
    """The transformer without memory for its weights, to count and to name them."""
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(transformer_config)


class Outline(NamedTuple):
    """A model as far as its memory goes, before any weights are read."""

    transformer: CogVideoXTransformer3DModel  # without memory
    stored: torch.dtype
    shape_of: Callable  # (buckets, batch size) -> [B, S, heads, head_dim] of the largest batch
    fps: int
    image_to_video: bool
    scaling_factor: float | None = None


def outline_of(config, stored: torch.dtype) -> Outline:
    shape_of = functools.partial(attention_shape, config)
    return Outline(empty_transformer(config), stored, shape_of, default_fps(config), takes_image(config))


def read_outline_from_args(args, image_to_video: bool) -> Outline:
    """From the configurations alone: of a model on the hub no weights are fetched, and it counts as stored in bf16."""
    config, vae_config = read_configs_from_args(args, image_to_video)
    model_dir = resolve_model_dir(args.pretrained_model_name_or_path, CONFIGS, args.revision, args.cache_dir)
    weights = weights_from_args(args, model_dir)
    has_weights = any(weights.folder.glob("*.safetensors"))
    stored = stored_dtype(*weights) if has_weights else torch.bfloat16
    return outline_of(config, stored)._replace(scaling_factor=vae_config.scaling_factor)


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a model that diffusers saved, one or several."""
    single, index = folder / SAFETENSORS_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if variant:
        single, index = (path.with_suffix(f".{variant}{path.suffix}") for path in (single, index))
    if not index.exists():
        return [single]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def files_that_load(folder: Path, variant: str | None) -> list[Path]:
    """The files that decide what a VAE, a text encoder or a tokenizer computes: settings, and the weights of `variant`."""
    paths = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    weights = [path for path in paths if WEIGHT_NAME.search(path.name)]
    chosen = [path for path in weights if variant_of(path.name) == variant] or weights
    is_safe = any(path.suffix == ".safetensors" for path in chosen)  # which is then read alone
    chosen = [path for path in chosen if "safetensors" in path.name or not is_safe]
    return [path for path in paths if path not in weights and path.suffix in SETTINGS_SUFFIXES] + chosen


def variant_of(name: str) -> str | None:
    """`fp16` of model.fp16.safetensors, model.fp16-00001-of-00002.safetensors and model.safetensors.index.fp16.json."""
    parts = re.sub(r"-\d+-of-\d+", "", name).split(".")[1:]
    return next((part for part in parts if part not in ("safetensors", "bin", "index", "json")), None)


def check_buckets(transformer_config, buckets, drop_learned_positions: bool = False) -> None:
    """Refuse sizes that the transformer's learned positions (5b-I2V) do not fit; warn of frame counts that the
    pipelines do not give back. `buckets` are (frames, height, width) in pixels.
    """
    config = transformer_config
    learned = config.get("use_learned_positional_embeddings", False)
    if drop_learned_positions and not learned:
        raise UsageError("--drop_learned_positions: this checkpoint has no learned positions; leave it out")
    base = base_size(config)
    other = sorted({tuple(bucket) for bucket in buckets} - {base})
    if learned and not drop_learned_positions and other:
        raise UsageError(
            f"this checkpoint's learned positions fit {shape_text(base)} only, and the data holds "
            f"{', '.join(map(shape_text, other[:3]))}; prepare it at that size or pass --drop_learned_positions"
        )
    period = 2 * TEMPORAL_FACTOR * (config.get("patch_size_t") or 1)  # 8N+1 frames for 1.0, 16N+1 for 1.5
    odd = sorted({bucket[0] for bucket in buckets if bucket[0] % period != 1})
    if odd:
        logger.warning(
            "%s frames: this checkpoint was made for %dN+1; the pipeline renders other counts with some frames more",
            ", ".join(map(str, odd)),
            period,
        )


def check_sample_size(transformer_config, size, drop_learned_positions: bool = False) -> None:
    """Refuse a video `size` (frames, height, width in pixels) that the pipelines cannot render with this checkpoint."""
    config, base = transformer_config, base_size(transformer_config)
    unit = SPATIAL_FACTOR * config.get("patch_size", 2)
    reason = None
    if size[1] % unit or size[2] % unit:
        reason = f"height and width must be multiples of {unit}"
    elif config.get("use_learned_positional_embeddings", False) and not drop_learned_positions and size != base:
        reason = f"this checkpoint's learned positions fit {shape_text(base)} only"
    elif is_version_1_5(config) and (size[1] > base[1] or size[2] > base[2]):
        reason = f"this checkpoint has positions up to {base[1]}x{base[2]}"
    if reason:
        raise UsageError(
            f"validation videos of {shape_text(size)}: {reason}; choose another size by --max_num_frames, --height "
            "and --width"
        )


def base_size(transformer_config) -> tuple[int, int, int]:
    """(frames, height, width) in pixels that the checkpoint's position embeddings were made for."""
    config = transformer_config
    return config["sample_frames"], config["sample_height"] * SPATIAL_FACTOR, config["sample_width"] * SPATIAL_FACTOR


def shape_text(bucket) -> str:
    return f"{bucket[0]} frames of {bucket[1]}x{bucket[2]}"


def load_scheduler(model_dir: Path) -> CogVideoXDPMScheduler | CogVideoXDDIMScheduler:
    """The checkpoint's own noise schedule; its `alphas_cumprod` [1000] is in fp32 or fp64."""
    name = json.loads((model_dir / "model_index.json").read_text(encoding="utf-8"))["scheduler"][1]
    scheduler_class = CogVideoXDDIMScheduler if name == "CogVideoXDDIMScheduler" else CogVideoXDPMScheduler
    return scheduler_class.from_pretrained(model_dir, subfolder="scheduler")


def load_vae_config(model_dir: Path) -> VaeConfig:
    """Scaling of the latents, without the VAE's weights."""
    config = read_config(model_dir, "vae")
    return VaeConfig(config["scaling_factor"], config.get("invert_scale_latents", False))


def load_vae(
    model_dir: Path, dtype: torch.dtype, variant: str | None = None, slicing: bool = False, tiling: bool = False
) -> AutoencoderKLCogVideoX:
    """The frozen VAE in `dtype`, on the CPU."""
    vae = load_whole(AutoencoderKLCogVideoX, model_dir / "vae", dtype=dtype, variant=variant)
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    return vae.requires_grad_(False).eval()


def load_text_encoder(model_dir: Path, dtype: torch.dtype, variant: str | None = None):
    """(tokenizer, frozen T5 encoder in `dtype`), on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, subfolder="tokenizer")
    text_encoder = load_whole(T5EncoderModel, model_dir / "text_encoder", dtype=dtype, variant=variant)
    return tokenizer, text_encoder.requires_grad_(False).eval()


# ---------------------------------------------------------------- encoding


@torch.no_grad()
def encode_prompts(tokenizer, text_encoder, prompts: list[str], max_length: int = 226) -> torch.Tensor:
    """T5 embeddings [B, S, D] of `prompts` as the pipelines make them: cut or padded to S tokens, no attention mask."""
    tokens = tokenizer(prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


@torch.no_grad()
def encode_videos(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> torch.Tensor:
    """Moments [B, 2C, F, H, W] (mean and log-variance) of pixels [B, F', 3, h, w] in [-1, 1]."""
    pixels_BCFhw = pixels.to(vae.device, vae.dtype).permute(0, 2, 1, 3, 4)
    return vae.encode(pixels_BCFhw).latent_dist.parameters


@torch.no_grad()
def encode_images(
    vae: AutoencoderKLCogVideoX, images: torch.Tensor, noise: torch.Tensor, log_sigma: torch.Tensor
) -> torch.Tensor:
    """Moments [B, 2C, 1, H, W] of first frames [B, 3, h, w] in [-1, 1] under log-normal noise, added before the VAE.

    `noise` is standard normal like `images`; `log_sigma` [B] is drawn from N(-3, 0.5), as CogVideoX was trained
    (sat/diffusion_video.py of zai-org/CogVideo).
    """
    noisy_images = images + noise * log_sigma.exp().view(-1, 1, 1, 1)
    # One by one, as the pipelines do: a batch rounds differently (6e-6 in fp32)
    return torch.cat([encode_videos(vae, image[None, None]) for image in noisy_images])


def pixels_to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to fp32 in [-1, 1], the VAE's range; rounded as the pipelines' VideoProcessor rounds."""
    return 2.0 * (pixels.float() / 255.0) - 1.0


def encode_captions(
    model_dir: Path,
    prompts: list[str],
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    variant: str | None = None,
    level: str | None = None,
) -> Iterator[torch.Tensor]:
    """The embedding [S, D] of each prompt in turn, on the CPU. T5 is loaded, used and freed: it never trains beside
    the transformer (T5-XXL alone takes 9 GiB in bf16).

    At a `level` of memory that keeps things on the host T5 is streamed too.
    """
    if not prompts:
        return
    tokenizer, text_encoder = load_text_encoder(model_dir, dtype, variant)
    place_text_encoder(text_encoder, device, streamed=level in ("offload", "stream"))
    # One by one: a caption's neighbours would change the last bits of its embedding
    for prompt in tracked(prompts, "captions", delay=1):
        yield encode_prompts(tokenizer, text_encoder, [prompt], max_length)[0].cpu()
    del text_encoder
    free_memory(device)


def place_text_encoder(text_encoder, device: torch.device, streamed: bool = False) -> None:
    """T5 on `device`; if asked to, or where it does not fit, its blocks stay in page-locked host memory and come in turn.

    The same bits either way. Of T5-XXL that takes 1.4 GiB of the GPU, and one transfer of 8.6 GiB a caption.
    """
    if not streamed and not fits(text_encoder, device):
        logger.info("T5 does not fit into what is free on the GPU: its weights are streamed from host memory")
        streamed = True
    if streamed:
        stream_weights(text_encoder.encoder.block, device)  # one block at a time is in host memory twice
    text_encoder.to(device)


def free_memory(device: torch.device) -> None:
    """Give back what models held to which no name is left."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a ring of weights may still be filling up for a pass that never comes
    gc.collect()  # streamed blocks refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fits(model: torch.nn.Module, device: torch.device) -> bool:
    """True unless `device` is a GPU without room for the weights of `model`, and a GiB to compute with."""
    if device.type != "cuda":
        return True
    needed = sum(param.nbytes for param in model.parameters()) + 2**30
    return needed <= free_on_gpu(device)


# ---------------------------------------------------------------- latents


def latent_shape(moments: torch.Tensor) -> tuple[int, int, int, int]:
    """(F, C, H, W) of the latents that moments [B, 2C, F, H, W] give."""
    _, channels, frames, height, width = moments.shape
    return frames, channels // 2, height, width


def sample_latents(moments: torch.Tensor, noise: torch.Tensor, vae_config: VaeConfig) -> torch.Tensor:
    """Scaled fp32 latents [B, F, C, H, W] drawn from moments [B, 2C, F, H, W] with standard normal noise of the result's shape.

    Video latents are always times scaling_factor, also where invert_scale_latents is set: that concerns image
    latents alone (CogVideoXPipeline.decode_latents).
    """
    posterior = DiagonalGaussianDistribution(moments.float())
    latents_BFCHW = posterior.mean.transpose(1, 2) + posterior.std.transpose(1, 2) * noise
    return latents_BFCHW * vae_config.scaling_factor


def sample_image_latents(
    moments: torch.Tensor, noise: torch.Tensor, vae_config: VaeConfig, scale: str = "pipeline"
) -> torch.Tensor:
    """fp32 latents [B, 1, C, H, W] of first frames from their moments [B, 2C, 1, H, W].

    `scale`: "pipeline" as CogVideoXImageToVideoPipeline.prepare_latents does it, which for invert_scale_latents (1.5)
    is 1/scaling_factor; "raw" leaves them as the VAE gave them, as the SAT code of 1.5 did.
    """
    raw_latents = sample_latents(moments, noise, VaeConfig(1.0, False))
    if scale == "raw":
        return raw_latents
    inverted = vae_config.invert_scale_latents
    return raw_latents * (1 / vae_config.scaling_factor if inverted else vae_config.scaling_factor)


def condition_on_first_frame(latents: torch.Tensor, image_latents: torch.Tensor) -> torch.Tensor:
    """[B, F, 2C, H, W]: noisy padded latents beside the image's, which sit in the first frame, zeros in the others."""
    padding = image_latents.new_zeros(image_latents.shape[0], latents.shape[1] - 1, *image_latents.shape[2:])
    return torch.cat([latents, torch.cat([image_latents, padding], dim=1)], dim=2)


def ofs_input(transformer_config, latents: torch.Tensor) -> torch.Tensor | None:
    """The constant 2.0 [1] that 1.5's image-to-video model takes beside the timestep; None for all others."""
    return None if transformer_config.get("ofs_embed_dim") is None else latents.new_full((1,), 2.0)


def attention_shape(transformer_config, buckets, batch_size: int) -> tuple[int, int, int, int]:
    """[B, S, heads, head_dim] of attention for the largest of `buckets` (frames, height, width in pixels)."""
    config = transformer_config
    patch, patch_t = config.get("patch_size", 2) * SPATIAL_FACTOR, config.get("patch_size_t") or 1
    frames = {bucket: (bucket[0] - 1) // TEMPORAL_FACTOR + 1 for bucket in buckets}
    num_tokens = max(-(-frames[bucket] // patch_t) * (bucket[1] // patch) * (bucket[2] // patch) for bucket in frames)
    return batch_size, text_length(config) + num_tokens, config["num_attention_heads"], config["attention_head_dim"]


def pad_frames(latents: torch.Tensor, patch_size_t: int | None) -> torch.Tensor:
    """Latents [B, F, ...] with the first one repeated in front until F is a multiple of `patch_size_t` (1.5).

    The pipelines pad in front too and drop those latents before decoding.
    """
    missing = -latents.shape[1] % (patch_size_t or 1)
    return torch.cat([latents[:, :1]] * missing + [latents], dim=1) if missing else latents


def rotary_embeddings(transformer_config, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(cos, sin) [F/p_t x H/p x W/p, head_dim] in fp32 for padded latents [B, F, C, H, W]; None without RoPE (2b)."""
    config = transformer_config
    if not config.use_rotary_positional_embeddings:
        return None
    num_frames, _, height, width = latents.shape[1:]
    grid = (height // config.patch_size, width // config.patch_size)
    base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    return rotary_grid(config.attention_head_dim, config.patch_size_t, num_frames, grid, base, latents.device)


@functools.lru_cache(maxsize=64)  # one entry per bucket: rebuilding it costs some 20 ms a step
def rotary_grid(
    head_dim: int,
    patch_size_t: int | None,
    num_frames: int,
    grid: tuple[int, int],
    base: tuple[int, int],
    device: torch.device,
):
    """As CogVideoXPipeline._prepare_rotary_positional_embeddings: 1.0 stretches the base grid over other sizes,
    1.5 cuts a slice of it. Grids are (height, width) in patches.
    """
    if patch_size_t is None:
        crops = get_resize_crop_region_for_grid(grid, base[1], base[0])
        return get_3d_rotary_pos_embed(head_dim, crops, grid, num_frames, device=device)
    return get_3d_rotary_pos_embed(
        head_dim,
        crops_coords=None,
        grid_size=grid,
        temporal_size=-(-num_frames // patch_size_t),
        grid_type="slice",
        max_size=base,
        device=device,
    )


# ---------------------------------------------------------------- sampling


def make_pipeline(pipeline_class, vae, scheduler, image_latent_scale: str, transformer) -> DiffusionPipeline:
    """The stock pipeline around models that exist already, for prompts given as embeddings: it gets no T5.

    The schedule is a new one of the checkpoint's class and configuration: sampling changes its state.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    pipe = pipeline_class(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    if image_latent_scale == "raw":
        use_raw_image_latents(pipe)
    return pipe


def use_raw_image_latents(pipe) -> None:
    """Feed the first frame's latents as the VAE gives them; the pipeline's factor stays for decoding."""
    prepare_latents, factor = pipe.prepare_latents, pipe.vae_scaling_factor_image

    def prepare_raw(*positional, **named):
        pipe.vae_scaling_factor_image = 1.0
        try:
            return prepare_latents(*positional, **named)
        finally:
            pipe.vae_scaling_factor_image = factor

    pipe.prepare_latents = prepare_raw
