"""`fastguard ckpt`: list, verify and roll back checkpoints."""
