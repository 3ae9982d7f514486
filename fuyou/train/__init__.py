"""`fuyou train`: configuration, data, the loop. The only layer that imports transformers, and only when it is used."""
