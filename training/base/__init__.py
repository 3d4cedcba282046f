"""What everything else stands on: hardly more than the standard library; torch in three files alone."""
