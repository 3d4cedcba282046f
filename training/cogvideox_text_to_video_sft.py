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
from base import console, startup
from data import read_ahead


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    ARGS = parse_training_args("t2v_sft")
    console.set_up(ARGS.verbose)
    startup.expect_imports()
    read_ahead.start_from_args(ARGS)

import functools

import torch

from base.signals import INTERRUPTION
from cogvideox import encoding, inputs, loading, models
from data import captions, dataset
from engine import compose, objective, optimizers
from engine.update import TrainingState, make_scaler, update
from memory.host import to_device
from run import checkpoints, exits, held_out, launch, levels, metrics, output_dir, result, steps, validation


def main(args) -> None:
    if args.memory == "plan":
        return levels.print_plan(args, models.open_from_args(args, image_to_video=False), is_lora=False)
    # ---------------------------------------------------------------- run
    run = launch.open_run(args)
    device = run.device

    # ---------------------------------------------------------------- data, before gigabytes are downloaded
    model = models.open_from_args(args, image_to_video=False)
    launch.check_device(args, model.num_parameters, device)
    clips = dataset.build_dataset_from_args(args, model, run.seed)
    validation_set = validation.read_set(args, model, run.seed, clips.clip_buckets)
    models.check_sizes_from_args(args, model, clips, validation_set)
    plan = steps.make_plan(args, clips.clip_buckets, run.num_ranks)

    # ---------------------------------------------------------------- models; T5 is freed before the transformer comes
    texts = captions.read_texts_from_args(args, clips, validation_set)
    model = models.fetch_from_args(args, model, with_encoders=bool(texts))
    dtype = launch.compute_dtype(args, model.stored_dtype, device)
    alphas_cumprod = model.load_scheduler().alphas_cumprod.to(device)
    provenance = output_dir.check_provenance(args, run, model, clips, validation_set.held_out)
    summary = result.RunSummary(run, model, provenance, clips, validation_set.size, dtype, plan, is_lora=False)
    if output_dir.is_done(args, plan.num_steps):
        return result.finish_again(args, run, summary)
    level, share = levels.choose(args, model, clips.clip_buckets, dtype, device, is_lora=False)
    embeds = captions.encode_from_args(args, run, model, texts, dtype, level, encoding.encode_captions)
    empty_embeds = captions.empty_embeds_from_args(args, clips, embeds, device)
    vae = loading.load_vae_from_args(args, model.folder, dtype, device) if texts else None

    # ---------------------------------------------------------------- transformer, optimizer, checkpoint
    checkpoint = checkpoints.find(args, run, plan.num_steps, provenance)
    transformer = loading.load_transformer_from_args(args, model.weights, model.loading_dtype(dtype))
    shape = model.attention_shape(clips.clip_buckets, args.train_batch_size)
    engine = compose.build_sft_engine_from_args(
        args, level, share, transformer, shape, dtype, model.stored_dtype, device
    )
    optimizer = compose.build_engine_optimizer_from_args(args, run.accelerator, engine, plan.learning_rate)
    lr_scheduler = optimizers.make_lr_scheduler_from_args(args, optimizer, plan.num_steps)
    state = TrainingState(engine, optimizer, lr_scheduler, make_scaler(dtype))
    first_step = checkpoints.resume(args, run, checkpoint, state, provenance) if checkpoint else 0
    result.rehearse(args, run, engine, first_step, plan.num_steps)
    output_dir.record_run(args, run, provenance)
    meter = metrics.start(args, run, "cogvideox-text-to-video-sft", clips.sources, first_step, plan.num_steps)

    # ---------------------------------------------------------------- validation, with the loop's own two functions
    encode = functools.partial(encode_batch, model, vae, embeds)
    losses_of = functools.partial(compute_losses, transformer, alphas_cumprod, dtype)
    held_out_batches = held_out.encode_clips(run, validation_set.held_out, encode, losses_of, len(alphas_cumprod))
    samples = validation.make_samples(args, run, model, validation_set, vae, embeds)
    validate = functools.partial(validation.validate, args, run, meter, engine, samples, held_out_batches)
    metrics.report_memory(meter, first_step, "before_training")
    if first_step == 0 and not args.no_first_validation:
        validate(0)

    # ---------------------------------------------------------------- loop
    num_strata = args.train_batch_size * run.num_ranks * plan.accumulation if args.stratified_timesteps else None
    micro_steps, loader = steps.make_loader(args, run, clips, plan, first_step)
    step, batches = first_step, meter.timed(INTERRUPTION.until_interrupted(loader, alone=run.num_ranks == 1))
    with exits.explained_oom(args, device, clips.clip_buckets, level, is_lora=False), meter:
        for micro_step, batch in zip(micro_steps, batches, strict=False):
            step = micro_step // plan.accumulation  # updates made before this one
            sample_ids = steps.sample_ids(run, micro_step, args.train_batch_size, len(batch["index"]))
            latents, prompt_embeds = encode(to_device(batch, device), run.seed, sample_ids)
            if args.text_dropout:
                no_text = objective.draw_uniform(run.seed, "text_dropout", sample_ids, device) < args.text_dropout
                prompt_embeds = torch.where(no_text.view(-1, 1, 1), empty_embeds.to(prompt_embeds), prompt_embeds)

            noise = objective.draw_normal(run.seed, "noise", sample_ids, latents.shape[1:], device)
            timesteps = objective.draw_timesteps(run.seed, sample_ids, len(alphas_cumprod), num_strata, device)  # [B]
            meter.copied()
            losses = losses_of(latents, prompt_embeds, noise, timesteps)  # [B]
            loss = losses.mean() / plan.micro_steps_in(step)
            meter.add(loss, losses, batch["index"])
            updated = update(loss, state, plan.is_last_of_update(micro_step), args.max_grad_norm)
            if not updated.stepped:
                continue

            # From here on: once per optimizer update
            step += 1
            meter.log(step, updated)
            if step % args.checkpointing_steps == 0:
                meter.pause()
                checkpoints.save(args, run, step, state, provenance)
            if exits.stop_is_due(run, step):
                break
            if validation.is_due(args, plan, step):
                validate(step)

    # ---------------------------------------------------------------- finish
    checkpoints.leave_if_interrupted(args, run, first_step, step, plan.num_steps, state, provenance)
    result.save(run, engine)
    validate(plan.num_steps)
    metrics.report_memory(meter, plan.num_steps, "after_testing")
    result.finish(args, run, summary)


