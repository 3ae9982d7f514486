"""`fuyou doctor`: what this machine is, what of it holds fuyou back, and what would cure that."""
