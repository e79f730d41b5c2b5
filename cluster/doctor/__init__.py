"""`megatoken doctor`: what is looked at on each node, and what is said of it."""
