"""IronGPT: a GPT from scratch with Triton kernels, made to train at the hardware's limit."""

__version__ = "0.1.0"
