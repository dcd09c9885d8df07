"""Triton kernels and their launchers, installed and imported as `fastguard.kernels`.

The stages of fastguard import this package when they get the first GPU tensor, so a machine without
triton never needs it. It imports only torch, triton and numpy.
"""
