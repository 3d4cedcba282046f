"""From clip lists and video files to batches of one size; prepared latents equal those encoded during training."""
