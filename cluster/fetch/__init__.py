"""`megatoken fetch`: the same weights on every node, copied from a node that has them."""
