"""Reads checkpoint files, including files of other programs, without executing them."""
