"""One typed file that configures a whole guarded run."""

from fastguard.config.sections import GuardConfig as GuardConfig
