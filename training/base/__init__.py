"""What every other room builds on: mostly the standard library; torch.distributed only in ranks.py."""
