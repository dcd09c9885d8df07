"""Reads checkpoint files, including those of other programs, without executing them."""
