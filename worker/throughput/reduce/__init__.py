"""The process that sums: torch.distributed, forked ahead of time so that an epoch begins at once."""
