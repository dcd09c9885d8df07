"""`fastguard demo`: trains one small GPT three times through the same faults.

Bare PyTorch, PyTorch with `clip_grad_norm_`, and fastguard start from the same weights and see the
same batches and faults. Read `training.py` for the three ways to step.
"""
