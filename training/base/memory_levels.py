"""The levels of --memory, by name, and what full fine-tuning needs for those that keep things in host memory."""

LEVELS = ("speed", "balanced", "offload", "stream")  # fastest first
# Activations saved for the backward pass are in host memory, in full fine-tuning optimizer states and gradients too, and
# in `stream` the blocks' weights. T5 is streamed; validation denoises guidance's two samples one by one, and has one
# model at a time on the GPU if the VAE has no room beside the transformer.
HOST_LEVELS = ("offload", "stream")
# Where full fine-tuning has its fp32 weights and optimizer states: all on the GPU, the weights in fp32 or split into
# bf16 and the rest; the rest and the states in host memory, updated block by block on the GPU; all in host memory,
# updated by the CPU
FP32, SPLIT, RING, HOST = "fp32", "split", "ring", "host"
ON_HOST_INSTEAD = "--memory balanced with --use_cpu_offload_optimizer --offload_gradients"


def obstacle_to_splitting_from_args(args) -> tuple[str, str] | None:
    """(flag, what to do instead) if full fine-tuning cannot split its fp32 weights into bf16 and the rest; else None.

    Such weights and the states of Adam can be updated block by block from host memory (engine/state_ring.py).
    """
    if args.mixed_precision in ("no", "fp16"):
        return f"--mixed_precision {args.mixed_precision}", f"--mixed_precision bf16, or {ON_HOST_INSTEAD}"
    if args.optimizer not in ("adam", "adamw"):
        return f"--optimizer {args.optimizer}", f"--optimizer adamw, or {ON_HOST_INSTEAD}"
    for dest in ("use_4bit", "use_fp8", "use_torchao"):
        if getattr(args, dest):
            return f"--{dest}", f"--use_8bit, or no --{dest}: fp32 states take no GPU memory there"
    return None
