"""All that is known of CogVideoX: a transformer sees in training what diffusers' pipeline feeds it."""
