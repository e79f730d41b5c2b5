"""What every process of ours does: start, end with its owner, look after its loops. Nothing here knows the work."""
