"""Checkpoints of `torch.distributed.checkpoint`: a folder of shards and its metadata."""
