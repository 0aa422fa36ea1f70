"""Bugs planted into the kernels one at a time, to see that the tests find them: see `run`."""
