"""The router's process: services, links, loops and metrics around the core."""
