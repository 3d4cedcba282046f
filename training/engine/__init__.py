"""LoRA and full fine-tuning: trainable weights, optimizers, the training objective and the update."""
