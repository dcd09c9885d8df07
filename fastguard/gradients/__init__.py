"""Sorts gradients, and tensors that belong to them, by device and dtype into buckets.

Modules, each building on those before it:
    tensor_kinds    plain tensors, placeholders, and tensor wrappers
    tensor_parts    the components of a tensor, for copies
    transfer        moves small tensors between devices without a sync
    layout_guards   recognises a known gradient layout with one call
    buckets         gradients by device and dtype
    unit_buckets    gradients with their weights, divided into units
    cpu_threads     what a CPU reads on one thread
    elementwise     clamps and replaces elements
    host_copies     copies many tensors to host memory
"""
