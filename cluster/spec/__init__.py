"""The spec: what an operator may write, with defaults, and how it is read and compared."""
