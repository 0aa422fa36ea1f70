"""Launch options, argument checks and compiler hooks that all kernels share."""
