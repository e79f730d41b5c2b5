"""The Tokens contract in Python: columns of frames, what a message may hold, pieces of what is large."""
