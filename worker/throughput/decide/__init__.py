"""Epochs, ranks and counts of the collective. Pure."""
