"""Every flag of the scripts, and the checks that need nothing but the flags.

Standard library only: `--help` and a mistyped flag answer before torch is imported.
"""

import argparse
import sys

from base.flag_checks import (
    BASE_PRECISIONS,
    LR_SCHEDULERS,
    MEMORY_LEVELS,
    SIZES,
    at_least,
    below_one,
    check_buckets,
    check_captioning,
    check_data_source,
    check_export,
    check_lora,
    check_max_num_frames,
    check_memory,
    check_optimizer,
    check_reshape_mode,
    check_trackers,
    check_validation,
    not_negative,
    number_or_all,
    positive,
    probability,
    refuse_meaningless,
    share,
    warn_of_idle,
)
from base.flag_parser import SCRIPTS, FlagParser


# ---------------------------------------------------------------- entry points


def parse_training_args(script: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of training script `script` (a key of SCRIPTS), checked; a mistake exits with code 2."""
    parser = make_training_parser(script)
    args = parser.parse_flags(argv)
    if argv is None:
        hide_token(sys.argv)
        hide_token(sys.orig_argv)
    refuse_meaningless(parser, args, script)
    if args.lr_scheduler not in LR_SCHEDULERS:
        parser.error(f"--lr_scheduler {args.lr_scheduler}: must be one of {', '.join(LR_SCHEDULERS)}")
    check_reshape_mode(parser, args)
    check_lora(parser, args)
    check_optimizer(parser, args)
    check_memory(parser, args, script)
    check_export(parser, args)
    check_validation(parser, args)
    check_trackers(parser, args)
    check_data_source(parser, args)
    check_buckets(parser, args)
    # Prepared clips carry their own frame count.
    if not args.load_tensors:
        check_max_num_frames(parser, args)
    warn_of_idle(parser, args)
    if args.hub_token is not None:
        parser.say(
            "warning",
            "--hub_token can be read by every user of this machine while the run lasts; it is written nowhere. "
            "Set HF_TOKEN or run `hf auth login` instead",
        )
    return args


def hide_token(words: list[str]):
    """Overwrite the value of --hub_token in a command line: trackers write down the one that started the process."""
    for index, word in enumerate(words):
        if word == "--hub_token" and index + 1 < len(words):
            words[index + 1] = "hidden"
        elif word.startswith("--hub_token="):
            words[index] = "--hub_token=hidden"


def parse_prepare_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of prepare_dataset.py, checked; a mistake exits with code 2."""
    parser = make_prepare_parser()
    args = parser.parse_flags(argv)
    check_reshape_mode(parser, args)
    check_buckets(parser, args)
    check_max_num_frames(parser, args)
    if args.save_image_latents and not args.save_latents_and_embeddings:
        parser.error("--save_image_latents needs --save_latents_and_embeddings: give both or neither")
    if parser.is_used(args, "num_image_variants") and not args.save_image_latents:
        parser.error("--num_image_variants needs --save_image_latents: give both or neither")
    return args


def parse_caption_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of caption_dataset.py, checked; a mistake exits with code 2."""
    parser = make_caption_parser()
    args = parser.parse_flags(argv)
    check_captioning(parser, args)
    return args


# ---------------------------------------------------------------- parsers
# The first line of a help text is for --help: meaning and unit, in about 48 characters if possible. It may end with
# "(default: ...)", what applies without the flag; otherwise the parsed default is shown. The second line, in whole
# sentences, is only for assets/flags.md.


def make_training_parser(script: str) -> FlagParser:
    """The parser of one training script; all four have the same flags."""
    parser = FlagParser(SCRIPTS[script], script)
    add_model_flags(parser)
    add_lora_flags(parser)
    add_training_data_flags(parser)
    add_bucket_flags(parser)
    add_training_flags(parser)
    add_optimizer_flags(parser)
    add_output_flags(parser)
    add_validation_flags(parser)
    add_memory_flags(parser)
    add_tracking_flags(parser)
    return parser


def make_prepare_parser() -> FlagParser:
    """The parser of prepare_dataset.py."""
    parser = FlagParser("prepare_dataset.py", "prepare")
    add_prepare_model_flags(parser)
    add_prepare_data_flags(parser)
    add_prepare_bucket_flags(parser)
    add_prepare_output_flags(parser)
    add_prepare_memory_flags(parser)
    return parser


def make_caption_parser() -> FlagParser:
    """The parser of caption_dataset.py."""
    parser = FlagParser("caption_dataset.py", "caption")
    add_caption_data_flags(parser)
    add_caption_server_flags(parser)
    add_caption_question_flags(parser)
    add_caption_length_flags(parser)
    add_caption_output_flags(parser)
    return parser


# ---------------------------------------------------------------- flags of both


def add_revision_flag(group):
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the model on the hub")


def add_cache_dir_flag(group):
    group.add_argument("--cache_dir", metavar="FOLDER", help="folder for downloads (default: the hub's cache)")


def add_download_flags(group):
    add_revision_flag(group)
    group.add_argument(
        "--variant", metavar="NAME", help="variant of the weight files, such as fp16\nfp16 is *.fp16.safetensors."
    )
    add_cache_dir_flag(group)
    group.add_argument(
        "--allow_cpu",
        action="store_true",
        help="run a model of real size on a CPU, very slowly\nWithout the flag, that is refused.",
    )


def add_listing_flags(group):
    group.add_argument(
        "--dataset_file",
        metavar="FILE",
        help="CSV, JSON list or JSON Lines of the clips (default: found in --data_root)\n--video_column and "
        "--caption_column name its columns; without them, the usual names are looked for.",
    )
    group.add_argument(
        "--video_column",
        metavar="NAME",
        help="column of the paths, or text file of them (default: found by its name)\nThe text file is in --data_root "
        "and has one path per line.",
    )
    group.add_argument(
        "--caption_column",
        metavar="NAME",
        help="column of the captions, or text file of them (default: found by its name)\nThe text file is in "
        "--data_root and has one caption per line. .txt or .caption: captions are beside the videos, in files of that "
        "kind.",
    )


def add_outside_flag(group):
    group.add_argument(
        "--allow_outside_root",
        action="store_true",
        help="read files outside the data folder too\nThat is, through .., absolute paths or links.",
    )


def add_clip_list_flags(group):
    add_listing_flags(group)
    group.add_argument(
        "--repeats",
        type=at_least(1),
        metavar="N",
        default=1,
        help="times that a clip is used per epoch\nA column called repeats or num_repeats sets it for each clip.",
    )
    add_outside_flag(group)
    group.add_argument(
        "--id_token", metavar="TOKEN", help="text put in front of every caption\nA space separates the two."
    )


def add_reading_flags(group):
    group.add_argument(
        "--windows",
        type=number_or_all,
        metavar="N",
        help="cut long clips into up to N windows, or all (default: one, at a random place)\nThe windows are as long as "
        "the clip's bucket and do not overlap; fewer than fit are spread over the clip. Each is a sample of its own.",
    )
    group.add_argument(
        "--random_flip",
        type=probability,
        metavar="P",
        help="probability that a clip is mirrored (default: 0)\nAll its frames are mirrored left to right; "
        "captions are not changed.",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=at_least(0),
        metavar="N",
        default=0,
        help="processes that read data, per GPU\nWith 0, the main process reads.",
    )
    group.add_argument("--pin_memory", action="store_true", help="pinned host memory: faster copies to the GPU")
    group.add_argument(
        "--video_backend",
        choices=["auto", "decord", "pyav"],
        default="auto",
        help="video decoder; auto is pyav\npyav was faster on real clips and reports damaged frames.",
    )


def add_size_flags(group):
    group.add_argument(
        "--height_buckets",
        type=int,
        nargs="+",
        metavar="PIXELS",
        default=list(SIZES),
        help="heights, multiples of 16; a clip takes the size nearest in aspect, then in area",
    )
    group.add_argument(
        "--width_buckets",
        type=int,
        nargs="+",
        metavar="PIXELS",
        default=list(SIZES),
        help="widths, multiples of 16 (default: the same)",
    )
    group.add_argument(
        "--frame_buckets",
        type=int,
        nargs="+",
        metavar="FRAMES",
        default=[49],
        help="frame counts, 4k+1\n4k is accepted with a warning.",
    )
    group.add_argument(
        "--max_num_frames",
        type=at_least(1),
        metavar="FRAMES",
        default=49,
        help="maximum frames of a clip\nLarger frame buckets stay empty.",
    )
    group.add_argument(
        "--video_reshape_mode",
        metavar="MODE",
        help="crop at the center or at random; with none, clips have their bucket's size already (default: "
        "center)\nBoth crops scale a clip to cover its bucket and keep its aspect; random draws a position per "
        "clip.",
    )


FPS_HELP = (
    "sampled frames per second (default: 8; CogVideoX 1.5: 16)\nClips are sampled by time, whatever their own "
    "frame rate."
)


# ---------------------------------------------------------------- flags of the training scripts


def add_model_flags(parser: FlagParser):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help="model to train, required: a hub id, zai-org/... or THUDM/..., or a local diffusers folder",
    )
    group.add_argument(
        "--init_transformer",
        metavar="FOLDER",
        help="an earlier full fine-tuning to start from\nGive its output folder, a checkpoint of it, or the "
        "transformer folder there. It must be of the same kind and size as MODEL, whose other parts are used.",
    )
    group.add_argument(
        "--config",
        metavar="args.json",
        help="flags and seed of a run; those given here win\nGive the run's args.json.",
    )
    add_download_flags(group)


def add_lora_flags(parser: FlagParser):
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--rank", type=at_least(1), metavar="N", default=64, help="rank of the LoRA\nIts size grows with it."
    )
    group.add_argument(
        "--lora_alpha",
        type=at_least(1),
        metavar="N",
        default=64,
        help="output is scaled by lora_alpha / rank\nThe saved weights are already scaled.",
    )
    group.add_argument(
        "--lora_target_modules",
        nargs="+",
        metavar="NAME",
        default=["to_q", "to_k", "to_v", "to_out.0"],
        help="linear layers that get a LoRA, by the end of their names\nff.net.0.proj and ff.net.2 are the "
        "feed-forward layers.",
    )
    group.add_argument(
        "--use_dora",
        action="store_true",
        help="DoRA (arXiv 2402.09353): slower, more memory\nThe norm of every weight row is trained beside the LoRA.",
    )
    group.add_argument(
        "--use_rslora",
        action="store_true",
        help="scale by alpha / sqrt(rank) (arXiv 2312.03732)\nHigh ranks keep their strength.",
    )
    group.add_argument(
        "--lora_init",
        metavar="SCHEME",
        default="default",
        help="initialization: default, gaussian or orthogonal\nThe LoRA has no effect at first with any of them. "
        "default is Kaiming uniform; orthogonal needs an even rank. Schemes of peft that also change the base "
        "weights (pissa, olora, ...) are refused: their file fits no other base.",
    )
    group.add_argument(
        "--init_lora",
        metavar="FILE",
        help="start from this LoRA of the same rank and layers\nGive a file or the folder of a run, also in the "
        "layout of peft, kohya or ComfyUI. Rank, alpha, layers and kind must be the same.",
    )
    group.add_argument(
        "--export",
        nargs="+",
        choices=["comfyui", "kohya", "merged"],
        default=[],
        help="also write it for ComfyUI, for readers of kohya's layout, or merged into the transformer\ncomfyui "
        "is pytorch_lora_weights_comfyui.safetensors, in the key layout of ComfyUI's own CogVideoX; kohya is "
        "pytorch_lora_weights_kohya.safetensors, for VideoX-Fun; merged is transformer/, the base model with "
        "the LoRA added to its weights.",
    )


def add_training_data_flags(parser: FlagParser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root",
        metavar="FOLDER",
        help="folder of videos, images and captions, or with --load_tensors of prepared data\nprepare_dataset.py "
        "writes the latter. Required, unless there is a --dataset_file. An image (png, jpg, webp) is a clip of one "
        "frame; image-to-video leaves it out.",
    )
    add_clip_list_flags(group)
    group.add_argument(
        "--load_tensors",
        action="store_true",
        help="train on prepared data, without the VAE and T5\nThese are the moments and prompt embeddings that "
        "prepare_dataset.py makes.",
    )
    add_reading_flags(group)


def add_bucket_flags(parser: FlagParser):
    group = parser.add_argument_group("sizes of raw videos (prepared data keeps its own)")
    add_size_flags(group)
    group.add_argument("--fps", type=at_least(1), metavar="N", default=8, help=FPS_HELP)
    group.add_argument(
        "--skip_frames_start", type=at_least(0), metavar="N", default=0, help="frames skipped at the start of a file"
    )
    group.add_argument(
        "--skip_frames_end", type=at_least(0), metavar="N", default=0, help="frames skipped at the end of a file"
    )


def add_training_flags(parser: FlagParser):
    group = parser.add_argument_group("training")
    group.add_argument(
        "--seed",
        type=at_least(0),
        metavar="N",
        help="seed of all random draws (default: drawn, kept in args.json)\nDraws depend on a sample's position in "
        "the run, so the number of workers and processes changes only rounding.",
    )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="compute precision; no is fp32 (default: the launcher's, else bf16 on a GPU and no on a CPU)\nFrozen "
        "weights have it too; trained ones are in fp32. fp16 scales the loss, and needs a GPU and a checkpoint not "
        "stored in bf16, such as CogVideoX-2b.",
    )
    group.add_argument(
        "--train_batch_size", type=at_least(1), metavar="CLIPS", default=4, help="clips per batch, on each GPU"
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=at_least(1),
        metavar="N",
        default=1,
        help="batches per update, on each GPU",
    )
    group.add_argument(
        "--num_train_epochs",
        type=at_least(1),
        metavar="N",
        default=1,
        help="passes over the data if no --max_train_steps",
    )
    group.add_argument(
        "--max_train_steps", type=at_least(1), metavar="N", help="optimizer updates (default: by --num_train_epochs)"
    )
    group.add_argument(
        "--nccl_timeout",
        type=at_least(1),
        metavar="SECONDS",
        default=600,
        help="how long processes wait for each other\nAfter that, the run is aborted.",
    )
    add_conditioning_flags(group)


def add_conditioning_flags(group):
    group.add_argument(
        "--text_dropout",
        type=probability,
        metavar="P",
        default=0.0,
        help="probability of an empty caption, per sample\nClassifier-free guidance relies on such samples.",
    )
    group.add_argument(
        "--noised_image_dropout",
        type=probability,
        metavar="P",
        default=0.05,
        help="probability of no first frame, per sample",
    )
    group.add_argument(
        "--stratified_timesteps",
        action="store_true",
        help="spread timesteps in each update: less noisy loss\nThey cover the noise levels evenly; the mean loss "
        "is unchanged.",
    )
    group.add_argument(
        "--image_latent_scale",
        choices=["pipeline", "raw"],
        default="pipeline",
        help="scale of the first frame's latents; raw needs changes at inference\npipeline is what diffusers feeds "
        "the model, raw is the VAE's own; the result records it.",
    )
    group.add_argument(
        "--drop_learned_positions",
        action="store_true",
        help="train CogVideoX-5b-I2V at sizes other than 49 frames of 480x720; inference must drop them too\nThe "
        "result records it.",
    )


def add_optimizer_flags(parser: FlagParser):
    group = parser.add_argument_group("optimizer and learning rate")
    add_lr_flags(group)
    group.add_argument(
        "--optimizer",
        type=str.lower,
        choices=["adam", "adamw", "prodigy", "came"],
        default="adam",
        help="prodigy needs --learning_rate 1\nprodigy (arXiv 2306.06101) estimates the step size; came (arXiv "
        "2307.02047) keeps factored states.",
    )
    group.add_argument("--beta1", type=below_one, metavar="DECAY", default=0.9, help="decay of the gradient's mean")
    group.add_argument(
        "--beta2", type=below_one, metavar="DECAY", default=0.95, help="decay of the mean of its square"
    )
    group.add_argument(
        "--beta3",
        type=below_one,
        metavar="DECAY",
        help="third decay (default: sqrt(beta2); came: 0.9999)\nIt is for prodigy's step size estimate, or for "
        "came's confidence.",
    )
    group.add_argument(
        "--weight_decay",
        type=not_negative,
        metavar="X",
        default=1e-4,
        help="weight decay (adamw), L2 term (adam)\nadamw applies it to the weights themselves, adam adds it to "
        "the gradient.",
    )
    group.add_argument(
        "--epsilon",
        type=positive,
        metavar="X",
        default=1e-8,
        help="added to the denominator of the step\ncame has two of its own.",
    )
    group.add_argument(
        "--max_grad_norm",
        type=positive,
        metavar="NORM",
        default=1.0,
        help="gradients are clipped to this L2 norm\nThe norm is over all trained weights and processes.",
    )
    group.add_argument(
        "--max_bad_steps",
        type=at_least(1),
        metavar="N",
        default=5,
        help="updates with NaN or infinity are skipped; this many in a row end the run\nThe exit code is 70. Loss "
        "and gradient of every update are checked.",
    )
    add_state_flags(group)


def add_state_flags(group):
    group.add_argument(
        "--use_8bit",
        action="store_true",
        help="adam, adamw: 8-bit states, by bitsandbytes\nTensors under 4,096 elements stay in fp32.",
    )
    group.add_argument("--use_4bit", action="store_true", help="adam, adamw: 4-bit states, by torchao")
    group.add_argument("--use_fp8", action="store_true", help="adam, adamw: fp8 states, by torchao; Ada or newer")
    group.add_argument("--use_torchao", action="store_true", help="--use_8bit by torchao")
    group.add_argument("--prodigy_decouple", action="store_true", help="weight decay of prodigy as in AdamW")
    group.add_argument("--prodigy_use_bias_correction", action="store_true", help="Adam's bias correction in prodigy")
    group.add_argument(
        "--prodigy_safeguard_warmup",
        action="store_true",
        help="prodigy's step size ignores the warm-up",
    )


def add_lr_flags(group):
    group.add_argument("--learning_rate", type=positive, metavar="LR", default=1e-4, help="peak learning rate")
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="multiply --learning_rate by the clips per update\nThat is batch size x accumulation x processes.",
    )
    group.add_argument("--lr_scheduler", metavar="NAME", default="constant", help=", ".join(LR_SCHEDULERS))
    group.add_argument(
        "--lr_warmup_steps",
        type=at_least(0),
        metavar="N",
        default=500,
        help="warm-up updates; none with constant\nThe warm-up is linear from 0; constant_with_warmup has it.",
    )
    group.add_argument(
        "--lr_num_cycles", type=at_least(1), metavar="N", default=1, help="cycles of cosine_with_restarts"
    )
    group.add_argument("--lr_power", type=positive, metavar="X", default=1.0, help="exponent of polynomial")


def add_output_flags(parser: FlagParser):
    group = parser.add_argument_group("output and checkpoints")
    group.add_argument(
        "--output_dir",
        metavar="FOLDER",
        default="cogvideox-sft",
        help="folder of the result; a run of the same flags there is continued\nIt holds checkpoints, args.json, "
        "metrics.jsonl and status.json too.",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="move what is in --output_dir aside, start over\nWithout the flag, the run is continued or refused.",
    )
    group.add_argument(
        "--save_dtype",
        choices=["fp32", "fp16", "bf16"],
        help="dtype of the saved transformer (default: as stored)",
    )
    group.add_argument(
        "--ema",
        action="store_true",
        help="validate and save a moving average of the weights\nIt is updated with every step and kept in fp32.",
    )
    group.add_argument(
        "--ema_decay",
        type=below_one,
        metavar="DECAY",
        default=0.9999,
        help="weight of the old average, in every update\nThe new weights get the rest.",
    )
    group.add_argument(
        "--checkpointing_steps",
        type=at_least(1),
        metavar="N",
        default=500,
        help="updates between checkpoints\nEach is a folder checkpoint-<step> of --output_dir.",
    )
    group.add_argument(
        "--checkpoints_total_limit",
        type=at_least(1),
        metavar="N",
        help="newest checkpoints to keep (default: all)\nThe oldest is removed once a newer one is written.",
    )
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="PATH",
        help="a checkpoint to resume from, or latest\nlatest is the newest of --output_dir; without any, the run "
        "starts at step 0.",
    )


def add_validation_flags(parser: FlagParser):
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_prompt",
        metavar="TEXT",
        help="prompts to render before, during and after training, with ::: between them\nThey are rendered at "
        "every validation as well as before the first step and after the last.",
    )
    group.add_argument(
        "--validation_images",
        metavar="PATHS",
        help="first frames, files or URLs, with ::: between them\nGive one per prompt.",
    )
    group.add_argument(
        "--validation_prompt_separator", metavar="TEXT", default=":::", help="text between prompts, and between images"
    )
    group.add_argument("--num_validation_videos", type=at_least(1), metavar="N", default=1, help="videos per prompt")
    group.add_argument(
        "--validation_epochs", type=at_least(1), metavar="N", default=50, help="epochs between validations"
    )
    group.add_argument(
        "--validation_steps", type=at_least(1), metavar="N", help="updates between validations, in place of epochs"
    )
    group.add_argument(
        "--no_first_validation",
        action="store_true",
        help="no validation before the first update\nRuns of one sweep would all render the same untrained model.",
    )
    group.add_argument(
        "--validation_data_root",
        metavar="FOLDER",
        help="held-out clips, whose loss is logged\nThey are laid out like --data_root (with --dataset_file, a CSV "
        "of that name in the folder). Noise and timesteps are fixed.",
    )
    group.add_argument(
        "--validation_num_clips", type=at_least(1), metavar="N", default=8, help="held-out clips used, the first ones"
    )
    add_sampling_flags(group)


OF_BUCKET = "(default: of the bucket with most clips)"


def add_sampling_flags(group):
    group.add_argument(
        "--height", type=at_least(1), metavar="PIXELS", default=480, help=f"height of videos {OF_BUCKET}"
    )
    group.add_argument("--width", type=at_least(1), metavar="PIXELS", default=720, help=f"width of videos {OF_BUCKET}")
    group.add_argument("--num_inference_steps", type=at_least(1), metavar="N", default=50, help="denoising steps")
    group.add_argument(
        "--guidance_scale", type=not_negative, metavar="SCALE", default=6, help="classifier-free guidance; 1 is none"
    )
    group.add_argument("--use_dynamic_cfg", action="store_true", help="guidance rises from 1 while denoising")
    group.add_argument("--enable_model_cpu_offload", action="store_true", help="one model at a time on the GPU")
    group.add_argument(
        "--validation_attention",
        choices=["default", "sage"],
        default="default",
        help="sage: SageAttention\nIt must be installed; it has no backward pass and never trains.",
    )


def add_memory_flags(parser: FlagParser):
    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--memory",
        choices=MEMORY_LEVELS,
        help="what is kept for the backward pass: auto is the fastest level that fits, plan prints what each "
        "needs, see assets/training.md (default: by --gradient_checkpointing)\nspeed keeps all of it on the "
        "GPU; balanced recomputes blocks but keeps the attention's output; offload is balanced with that in "
        "host memory, in full fine-tuning the optimizer states and gradients too; stream has the blocks' weights there, "
        "too.",
    )
    group.add_argument(
        "--host_memory",
        type=positive,
        metavar="GIB",
        help="this run may use on the machine (default: what is free)\nBy it --memory auto and plan choose, and full "
        "fine-tuning is refused. For machines that report less than they have, as rented ones that grow with use.",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute blocks: far less memory, slower\nActivations are not kept for the backward pass.",
    )
    group.add_argument(
        "--enable_slicing",
        action="store_true",
        help="VAE: one video at a time\nNo effect on a GPU, where it always does so.",
    )
    group.add_argument(
        "--enable_tiling",
        action="store_true",
        help="VAE: overlapping tiles\nSlower, with slightly different results; no longer needed to save memory.",
    )
    group.add_argument(
        "--use_cpu_offload_optimizer",
        action="store_true",
        help="optimizer in host memory: far less GPU memory, slower steps\nFull fine-tuning with adam or adamw in "
        "bf16 on one GPU updates its weights on the GPU, block by block, as at --memory offload. Otherwise fp32 "
        "weights are there too, and the CPU updates them.",
    )
    group.add_argument(
        "--offload_gradients",
        action="store_true",
        help="gradients too, with --use_cpu_offload_optimizer\nEvery gradient moves to host memory as soon as it "
        "is computed. Where blocks are updated on the GPU it always does.",
    )
    group.add_argument(
        "--states_on_gpu",
        type=share,
        metavar="SHARE",
        help="of the blocks, with optimizer states in host memory (default: 0)\nFull fine-tuning at --memory offload, at "
        "stream, or with --use_cpu_offload_optimizer: the states of so many blocks stay on the GPU, 0 to 1, which is "
        "faster and changes no bit. --memory auto takes what fits.",
    )
    add_speed_flags(group)


def add_speed_flags(group):
    group.add_argument(
        "--compile_blocks",
        action="store_true",
        help="torch.compile the blocks (default: on a GPU with --memory)\nEvery transformer block is compiled in "
        "place: the first step compiles, later ones are faster. accelerate_configs/compiled_1.yaml does it too.",
    )
    group.add_argument("--no_compile_blocks", action="store_true", help="--memory without torch.compile")
    group.add_argument(
        "--attention",
        choices=["auto", "cudnn", "flash", "fa4", "math"],
        default="auto",
        help="auto is the fastest there; fa4: FlashAttention-4; math: exact and slow\nauto times the installed "
        "ones on this run's shape, once per GPU model and shape. fa4 is a pre-release on PyPI (flash-attn-4).",
    )
    group.add_argument(
        "--base_precision",
        choices=BASE_PRECISIONS,
        default="bf16",
        help="frozen weights: fp8 is faster, int8 and nf4 are smaller; the loss changes a little\nOnly those of "
        "attention and feed-forward. bf16 leaves them in the compute precision; fp8 computes faster on Ada and "
        "newer; int8 and nf4 take less memory, at some cost in speed.",
    )
    group.add_argument(
        "--allow_tf32",
        action="store_true",
        help="TF32 for fp32 matrix products: faster, coarser\nIt needs an Ampere GPU or newer.",
    )


def add_tracking_flags(parser: FlagParser):
    group = parser.add_argument_group("logging and upload")
    group.add_argument(
        "--report_to",
        metavar="TRACKER",
        help="wandb, tensorboard, trackio, or all that are installed (default: metrics.jsonl alone)\nSeveral are "
        "separated by commas. metrics.jsonl is written in any case.",
    )
    group.add_argument(
        "--log_every",
        type=at_least(1),
        metavar="N",
        default=10,
        help="updates between reads of the loss\nThe gradient norm is read with it. Each update still has its own "
        "line in metrics.jsonl.",
    )
    group.add_argument("--tracker_name", metavar="NAME", help="project at the tracker (default: the task's name)")
    group.add_argument("--logging_dir", metavar="FOLDER", default="logs", help="trackers' folder in --output_dir")
    group.add_argument("--push_to_hub", action="store_true", help="upload the result, private by default")
    group.add_argument("--hub_public", action="store_true", help="make a new repository public")
    group.add_argument(
        "--hub_token",
        metavar="TOKEN",
        help="token for the hub; other users of the machine can read it, HF_TOKEN is safer\nSo is `hf auth "
        "login`. The token is written nowhere.",
    )
    group.add_argument("--hub_model_id", metavar="ID", help="repository (default: yours, named like --output_dir)")
    add_verbose_flag(group)


def add_verbose_flag(group):
    group.add_argument(
        "--verbose", action="store_true", help="also show the libraries' logs, warnings and progress bars"
    )


# ---------------------------------------------------------------- flags of prepare_dataset.py


def add_prepare_model_flags(parser: FlagParser):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_id",
        metavar="MODEL",
        default="THUDM/CogVideoX-2b",
        help="model that will be trained: a hub id, zai-org/... or THUDM/..., or a local diffusers folder\nIts VAE "
        "and T5 are used.",
    )
    add_download_flags(group)
    group.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="precision of the VAE and T5\nThey are loaded and compute in it.",
    )
    group.add_argument(
        "--max_sequence_length",
        type=at_least(1),
        metavar="TOKENS",
        default=226,
        help="tokens that captions are cut or padded to\nCogVideoX is trained with 226.",
    )


def add_prepare_data_flags(parser: FlagParser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="folder of videos, images and captions, required\nPaths are relative to it. An image (png, jpg, webp) is "
        "a clip of one frame.",
    )
    add_clip_list_flags(group)
    add_reading_flags(group)
    group.add_argument(
        "--num_decode_threads",
        type=at_least(0),
        metavar="N",
        default=0,
        help="threads that decode one video\n0 leaves it to the decoder.",
    )
    group.add_argument(
        "--seed",
        type=at_least(0),
        metavar="N",
        default=42,
        help="seed of all random draws\nThey are made per clip: flip, crop, start, noise on first frames.",
    )


def add_prepare_bucket_flags(parser: FlagParser):
    group = parser.add_argument_group("sizes")
    add_size_flags(group)
    group.add_argument("--target_fps", type=at_least(1), metavar="N", default=8, help=FPS_HELP)


def add_prepare_output_flags(parser: FlagParser):
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="folder to write, required\nIf it holds part of the work, only what is missing is done.",
    )
    group.add_argument(
        "--save_latents_and_embeddings",
        action="store_true",
        help="write what --load_tensors trains on, not resized videos and first frames\nThese are VAE moments and "
        "prompt embeddings.",
    )
    group.add_argument(
        "--save_image_latents",
        action="store_true",
        help="first frames too, noised, for image-to-video\nTheir moments are written; "
        "--save_latents_and_embeddings is needed.",
    )
    group.add_argument(
        "--num_image_variants",
        type=at_least(1),
        metavar="N",
        default=8,
        help="noised first frames per clip\nThey need --save_image_latents; training draws one each time.",
    )
    group.add_argument(
        "--save_previews",
        action="store_true",
        help="write resized videos and first frames too\nWithout --save_latents_and_embeddings they are always "
        "written.",
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="encode nothing: write a page of all clips and faults\nEvery caption is read and every clip sampled, "
        "without VAE or T5; dataset_report.html shows clips as the model will see them. The exit code is 65 if "
        "a clip cannot be used.",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="hash everything again, remake what is old\nNothing cached is trusted: every video and weight file is "
        "hashed again, and what an earlier version prepared is made again, compared and replaced.",
    )
    group.add_argument(
        "--prune",
        action="store_true",
        help="remove its files for clips no longer listed\nThese are files in the output folder's own subfolders "
        "that prepare_dataset.py wrote and no row uses any more.",
    )


def add_prepare_memory_flags(parser: FlagParser):
    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--batch_size", type=at_least(1), metavar="CLIPS", default=1, help="clips encoded at once, on each GPU"
    )
    group.add_argument(
        "--use_slicing",
        action="store_true",
        help="VAE: one clip at a time\nNo effect on a GPU, where it always does so.",
    )
    group.add_argument(
        "--use_tiling",
        action="store_true",
        help="VAE: overlapping tiles\nSlower, with slightly different results; no longer needed to save memory.",
    )
    group.add_argument(
        "--num_artifact_workers",
        type=at_least(1),
        metavar="N",
        default=4,
        help="threads that write files, per GPU",
    )
    add_verbose_flag(group)


# ---------------------------------------------------------------- flags of caption_dataset.py


def add_caption_data_flags(parser: FlagParser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root",
        required=True,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="folder of videos, required\nWithout a list of clips, all videos and images in it are captioned, those in "
        "folders below too. A list may have captions or not.",
    )
    add_listing_flags(group)
    add_outside_flag(group)
    group.add_argument(
        "--recaption",
        action="store_true",
        help="also caption clips that have a caption in the data\nWithout the flag, those captions are taken over as they are. An "
        "--output_dir other than --data_root is needed. Captions edited there are kept with the flag too.",
    )


def add_caption_server_flags(parser: FlagParser):
    group = parser.add_argument_group("server")
    group.add_argument(
        "--base_url",
        metavar="URL",
        default="http://localhost:8000/v1",
        help="address of the server's API\nIt takes what OpenAI's chat completions take.",
    )
    group.add_argument("--model", metavar="NAME", help="model to ask (default: the one that the server lists)")
    group.add_argument(
        "--api_key_env",
        metavar="VARIABLE",
        default="OPENAI_API_KEY",
        help="environment variable with the key\nIf it is not set, no key is sent. The key is written nowhere.",
    )
    group.add_argument(
        "--concurrency", type=at_least(1), metavar="N", default=8, help="clips asked about at the same time"
    )
    group.add_argument(
        "--timeout", type=positive, metavar="SECONDS", default=120, help="wait for one answer, in seconds"
    )
    group.add_argument(
        "--max_wait",
        type=not_negative,
        metavar="SECONDS",
        default=600,
        help="wait for a server that is gone or busy, in seconds\nAfter that, the exit code is 75, and the same command "
        "goes on.",
    )


def add_caption_question_flags(parser: FlagParser):
    group = parser.add_argument_group("question")
    group.add_argument(
        "--send",
        choices=["frames", "video"],
        default="frames",
        help="images, or the file itself where the server takes it",
    )
    group.add_argument(
        "--num_frames",
        type=at_least(1),
        metavar="N",
        default=8,
        help="frames shown per clip, evenly spread over it",
    )
    group.add_argument(
        "--max_size",
        type=at_least(16),
        metavar="PIXELS",
        default=720,
        help="longest side of a frame that is sent\nLarger ones are scaled down.",
    )
    group.add_argument(
        "--prompt_file",
        metavar="FILE",
        help="text file with the question (default: one for captions as CogVideoX was trained on)",
    )
    group.add_argument(
        "--context",
        choices=["none", "file_name", "caption"],
        default="none",
        help="what else is said of a clip\ncaption is its caption in the data, which is replaced, as with --recaption.",
    )


def add_caption_length_flags(parser: FlagParser):
    group = parser.add_argument_group("length of captions")
    group.add_argument(
        "--pretrained_model_name_or_path",
        metavar="MODEL",
        help="model that will be trained, to count its tokens (default: words are counted)\nA hub id, a local diffusers "
        "folder or the folder of a tokenizer; only the tokenizer and configs are read.",
    )
    add_revision_flag(group)
    add_cache_dir_flag(group)
    group.add_argument(
        "--max_tokens",
        type=at_least(1),
        metavar="N",
        help="longest caption in tokens (default: the model's, or 226)\nLonger answers are asked for again, not cut. "
        "Without a model, three words are counted as four tokens.",
    )


def add_caption_output_flags(parser: FlagParser):
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        metavar="FOLDER",
        help="folder of the captioned set (default: --data_root, if it has no list of clips)\nThe clips are linked into "
        "it, and take no room. If an earlier run wrote it, only what is missing is asked for; edited captions are kept.",
    )
    group.add_argument(
        "--trigger", metavar="TOKEN", help="text put in front of the model's captions\nA space separates the two."
    )
    add_verbose_flag(group)
