"""The levels of --memory, by name."""

LEVELS = ("speed", "balanced", "offload", "stream")  # fastest first
# Activations saved for the backward pass are in host memory; in `stream` the weights are too. LoRA only, whose frozen
# weights never change. T5 is streamed; validation has one model at a time on the GPU and denoises guidance's two
# samples one by one.
HOST_LEVELS = ("offload", "stream")
