"""The state dict of a guarded optimizer: the state of the wrapped optimizer and of the guard."""
