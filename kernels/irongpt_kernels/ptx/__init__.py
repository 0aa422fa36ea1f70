"""Executes the compiled PTX of the kernels on a CPU, with checks: see `driver`."""
