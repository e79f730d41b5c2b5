"""Which ranks go onto which devices, and why some go nowhere. Pure."""
