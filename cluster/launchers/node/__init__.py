"""Ray on one machine: its command, its environment, and the process that supervises it."""
