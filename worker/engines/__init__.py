"""Engines: what generates tokens behind one protocol."""
