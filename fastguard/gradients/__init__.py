"""Sorts gradients, and the tensors that belong to them, into buckets by device and dtype.

Modules; each one uses only modules listed before it:
    tensor_kinds    classifies tensors: plain tensors, placeholders, wrappers
    vectors         tensors as vectors of lengths that suit a CPU: joined, or split into pieces
    tensor_parts    splits composite tensors into parts, for copies
    transfer        moves small tensors between devices without a sync
    layout_guards   recognizes a known gradient layout with one call
    buckets         groups gradients by device and dtype
    unit_buckets    groups gradients with their weights, divided into units
    elementwise     clamps and replaces elements
    host_copies     copies many tensors to host memory
"""
