"""Compiles the kernels ahead of time for a GPU architecture; no GPU is needed."""
