"""Reruns a model on a batch without side effects."""
