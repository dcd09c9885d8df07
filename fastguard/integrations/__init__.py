"""Integrations with trainers; one module per framework, imported on demand."""
