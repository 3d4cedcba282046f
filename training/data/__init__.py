"""Clips in, batches of one size out; what is prepared on disk is the same as what is computed on the way."""
