"""Memory techniques on a plain nn.Module: recompute, offload, streaming, quantization; and a run's memory estimate."""
