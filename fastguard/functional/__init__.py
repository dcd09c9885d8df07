"""The functions of `torch.nn.utils`, eager and compiled, and gradients in one flat buffer.

Modules:
    arguments       checks of arguments
    clip            the drop-in functions
    adaptive        `clip_grad_adaptive_`, eager and compiled
    ops, compiled   the drop-in functions under `torch.compile`
    flat_buckets    `FlatGradBuckets`
    patch           `patch_torch`
"""
