"""What the denoiser learns and how it is sampled."""
