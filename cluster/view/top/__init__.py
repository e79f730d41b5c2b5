"""`megatoken top`: the live full-screen view."""
