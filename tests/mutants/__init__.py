"""Mutation tests: bugs planted into the kernels, one at a time, which the tests must find."""
