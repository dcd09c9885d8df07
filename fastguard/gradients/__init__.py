"""Gradients, and what lies beside them, sorted by device and dtype into buckets.

Modules, in the order in which they build on each other:
    tensor_kinds    plain tensors, placeholders, tensors around tensors
    tensor_parts    what a tensor is made of, for copies
    transfer        moving small tensors between devices without a wait
    layout_guards   a gradient layout seen before is recognised in one call
    buckets         gradients by device and dtype
    unit_buckets    gradients beside their weights, divided into units
    cpu_threads     what a CPU reads on one thread
    elementwise     clamping and cleaning, element by element
    host_copies     copies of many tensors in host memory
"""
