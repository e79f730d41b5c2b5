"""The `megatoken` command: a file a command."""
