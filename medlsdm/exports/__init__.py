"""Checkpoints in the layouts that others' tools know: a MONAI bundle, a Hugging Face folder."""
