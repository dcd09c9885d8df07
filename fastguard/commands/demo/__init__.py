"""`fastguard demo`: trains one small GPT three times through the same faults.

Bare PyTorch, PyTorch with `clip_grad_norm_`, and fastguard start from the same weights and get the
same batches and faults. `training.py` contains the three ways to step.
"""
