"""One page on the last hours of a cluster: what `megatoken report` prints."""
