"""The control plane on Ray: spec, placement, reconciliation, launchers and the command line."""
