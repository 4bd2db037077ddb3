"""From (scan, label map) pairs to weights: patients, two stages, one loop."""
