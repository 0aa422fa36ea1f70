"""IronGPT: a GPT from scratch, made to train at the limit of the hardware."""

__version__ = "0.1.0"
