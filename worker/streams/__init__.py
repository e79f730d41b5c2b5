"""Streams at a worker: which run, and what is on its way out."""
