"""Checkpoints in `torch.distributed.checkpoint` format: a folder of shards and its metadata."""
