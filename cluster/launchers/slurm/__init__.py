"""A Slurm job that is a cluster: its script, and the commands that submit it, follow it and end it."""
