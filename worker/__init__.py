"""The worker: one replica, its engine, and the gRPC server in front of it."""
