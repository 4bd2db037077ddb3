"""Empty on purpose: what runs is what each site installed."""
