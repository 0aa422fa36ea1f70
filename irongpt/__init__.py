"""IronGPT: a GPT from scratch, with Triton kernels."""

__version__ = "0.1.0"
