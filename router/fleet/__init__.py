"""What a router knows of the replicas: members, load, capacity, health, cached prefixes. Pure."""
