"""The hospital's program."""
