#!/usr/bin/env python
"""Fine-tune every weight of a CogVideoX text-to-video transformer (SFT) on one or more GPUs.

accelerate launch --quiet --config_file accelerate_configs/uncompiled_1.yaml --gpu_ids 0 \\
    training/cogvideox_text_to_video_sft.py --pretrained_model_name_or_path zai-org/CogVideoX-2b \\
    --data_root disney-prepared --load_tensors --mixed_precision bf16 --gradient_checkpointing \\
    --train_batch_size 1 --learning_rate 1e-5 --max_train_steps 3000 --output_dir cogvideox-sft

The result loads with `CogVideoXTransformer3DModel.from_pretrained(<output_dir>, subfolder="transformer")`.
Axes: B batch, F latent frames, C latent channels, H/W latent size, S text tokens, D text width.
"""

from args import parse_training_args


ARGS = parse_training_args("t2v_sft") if __name__ == "__main__" else None  # before the heavy imports: --help is quick

import functools
from pathlib import Path

import torch

from base.signals import INTERRUPTION
from cogvideox.config import (
    TEXT_TO_VIDEO_PIPELINE,
    check_buckets,
    check_sample_size,
    default_fps,
    describe_model,
    load_scheduler,
    text_shape,
)
from cogvideox.encoding import encode_captions, encode_videos, pixels_to_unit
from cogvideox.folder import hash_model_from_args, read_configs_from_args, resolve_model_from_args, stored_dtype
from cogvideox.inputs import latent_shape, pad_frames, rotary_embeddings, sample_latents
from cogvideox.loading import load_transformer, load_vae, num_parameters, outline_of, read_outline_from_args
from cogvideox.pipeline import make_pipeline
from data.buckets import num_batches
from data.captions import encode_captions_from_args, read_texts_from_args
from data.dataset import build_dataset_from_args
from engine.compose import build_optimizer_from_args, build_sft_engine_from_args, check_sft_fits_from_args
from engine.objective import add_noise, draw_normal, draw_timesteps, draw_uniform, v_prediction_loss
from engine.optimizers import make_lr_scheduler_from_args
from engine.update import TrainingState, make_scaler, update
from run.checkpoints import (
    find_checkpoint_from_args,
    leave_if_interrupted_from_args,
    load_checkpoint,
    save_checkpoint_from_args,
)
from run.exits import explained_oom_from_args, run_script, stop_is_due
from run.held_out import build_held_out_from_args, data_facts, encode_held_out
from run.hub import check_hub_from_args
from run.launch import (
    START,
    check_device_from_args,
    compute_dtype_from_args,
    init_accelerator_from_args,
    shared_seed_from_args,
)
from run.memory_level import plan_memory_from_args, print_plan_from_args
from run.meter import make_meter_from_args, report_memory
from run.model_card import RunFacts
from run.output_dir import content_from_args, is_complete_from_args, open_output_dir_from_args
from run.render import Samples
from run.result import finish_again_from_args, finish_run_from_args, record_run_from_args, save_result
from run.steps import learning_rate_from_args, make_loader_from_args, plan_steps_from_args, sample_positions, to_device
from run.tracking import start_trackers_from_args
from run.validation import (
    check_attention_from_args,
    is_due_from_args,
    read_prompts_from_args,
    sample_size_from_args,
    validate_from_args,
)


