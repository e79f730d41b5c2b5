"""A fleet over ssh: the steps, run from here or written as a script."""
