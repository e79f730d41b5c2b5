"""Commands that show a running cluster and change nothing."""
