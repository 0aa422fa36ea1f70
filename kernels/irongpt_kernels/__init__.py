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
| `muon_momentum(grads, momentum, unscaled, *, beta, dtype)` | n of (R, C), (n, R, C) | (n, R, C) |
| `muon_update(params, copies, update, lr, unscaled, *, scale, weight_decay)` | lists, (n, R, C) | |

`dropout_add_layer_norm` returns the sum and its norm; the last four are an optimizer's step. The
next ones write one token of B texts: they have no gradient, write into tensors that stay where they
are, and wait for nothing, so that one CUDA graph holds a token. Their specification is
`decode_eager`.

| op | inputs | result |
|---|---|---|
| `embed_tokens(tokens, counts, wte, wpe)` | (B, N), (B, 2) int64, (V, C), (T, C) | (B, C) |
| `norm_linear(x, weight, norm_weight, norm_bias, bias, gelu, eps)` | (B, K), (N, K) | (B, N) |
| `cached_attention(qkv, cache_k, cache_v, position, *, scale)` | (B, 1, 3, H, D) | (B, 1, H, D) |
| `linear_add(x, weight, residual, bias)` | (B, K), (N, K), (B, N) | (B, N) |
| `draw_tokens(logits, tokens, counts, seed, temperature, top_k, top_p)` | (B, V) | writes |

A caller takes one of the modules and uses it; nothing is chosen here. Importing this package, eager
or builtin imports no Triton.

`seed` is a Python int or a 0-d int64 tensor on the device of the inputs. The elements that `eager`
drops are a pure function of the seed and the position (see `dropout`). `builtin` alone drops by
PyTorch's global generator and ignores the seed.

B batch, H heads, T positions, D head dimension, N features, M rows, V vocabulary.
"""
