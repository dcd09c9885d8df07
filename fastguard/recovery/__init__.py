"""Recovery: snapshots, rollback, and a lowered learning rate."""