def main(args) -> None:
    if args.memory == "plan":
        return print_plan_from_args(args, read_outline_from_args(args, image_to_video=False), is_lora=False)
    # ---------------------------------------------------------------- run
    accelerator = init_accelerator_from_args(args)
    device, rank, num_ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    output_dir = Path(args.output_dir)
    hub_repo = check_hub_from_args(args, accelerator)
    earlier_seed = open_output_dir_from_args(args, accelerator)
    seed = shared_seed_from_args(args) if earlier_seed is None else earlier_seed

    # ---------------------------------------------------------------- data, before gigabytes are downloaded
    prompts, images = read_prompts_from_args(args, image_to_video=False)  # to be rendered in validation
    config, vae_config = read_configs_from_args(args, image_to_video=False)
    check_device_from_args(args, num_parameters(config), device)
    reading = (args, default_fps(config), seed, vae_config.scaling_factor)
    dataset = build_dataset_from_args(*reading)
    held_out_clips = build_held_out_from_args(*reading)
    check_buckets(config, [*dataset.bucket_of, *held_out_clips.bucket_of])
    size = sample_size_from_args(args, dataset.bucket_of)
    if prompts:
        check_sample_size(config, size)
    batches_per_epoch = num_batches(dataset.bucket_of, args.train_batch_size, num_ranks)
    plan = plan_steps_from_args(args, batches_per_epoch, num_ranks)

    # ---------------------------------------------------------------- models; T5 comes and goes before the transformer
    needs_encoders = bool(prompts) or not args.load_tensors
    model_dir, weights = resolve_model_from_args(args, needs_encoders)
    stored = stored_dtype(*weights)
    dtype = compute_dtype_from_args(args, stored, device)
    check_attention_from_args(args, dtype, device)
    check_sft_fits_from_args(args, num_parameters(config), dtype, device)
    outline, scheduler = outline_of(config, stored), load_scheduler(model_dir)
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    content = content_from_args(args, accelerator, dataset, lambda: hash_model_from_args(args, model_dir, weights))
    base = (describe_model(config), weights, content["transformer"])
    about = RunFacts(
        *base, dataset.bucket_of, size, dtype, seed, num_ranks, plan.num_steps, is_lora=False, hub_repo=hub_repo
    )
    if is_complete_from_args(args, plan.num_steps):
        return finish_again_from_args(args, accelerator, about)
    level, shape, fill = plan_memory_from_args(args, outline, dataset.bucket_of, dtype, device, is_lora=False)
    START.mark("data")
    vae, embeds = None, {}
    if needs_encoders:
        texts = read_texts_from_args(args, dataset, held_out_clips, prompts)
        encoding = (model_dir, texts, dtype, level, text_shape(config), encode_captions)
        embeds = encode_captions_from_args(args, accelerator, *encoding)
        vae = load_vae(model_dir, dtype, args.variant, args.enable_slicing, args.enable_tiling)
        vae.to("cpu" if args.load_tensors else device)  # prepared data needs it in validation alone
    if args.text_dropout:
        empty_embeds = (dataset.empty_prompt_embeds() if args.load_tensors else embeds[""]).to(device)
    START.mark("encoding")

    # ---------------------------------------------------------------- transformer, optimizer, checkpoint
    checkpoint = find_checkpoint_from_args(args, accelerator, plan.num_steps, content)
    transformer = load_transformer(weights.folder, torch.float32, weights.variant, load_blocks=fill)
    START.mark("loading")
    engine = build_sft_engine_from_args(args, level, transformer, shape, dtype, stored, device)
    START.mark("engine")
    optimizer = build_optimizer_from_args(args, accelerator, engine, learning_rate_from_args(args, num_ranks))
    lr_scheduler = make_lr_scheduler_from_args(args, optimizer, plan.num_steps)
    state = TrainingState(engine.params, optimizer, lr_scheduler, make_scaler(dtype), engine.masters, engine.ema)
    facts = {"seed": seed, "num_processes": num_ranks, **data_facts(dataset, held_out_clips)}
    first_step = load_checkpoint(checkpoint, engine, state, facts) if checkpoint else 0
    record_run_from_args(args, accelerator, engine, seed, first_step, plan.num_steps, content)
    start_trackers_from_args(args, accelerator, "cogvideox-text-to-video-sft", first_step)
    START.mark("checkpoint")

    micro_steps, loader = make_loader_from_args(args, accelerator, dataset, plan, seed, first_step)
    meter = make_meter_from_args(args, accelerator, first_step, plan.num_steps, dataset.sources)
    num_strata = args.train_batch_size * num_ranks * plan.accumulation if args.stratified_timesteps else None

    # ---------------------------------------------------------------- validation, by the same two functions as the loop
    encode = functools.partial(
        encode_batch, vae=vae, embeds=embeds, vae_config=vae_config, patch_size_t=config.get("patch_size_t")
    )
    losses_of = functools.partial(compute_losses, transformer, alphas_cumprod=alphas_cumprod, dtype=dtype)
    held_out = encode_held_out(accelerator, held_out_clips, encode, losses_of, seed, len(alphas_cumprod))
    pipeline = functools.partial(make_pipeline, TEXT_TO_VIDEO_PIPELINE, vae, scheduler, args.image_latent_scale)
    fps = args.fps if "fps" in args.given else default_fps(config)
    samples = Samples(prompts, images, size, fps, seed, embeds, pipeline)
    validate = functools.partial(validate_from_args, args, accelerator, meter, engine, samples, held_out)
    report_memory(meter, first_step, "before_training")
    if first_step == 0 and not args.no_first_validation:
        validate(0)
    START.mark("validation")

    # ---------------------------------------------------------------- loop
    step, batches = first_step, meter.timed(INTERRUPTION.until_asked(loader, alone=num_ranks == 1))
    with explained_oom_from_args(args, device, dataset.bucket_of, level, is_lora=False), meter:
        for micro_step, batch in zip(micro_steps, batches, strict=False):
            step = micro_step // plan.accumulation  # updates made before this one
            positions = sample_positions(micro_step, args.train_batch_size, num_ranks, rank, len(batch["index"]))
            latents, prompt_embeds = encode(to_device(batch, device), seed, positions)
            if args.text_dropout:
                dropped = to_device(draw_uniform(seed, "text_dropout", positions) < args.text_dropout, device)  # [B]
                prompt_embeds = torch.where(dropped[:, None, None], empty_embeds.to(prompt_embeds), prompt_embeds)

            noise = to_device(draw_normal(seed, "noise", positions, latents.shape[1:]), device)  # [B, F, C, H, W]
            timesteps = to_device(draw_timesteps(seed, positions, len(alphas_cumprod), num_strata), device)  # [B]
            meter.copied()
            losses = losses_of(latents, prompt_embeds, noise, timesteps)  # [B]
            loss = losses.mean() / plan.micro_steps_in(step)
            meter.add(loss, losses, batch["index"])
            result = update(loss, state, plan.is_last_of_update(micro_step), args.max_grad_norm)
            if not result.stepped:
                continue

            # Everything below sees one optimizer update
            step += 1
            meter.log(step, result)
            if step % args.checkpointing_steps == 0:
                meter.pause()
                save_checkpoint_from_args(args, accelerator, step, engine, state, facts)
            if stop_is_due(accelerator, step):
                break
            if is_due_from_args(args, plan, batches_per_epoch, step):
                validate(step)

    # ---------------------------------------------------------------- finish
    leave_if_interrupted_from_args(args, accelerator, first_step, step, plan.num_steps, engine, state, facts)
    save_result(accelerator, output_dir, engine)
    validate(plan.num_steps)
    report_memory(meter, plan.num_steps, "after_testing")
    finish_run_from_args(args, accelerator, about)


