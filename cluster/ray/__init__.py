"""Ray, and what it runs for the controller: the only place that reserves, starts and stops."""
