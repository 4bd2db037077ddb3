"""How good synthetic volumes are."""
