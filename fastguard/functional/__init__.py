"""The functions of `torch.nn.utils`, eager and compiled, and gradients in one flat buffer.

Modules:
    arguments       checks of arguments
    clip            the drop-in functions
    measure_and_sanitize
                    `measure_grads`, `sanitize_grads_`
    adaptive        `clip_grad_adaptive_`, eager and compiled
    ops, compiled   the drop-in functions under `torch.compile`
    flat_buckets, flat_layout
                    `FlatGradBuckets`
    patch           `patch_torch`
"""
