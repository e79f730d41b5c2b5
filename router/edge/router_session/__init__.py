"""The edge's session with its router, and the streams in it."""
