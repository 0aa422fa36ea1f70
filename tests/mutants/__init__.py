"""Mutation tests: bugs injected into the kernels, one at a time, which the tests must find."""
