"""The model card that every run writes."""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCardData
from torch.utils.data import Dataset

from base.files import write_text
from base.memory_levels import HOST
from engine.master_weights import choose_masters_from_args
from engine.sft import SUBFOLDER
from run.export import COMFYUI_NAME, KOHYA_NAME


LOSS_NAME, CARD_NAME = "loss.png", "README.md"
MODEL_OWNERS = {"zai-org", "THUDM"}  # the organization that released CogVideoX, by its present and former name
APACHE = {"license": "apache-2.0"}
MODEL_LICENCE = {
    "license": "other",
    "license_name": "cogvideox-license",
    "license_link": "https://huggingface.co/zai-org/CogVideoX-5b/blob/main/LICENSE",
}
PACKAGES = ("torch", "diffusers", "transformers", "peft")  # needed to use the result; args.json has those that made it
NO_PROMPT = "A lighthouse stands in the rain."  # for the example, if the run had none


class RunSummary(NamedTuple):
    """What the end of a run needs to know about it, besides its flags."""

    run: NamedTuple  # launch.Run
    model: NamedTuple  # the family's: classes, task, licence, frame rate, weights that training starts from
    provenance: dict  # see output_dir.check_provenance
    clips: Dataset
    size: tuple  # of rendered videos
    dtype: torch.dtype
    plan: NamedTuple  # steps.StepPlan
    is_lora: bool


def write_card(args, summary: RunSummary) -> None:
    """Write `README.md`: equal runs write equal cards except for versions; never a path, date or host name."""
    output_dir = Path(args.output_dir)
    samples = last_samples(output_dir)
    data = ModelCardData(**card_data(args, summary, samples))
    name = summary.run.hub_repo or output_dir.resolve().name
    parts = [
        f"# {name.split('/')[-1]}",
        *(["<Gallery />"] if samples else []),
        introduction(args, summary),
        training_table(args, summary),
        *([f"![Training loss]({LOSS_NAME})"] if (output_dir / LOSS_NAME).exists() else []),
        "## Use",
        f"```python\n{usage(args, summary, name)}```",
        *usage_notes(args, summary),
        "## Licence",
        licence_text(hub_base(args), summary),
        "## Versions",
        ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    write_text(output_dir / CARD_NAME, text)


def hub_base(args) -> str | None:
    """The base model if it is on the hub; a local path is never published."""
    model = args.pretrained_model_name_or_path
    return model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).is_dir() else None


def card_data(args, summary: RunSummary, samples: list[tuple[str, str]]) -> dict:
    """The card's metadata; `samples` are (prompt, path in the repository)."""
    base, task = hub_base(args), task_of(summary)
    data = {"base_model": base, "base_model_relation": "adapter" if summary.is_lora else "finetune"} if base else {}
    data |= {"library_name": "diffusers", "pipeline_tag": task}
    data |= licence_data(base, summary)
    data["tags"] = [task, "diffusers", "diffusers-training", "cogvideox", "cogvideox-diffusers"]
    if summary.is_lora:
        data["tags"] += ["lora", "template:diffusion-lora"]
    if args.id_token:
        data["instance_prompt"] = args.id_token
    if samples:
        data["widget"] = [{"text": prompt, "output": {"url": path}} for prompt, path in samples]
    return data


def task_of(summary: RunSummary) -> str:
    return "image-to-video" if summary.model.image_to_video else "text-to-video"


def last_samples(output_dir: Path) -> list[tuple[str, str]]:
    """(prompt, path in output_dir) of the newest validation's videos that have their prompt beside them."""
    steps = [path for path in output_dir.glob("samples/step_*") if path.name.removeprefix("step_").isdigit()]
    if not steps:
        return []
    newest = max(steps, key=lambda path: int(path.name.removeprefix("step_")))
    videos = [path for path in sorted(newest.glob("*.mp4")) if path.with_suffix(".txt").exists()]
    texts = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in videos]
    return [(text, path.relative_to(output_dir).as_posix()) for text, path in zip(texts, videos, strict=True)]


def introduction(args, summary: RunSummary) -> str:
    what = "A LoRA for" if summary.is_lora else "Full fine-tuning of"
    base = hub_base(args)
    model = f"[{base}](https://huggingface.co/{base})" if base else f"a CogVideoX {task_of(summary)} model"
    token = f" Every caption began with `{args.id_token}`: begin prompts with it." if args.id_token else ""
    return f"{what} {model}.{start_text(args, summary)}{token}"


