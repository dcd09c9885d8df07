"""Going back: snapshots, rollback, and a lowered learning rate."""
