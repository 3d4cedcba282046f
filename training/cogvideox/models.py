"""The model of a run, described by its files: the configs first, before any weights are read."""

from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel, DiffusionPipeline

from cogvideox.config import (
    CONFIGS,
    IMAGE_TO_VIDEO_PIPELINE,
    TEXT_TO_VIDEO_PIPELINE,
    VaeConfig,
    WeightFiles,
    attention_shape,
    check_sample_size,
    check_sizes,
    check_task,
    default_fps,
    empty_transformer,
    load_scheduler,
    load_vae_config,
    num_parameters,
    read_config,
    takes_image,
    text_shape,
)
from cogvideox.folder import (
    hash_model_from_args,
    read_start_config_from_args,
    resolve_model_dir,
    stored_dtype,
    weights_from_args,
    widest_dtype,
)
from cogvideox.pipeline import make_pipeline


class Model(NamedTuple):
    """A CogVideoX model on disk, or on the hub until `fetch_from_args`."""

    folder: Path
    config: dict  # the transformer's
    vae_config: VaeConfig
    weights: WeightFiles  # of the transformer that training starts from

    @property
    def fps(self) -> int:
        """Frames per second that the checkpoint was trained at."""
        return default_fps(self.config)

    @property
    def patch_size_t(self) -> int | None:
        """Latent frames per token (1.5); None for 1.0, where it is one."""
        return self.config.get("patch_size_t")

    @property
    def image_to_video(self) -> bool:
        return takes_image(self.config)

    @property
    def pipeline_class(self) -> type:
        return IMAGE_TO_VIDEO_PIPELINE if self.image_to_video else TEXT_TO_VIDEO_PIPELINE

    @property
    def transformer_class(self) -> type:
        return CogVideoXTransformer3DModel

    @property
    def has_apache_licence(self) -> bool:
        """True for 2b, the only one without rotary positions; all others are under the CogVideoX LICENSE."""
        return not self.config.get("use_rotary_positional_embeddings", False)

    @property
    def num_parameters(self) -> float:
        return num_parameters(self.config)

    @property
    def text_shape(self) -> tuple[int, int]:
        """[S, D] of a prompt embedding."""
        return text_shape(self.config)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the weights on disk; they must have been fetched."""
        return stored_dtype(*self.weights)

    def loading_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The smallest dtype that holds every stored weight as it is, for masters; fp32 for compute in that `dtype`."""
        return torch.float32 if dtype == torch.float32 else widest_dtype(*self.weights)

    @property
    def has_weights(self) -> bool:
        """False if only the configs were fetched from the hub."""
        return any(self.weights.folder.glob("*.safetensors"))

    def empty_transformer(self) -> CogVideoXTransformer3DModel:
        """The transformer on the meta device, to count and name its weights without allocating them."""
        return empty_transformer(self.config)

    def load_scheduler(self) -> CogVideoXDPMScheduler | CogVideoXDDIMScheduler:
        """The checkpoint's own noise schedule; its `alphas_cumprod` [1000] is in fp32 or fp64."""
        return load_scheduler(self.folder)

    def make_pipeline(self, vae, image_latent_scale: str, transformer) -> DiffusionPipeline:
        """The stock pipeline around these two, for prompts given as embeddings."""
        return make_pipeline(self, vae, self.load_scheduler(), image_latent_scale, transformer)

    def hash_from_args(self, args) -> dict[str, str]:
        """Hashes of the weights that training starts from, and of everything else in the model that the run depends on."""
        return hash_model_from_args(args, self.folder, self.weights)

    def attention_shape(self, buckets, batch_size: int) -> tuple[int, int, int, int]:
        """[B, S, heads, head_dim] of attention for the largest of `buckets` (frames, height, width in pixels)."""
        return attention_shape(self.config, buckets, batch_size)


def open_from_args(args, image_to_video: bool) -> Model:
    """The model by its configs, fetched alone: gigabytes follow once the task fits and the data can be read."""
    name = args.pretrained_model_name_or_path
    folder = resolve_model_dir(name, CONFIGS, args.revision, args.cache_dir)
    config = read_config(folder, "transformer")
    check_task(name, config, image_to_video)
    if args.init_transformer is not None:
        config = read_start_config_from_args(args, config)
    return Model(folder, config, load_vae_config(folder), weights_from_args(args, folder))


def check_sizes_from_args(args, model: Model, clips, validation_set) -> None:
    """Refuse clips and validation videos of sizes that the model cannot take; warn of unusual frame counts."""
    buckets = clips.clip_buckets + validation_set.held_out.clip_buckets
    check_sizes(model.config, buckets, args.drop_learned_positions)
    if validation_set.prompts:
        check_sample_size(model.config, validation_set.size, args.drop_learned_positions)


def fetch_from_args(args, model: Model, with_encoders: bool) -> Model:
    """The same model, with all files that the run needs in its folder.

    If nothing is encoded, only the VAE's config is fetched; with --init_transformer, only the transformer's.
    """
    encoders = ["vae", "text_encoder", "tokenizer"] if with_encoders else ["vae/config.json"]
    transformer = "transformer" if args.init_transformer is None else "transformer/config.json"
    components = [transformer, "scheduler", *encoders]
    folder = resolve_model_dir(args.pretrained_model_name_or_path, components, args.revision, args.cache_dir)
    return model._replace(folder=folder, weights=weights_from_args(args, folder))
