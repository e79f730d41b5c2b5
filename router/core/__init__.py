"""A request from its submission to its end: placed, recovered, ended once. Pure."""
