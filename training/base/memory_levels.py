"""The levels of --memory, by name."""

LEVELS = ("speed", "balanced", "offload", "stream")  # fastest first
# What is saved for the backward pass lies in host memory, in `stream` the weights do too. For LoRA: frozen weights never
# change. T5 is streamed, and of a video guidance's two samples are denoised one after the other.
HOST_LEVELS = ("offload", "stream")
