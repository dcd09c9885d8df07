"""`fastguard demo`: one small GPT trained three times through the same faults.

Bare PyTorch, PyTorch with `clip_grad_norm_`, and fastguard start from the same weights and see the
same batches and faults. What is here is meant to be read: `training.py` has the three ways.
"""
