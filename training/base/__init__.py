"""What everything else stands on: hardly more than the standard library; torch in ranks.py and tensor_file.py alone."""
