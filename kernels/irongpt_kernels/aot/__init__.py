"""Compiles the kernels for a GPU that need not be there."""
