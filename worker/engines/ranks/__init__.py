"""vLLM's Ray executor inside a replica's own placement group, on GPUs and on CPUs."""
