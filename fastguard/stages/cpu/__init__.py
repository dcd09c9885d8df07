"""The stages on a CPU: at the speed of memory, norms true to float64."""
