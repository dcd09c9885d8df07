"""Reads checkpoint files, also foreign ones, without executing anything in them."""
