"""The attention processor, its kernels, and the trial that picks the fastest one on this GPU."""