def start_text(args, summary: RunSummary) -> str:
    """A fine-tuned transformer as the start is identified by its hash; its path is never published."""
    if args.init_transformer is None:
        return ""
    belongs = " It belongs on that transformer, not on the base model's." if summary.is_lora else ""
    digest = summary.provenance["transformer"][:16]
    return f" Training started from a fine-tuned transformer of that model (SHA-256 of its weights: `{digest}...`).{belongs}"


def training_table(args, summary: RunSummary) -> str:
    """What was trained and how, one fact per row."""
    sizes = sorted(set(map(tuple, summary.clips.clip_buckets)))
    texts = [f"{frames} frames of {height}x{width}" for frames, height, width in sizes]
    clips_per_update = args.train_batch_size * args.gradient_accumulation_steps * summary.run.num_ranks
    schedule = f"{summary.plan.learning_rate:g}, {args.lr_scheduler}"
    has_warmup = args.lr_warmup_steps and args.lr_scheduler != "constant"
    rows = {
        "Task": f"{task_of(summary)}, {'LoRA' if summary.is_lora else 'every weight'}",
        "Clips": f"{len(summary.clips.clip_buckets)}, of {texts[0] if len(texts) == 1 else f'{len(texts)} sizes'}",
        "Updates": f"{summary.plan.num_steps}, of {clips_per_update} clips each",
    }
    if summary.is_lora:
        variants = (" (DoRA)" if args.use_dora else "") + (" (rank-stabilised)" if args.use_rslora else "")
        rows["Rank, alpha"] = f"{args.rank}, {args.lora_alpha}{variants}"
        rows["Layers"] = " ".join(f"`{name}`" for name in args.lora_target_modules)
    if args.ema:
        rows["Weights"] = f"their moving average, decay {args.ema_decay}"
    frozen = "" if args.base_precision == "bf16" else f", most frozen weights in {args.base_precision}"
    rows |= {
        "Optimizer": optimizer_text(args, summary),
        "Learning rate": schedule + (f", warm-up of {args.lr_warmup_steps} updates" if has_warmup else ""),
        "Precision": f"computed in {dtype_name(summary.dtype)}, trained weights in float32{frozen}",
        "Seed": str(summary.run.seed),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def optimizer_text(args, summary: RunSummary) -> str:
    """States that only lie on the host, and are updated on the GPU, change no bit: they are not mentioned."""
    bits = {"use_8bit": "8-bit", "use_4bit": "4-bit", "use_fp8": "fp8"}
    states = [f", {name} states" for flag, name in bits.items() if getattr(args, flag)]
    kind = choose_masters_from_args(args, args.memory, summary.dtype, summary.run.num_ranks)
    on_cpu = args.use_cpu_offload_optimizer and (summary.is_lora or kind == HOST)
    return args.optimizer + "".join(states) + (", on the CPU" if on_cpu else "")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def licence_data(base: str | None, summary: RunSummary) -> dict:
    """The licence in the card's metadata: known for the released models, `unknown` for any other base."""
    if base is None or base.split("/")[0] not in MODEL_OWNERS:
        return {"license": "unknown"}
    return APACHE if summary.model.has_apache_licence else MODEL_LICENCE


def licence_text(base: str | None, summary: RunSummary) -> str:
    licence = licence_data(base, summary)
    if licence == APACHE:
        return (
            "The base model is under the Apache License 2.0, which lets changed weights be passed on with a copy of it, "
            "its notices, and a note that they were changed."
        )
    if licence == MODEL_LICENCE:
        return (
            f"The base model is under the [CogVideoX LICENSE]({MODEL_LICENCE['license_link']}). It has no clause on "
            "fine-tuned weights: treat them as bound by it."
        )
    return (
        "The licence of the base model is not recorded here. It may bind these weights too: see the base model's own."
    )


RAW_FIRST_FRAME = '''
class RawFirstFramePipeline({pipeline}):
    """Trained with --image_latent_scale raw: the first frame's latents are used as the VAE gives them."""

    def prepare_latents(self, *args, **kwargs):
        factor, self.vae_scaling_factor_image = self.vae_scaling_factor_image, 1.0
        try:
            return super().prepare_latents(*args, **kwargs)
        finally:
            self.vae_scaling_factor_image = factor  # decoding needs it

'''


def usage(args, summary: RunSummary, name: str) -> str:
    """Python code that renders a video with the result `name`, a repository or a folder."""
    is_on_top = summary.is_lora and args.init_transformer is not None
    pipeline, transformer = summary.model.pipeline_class.__name__, summary.model.transformer_class.__name__
    own_transformer = not summary.is_lora or args.drop_learned_positions or is_on_top
    dtype = f"torch.{dtype_name(summary.dtype)}"
    lines = [
        "import torch",
        f"from diffusers import {pipeline}{f', {transformer}' if own_transformer else ''}",
        f"from diffusers.utils import export_to_video{', load_image' if summary.model.image_to_video else ''}",
    ]
    if args.image_latent_scale == "raw":
        lines += ["", *RAW_FIRST_FRAME.format(pipeline=pipeline).splitlines()]
        pipeline = "RawFirstFramePipeline"
    base = hub_base(args)
    hint = "" if base else "  # fill in: the model that was fine-tuned"
    lines += ["", f'base_model = "{base or "path/to/base_model"}"{hint}']
    if is_on_top:
        lines.append('fine_tuned = "path/to/fine_tuned"  # fill in: the fine-tuning that the LoRA was trained on')
    if own_transformer:
        source = (
            "fine_tuned" if is_on_top else "base_model" if summary.is_lora else json.dumps(name, ensure_ascii=False)
        )
        drops = summary.is_lora and args.drop_learned_positions
        positions = ", use_learned_positional_embeddings=False" if drops else ""
        lines += [
            f"transformer = {transformer}.from_pretrained(",
            f'    {source}, subfolder="transformer", dtype={dtype}{positions}',
            ")",
        ]
    part = ", transformer=transformer" if own_transformer else ""
    lines.append(f"pipe = {pipeline}.from_pretrained(base_model{part}, dtype={dtype})")
    if summary.is_lora:
        lines.append(f"pipe.load_lora_weights({json.dumps(name, ensure_ascii=False)})")
    lines += ["pipe.enable_model_cpu_offload()", "pipe.vae.enable_slicing()", "pipe.vae.enable_tiling()"]
    return "\n".join(lines) + "\n\n" + rendering(args, summary)


def rendering(args, summary: RunSummary) -> str:
    """The call of `pipe`, with validation's settings."""
    frames, height, width = summary.size
    own_prompt = f"{args.id_token} {NO_PROMPT}" if args.id_token else NO_PROMPT
    prompts = (args.validation_prompt or own_prompt).split(args.validation_prompt_separator)
    values = [
        *(['image=load_image("first_frame.png")'] if summary.model.image_to_video else []),
        f"prompt={json.dumps(prompts[0].strip(), ensure_ascii=False)}",
        f"num_frames={frames}",
        f"height={height}",
        f"width={width}",
        f"num_inference_steps={args.num_inference_steps}",
        f"guidance_scale={args.guidance_scale}",
        *(["use_dynamic_cfg=True"] if args.use_dynamic_cfg else []),
        'generator=torch.Generator("cpu").manual_seed(42)',
    ]
    call = "".join(f"    {value},\n" for value in values)
    return f'video = pipe(\n{call}).frames[0]\nexport_to_video(video, "output.mp4", fps={summary.model.fps})\n'


def usage_notes(args, summary: RunSummary) -> list[str]:
    """Paragraphs below the example."""
    notes = []
    if summary.is_lora:
        notes.append(
            "Alpha / rank is in the weights already: a strength of 1.0, the default, is what was trained, in every reader."
        )
    if args.drop_learned_positions and summary.is_lora:
        notes.append("It was trained without the base model's learned positions, hence the transformer above.")
    if "comfyui" in args.export:
        notes.append(f"`{COMFYUI_NAME}` is the same LoRA for ComfyUI's own nodes, at strength 1.0.")
    if "kohya" in args.export:
        notes.append(f"`{KOHYA_NAME}` is the same LoRA for VideoX-Fun, at strength 1.0.")
    if "merged" in args.export:
        notes.append(
            f"`{SUBFOLDER}/` is the transformer that it was trained on with the LoRA added, for "
            f'`{summary.model.transformer_class.__name__}.from_pretrained(..., subfolder="{SUBFOLDER}")`; it needs no LoRA file.'
        )
    return notes
