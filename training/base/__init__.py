"""What every other room builds on: mostly the standard library; torch in three files only."""
