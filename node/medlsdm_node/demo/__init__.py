"""Three hospitals and a coordinator on one machine, driven by their command lines as users would."""
