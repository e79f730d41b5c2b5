"""What is told of the cluster beside its status: gauges and targets for Prometheus, best rates, the last days."""
