"""The Triton kernels and their launchers, installed and imported as `fastguard.kernels`.

This folder imports torch and triton alone. The stages of fastguard import it lazily, when they meet
the first GPU tensor, so a machine without triton never notices it.
"""
