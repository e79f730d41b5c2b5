"""One module for each way that a client's call is served."""
