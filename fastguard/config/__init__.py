"""Configures a whole guarded run from one typed file."""

from fastguard.config.sections import GuardConfig as GuardConfig
