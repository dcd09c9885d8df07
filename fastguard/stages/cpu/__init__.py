"""The stages on a CPU: at the speed of memory, with norms close to float64 accuracy."""
