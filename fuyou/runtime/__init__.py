"""The schedule, what is installed on the model, the optimizer facade, and measuring."""
