"""Optimizers and learning-rate schedules."""

from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler


def make_optimizer_from_args(args, params: Iterable[torch.nn.Parameter], learning_rate: float):
    """Adam or AdamW on `params` (fp32)."""
    params = list(params)
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return optimizer_class(
        params,
        lr=learning_rate,
        betas=(args.beta1, args.beta2),
        eps=args.epsilon,
        weight_decay=args.weight_decay,
        # One kernel, and no list of temporaries as large as the weights
        fused=params[0].is_cuda,
    )


def make_lr_scheduler_from_args(args, optimizer: torch.optim.Optimizer, num_steps: int):
    """diffusers' schedule over `num_steps` optimizer updates, stepped once per update."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
