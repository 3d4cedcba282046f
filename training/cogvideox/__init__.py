"""The CogVideoX models: in training, a transformer sees what diffusers' pipeline feeds it."""
