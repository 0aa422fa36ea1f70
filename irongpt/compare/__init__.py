"""The `irongpt compare` command: the kernels against eager PyTorch."""
