"""Who asks: keys, their limits, and what they may ask for."""
