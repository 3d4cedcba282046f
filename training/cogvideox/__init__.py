"""Everything specific to CogVideoX: in training, a transformer sees what diffusers' pipeline feeds it."""
