"""Runs a model on a batch again without leaving a trace in it."""
