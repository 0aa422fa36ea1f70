"""The operations of a GPT, in interchangeable implementations with one signature each.

    import irongpt_kernels.eager      plain PyTorch: the specification, and the oracle of every test
    import irongpt_kernels.builtin    PyTorch's own fused functions: scaled_dot_product_attention...
    import irongpt_kernels.fused      Triton kernels, each in the file of its name

| op | inputs | result |
|---|---|---|
| `causal_attention(q, k, v, *, dropout_p, seed, scale)` | (B, H, T, D) each | (B, H, T, D) |
| `causal_attention_packed(qkv, *, dropout_p, seed, scale)` | (B, T, 3, H, D) | (B, T, H, D) |
| `layer_norm(x, weight, bias, eps, dtype)` | (..., N), (N,), (N,) or None | (..., N) |
| `softmax(x, *, scale, causal)` | (..., N); causal: (..., T, T) | like x |
| `cross_entropy(logits, targets, ignore_index)` | (M, V), (M,) int64 | mean, 0-d |
| `gelu(x, bias)` | (..., N), (N,) or None | (..., N) |
| `dropout_add_layer_norm(branch, residual, weight, bias, *, dropout_p, seed, eps)` | (..., N) | 2 |
| `unscale(grads, scale, good_steps, steps, *, max_norm, calm)` | lists | norm, divisor, overflow |
| `adamw(params, copies, grads, exp_avgs, exp_avg_sqs, steps, lr, unscaled, *, ...)` | lists | |

`dropout_add_layer_norm` returns the sum and its norm; the last two are an optimizer's step. A
caller takes one of the modules and uses it; nothing is chosen here. Importing this package, eager
or builtin imports no Triton.

`seed` is a Python int or a 0-d int64 tensor on the device of the inputs. The elements that `eager`
drops are a pure function of the seed and the position (see `dropout`). `builtin` alone drops by
PyTorch's global generator and ignores the seed.

B batch, H heads, T positions, D head dimension, N features, M rows, V vocabulary.
"""
