"""What moves: weights, gradients, optimizer state, activations. The four meet only in runtime/schedule.py."""