def encode_batch(
    batch: dict, seed: int, positions: list, vae, embeds: dict[str, torch.Tensor], vae_config, patch_size_t
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [B, F, C, H, W], prompt_embeds [B, S, D]): from moments on disk, or of clips."""
    if "moments" in batch:
        moments, prompt_embeds = batch["moments"], batch["prompt_embeds"]
    else:
        pixels = pixels_to_unit(batch["pixels"])  # [B, F', 3, h, w]
        moments = encode_videos(vae, pixels)  # [B, 2C, F, H, W]
        prompt_embeds = to_device(torch.stack([embeds[prompt] for prompt in batch["prompt"]]), moments.device)
    noise = to_device(draw_normal(seed, "posterior", positions, latent_shape(moments)), moments.device)
    return pad_frames(sample_latents(moments, noise, vae_config), patch_size_t), prompt_embeds


def compute_losses(transformer, latents, prompt_embeds, noise, timesteps, alphas_cumprod, dtype) -> torch.Tensor:
    """Loss [B] of the velocity that the transformer predicts at `timesteps` [B]."""
    noisy_latents = add_noise(latents, noise, timesteps, alphas_cumprod)
    velocity = transformer(
        hidden_states=noisy_latents.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),  # [B, S, D]
        timestep=timesteps,
        image_rotary_emb=rotary_embeddings(transformer.config, latents),
        return_dict=False,
    )[0]
    return v_prediction_loss(velocity, latents, noise, timesteps, alphas_cumprod)


if __name__ == "__main__":
    run_script(lambda: main(ARGS), ARGS.output_dir)
