"""Whether a request may come in. Pure."""
