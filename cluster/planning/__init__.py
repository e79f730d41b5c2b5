"""A spec held against an inventory before anything is started: its needs, its plan, what is wrong with it."""
