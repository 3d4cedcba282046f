"""What everything else stands on: hardly more than the standard library; torch in dtypes.py and ranks.py alone."""
