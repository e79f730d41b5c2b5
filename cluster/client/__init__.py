"""How commands reach a running cluster: its record on this machine, its control service, and the wait for it."""
