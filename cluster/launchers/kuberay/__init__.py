"""Kubernetes: the RayCluster that a spec makes, and the API server that takes it."""
