"""What comes in from workers: frames taken apart, and each token put where its request is."""
