"""How a cluster comes up: the files it lives in, the process that owns Ray, and its guard."""