def encode_batch(
    model, vae, embeds: dict, batch: dict, seed: int, sample_ids: list
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents [B, F, C, H, W], prompt_embeds [B, S, D]) of prepared moments or pixels."""
    if "moments" in batch:
        moments, prompt_embeds = batch["moments"], batch["prompt_embeds"]
    else:
        moments = encoding.encode_videos(vae, encoding.pixels_to_unit(batch["pixels"]))  # of [B, F', 3, h, w]
        prompt_embeds = to_device(torch.stack([embeds[prompt] for prompt in batch["prompt"]]), moments.device)

    noise = objective.draw_normal(seed, "posterior", sample_ids, inputs.latent_shape(moments), moments.device)
    latents = inputs.pad_frames(inputs.sample_latents(moments, noise, model.vae_config), model.patch_size_t)
    return latents, prompt_embeds


def compute_losses(transformer, alphas_cumprod, dtype, latents, prompt_embeds, noise, timesteps) -> torch.Tensor:
    """Loss [B] of the velocity that the transformer predicts at `timesteps` [B]."""
    noisy_latents = objective.add_noise(latents, noise, timesteps, alphas_cumprod)
    velocity = transformer(
        hidden_states=noisy_latents.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),  # [B, S, D]
        timestep=timesteps,
        image_rotary_emb=inputs.rotary_embeddings(transformer.config, latents),
        return_dict=False,
    )[0]
    return objective.v_prediction_loss(velocity, latents, noise, timesteps, alphas_cumprod)


if __name__ == "__main__":
    exits.run_script(lambda: main(ARGS), ARGS.output_dir)
