"""An engine without a model, for scale and faults. Whatever it makes is labelled simulated."""
