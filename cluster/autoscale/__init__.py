"""How many replicas a model needs: what arrives and waits, against what one replica can do. Pure."""
