"""What everything else stands on: hardly more than the standard library; torch.distributed in ranks.py alone."""
