"""`fastguard diagnose`: check a training setup from the command line."""
