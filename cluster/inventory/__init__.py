"""What there is to place on, and how large models are. Pure."""
