"""What is kept of each stream: its slot, its history, and what its client has not had yet. Pure."""
