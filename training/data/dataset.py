"""Builds the dataset from the flags."""

import logging
import math

from torch.utils.data import Dataset

from data import read_ahead
from data.buckets import Bucket, make_buckets
from data.clip_lists import Clip, read_clips_from_args, with_id_token
from data.histogram import log_buckets
from data.latents import LatentDataset
from data.videos import VideoDataset, VideoDatasetWithResizeAndRectangleCrop


logger = logging.getLogger(__name__)


def build_dataset_from_args(args, model, seed: int, as_listed: bool = False) -> Dataset:
    """The training dataset: videos, or prepared latents with --load_tensors; captions include the id token.
    `as_listed`: every clip once and whole, without --windows and repeats.

    Read from `model`: its task, its frame rate, and the VAE's scaling factor, to detect latents of another model.
    """
    if args.load_tensors:
        given = {"frame_buckets", "height_buckets", "width_buckets"} & set(args.given)
        latents = LatentDataset(
            args.data_root,
            buckets=chosen_buckets(args) if given else None,
            caption_column=args.caption_column or "prompts.txt",
            video_column=args.video_column or "videos.txt",
            seed=seed,
            id_token=args.id_token,
            text_dropout=args.text_dropout > 0,
            scaling_factor=model.vae_config.scaling_factor,
            allow_outside=args.allow_outside_root,
            with_images=model.image_to_video,
        )
        if model.image_to_video:
            latents.require_image_latents()
        if not as_listed:
            latents.repeat(args.repeats)
        return latents
    clips = read_clips_from_args(args)
    if args.id_token:
        clips = [clip._replace(prompt=with_id_token(clip.prompt, args.id_token)) for clip in clips]
    videos = make_videos(
        args,
        clips,
        fps=choose_fps("--fps", args.fps if "fps" in args.given else None, model.fps),
        seed=seed,
        skip_frames_start=args.skip_frames_start,
        skip_frames_end=args.skip_frames_end,
        with_images=not model.image_to_video,
    )
    if not as_listed:
        cut_into_windows(args, videos)
        videos.repeat()
    return videos


def build_videos_from_args(args, default_fps: float) -> VideoDataset:
    """The dataset for prepare_dataset.py: captions as written; bad clips are left out and listed in `problems`."""
    return tolerant_videos_from_args(args, read_clips_from_args(args), default_fps)


def tolerant_videos_from_args(args, clips: list[Clip], default_fps: float) -> VideoDataset:
    fps = choose_fps("--target_fps", args.target_fps if "target_fps" in args.given else None, default_fps)
    videos = make_videos(
        args, clips, fps=fps, seed=args.seed, num_threads=args.num_decode_threads, on_problem="collect",
        fps_flag="--target_fps", use_cache=not args.verify,
    )  # fmt: skip
    cut_into_windows(args, videos)
    return videos


def make_videos(args, clips: list[Clip], **options) -> VideoDataset:
    options |= {
        "random_flip": args.random_flip,
        "max_num_frames": args.max_num_frames,
        "video_backend": args.video_backend,
    }
    read_ahead.finish()
    if args.video_reshape_mode == "none":
        videos = VideoDataset(clips, chosen_buckets(args), **options)
    else:
        crop = args.video_reshape_mode or "center"
        videos = VideoDatasetWithResizeAndRectangleCrop(clips, chosen_buckets(args), crop=crop, **options)
    log_buckets(videos, args.dataset_file or args.data_root)
    return videos


def cut_into_windows(args, videos: VideoDataset) -> None:
    if args.windows is None:
        return
    num_clips = len(videos)
    videos.cut(math.inf if args.windows == "all" else args.windows)
    logger.info("--windows %s: %d clips are cut into %d windows", args.windows, num_clips, len(videos))


def chosen_buckets(args) -> list[Bucket]:
    return make_buckets(args.frame_buckets, args.height_buckets, args.width_buckets)


def choose_fps(flag: str, given: int | None, default_fps: float) -> float:
    """The flag's value if given, else the rate that the checkpoint was trained at."""
    if given is None:
        logger.info(
            "clips are sampled at %g frames per second (this checkpoint's rate; %s changes it)", default_fps, flag
        )
        return default_fps
    if given != default_fps:
        logger.warning("%s %d: this checkpoint was made for %g", flag, given, default_fps)
    return given
