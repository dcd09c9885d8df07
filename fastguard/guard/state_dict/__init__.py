"""The state dict of a guarded optimizer: that of the wrapped one, and the guard's own state."""
