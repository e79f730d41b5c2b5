"""What the controller tells Prometheus: its gauges, and where every process can be scraped."""
