"""The levels of --memory, by name."""

LEVELS = ("speed", "balanced", "offload", "stream")  # fastest first
# What is saved for the backward pass lies in host memory, in `stream` the weights do too. For LoRA: frozen weights never
# change. T5 is streamed, and videos are rendered in small pieces.
HOST_LEVELS = ("offload", "stream")
