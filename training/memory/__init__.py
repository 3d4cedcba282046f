"""Memory techniques on a plain nn.Module: recompute, offload, streaming, quantization; and the estimate of a run."""
