"""One training run, from settings to final weights."""
