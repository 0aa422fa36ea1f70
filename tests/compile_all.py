"""
Compiles every kernel as its launcher launches it, for a GPU that need not be there.

    python tests/compile_all.py 75      prints JSON, one entry per compiled kernel, and what failed

The ops run on small CPU tensors, without the interpreter; a launch, instead of running, compiles
its kernel by the path of Triton's own launch (types, constants and alignment of the arguments).
Results of the ops are garbage then. A process of its own: TRITON_INTERPRET must not be set.
"""

import importlib
import itertools
import json
import pkgutil
import sys
import time
from typing import Any
from unittest.mock import patch

import irongpt_kernels
import torch
import triton
from numerics import randn, run
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


def kernels() -> dict[str, JITFunction]:
    """Every @triton.jit function of the package, those that other kernels call too."""
    found = {}
    for info in pkgutil.iter_modules(irongpt_kernels.__path__):
        module = importlib.import_module(f"irongpt_kernels.{info.name}")
        for name, x in vars(module).items():
            if isinstance(x, JITFunction) and x.fn.__module__ == module.__name__:
                found[f"{info.name}.{name}"] = x
    return found


def cases(dtype: torch.dtype, arch: int) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(op, inputs, options): the shapes that decide how a kernel is compiled.

    Attention takes LLVM up to half a minute a kernel where its products are scalar: always in
    float32, and in float16 on a T4. So it is compiled in float32 for one architecture only, and
    with dropout or without, not both.
    """

    def rows(N: int) -> torch.Tensor:
        return randn(48, N, dtype=dtype)

    weight, bias = randn(384, dtype=dtype), randn(384, dtype=dtype)
    x = rows(384)
    targets = torch.arange(48)
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("layer_norm", dict(x=x, weight=weight, bias=bias), {}),
        ("layer_norm", dict(x=x, weight=weight, bias=None), {}),
        ("softmax", dict(x=x), dict(scale=0.5)),
        ("softmax", dict(x=rows(20_000)), {}),
        ("softmax", dict(x=randn(2, 64, 64, dtype=dtype)), dict(causal=True)),
        ("cross_entropy", dict(logits=rows(109), targets=targets), {}),
        ("cross_entropy", dict(logits=rows(50257), targets=targets), {}),
        ("gelu", dict(x=x, bias=bias), {}),
        ("gelu", dict(x=x, bias=None), {}),
    ]
    dropout = dict(dropout_p=0.2, seed=1)
    for options in ({}, dropout):
        inputs = dict(branch=x, residual=rows(384), weight=weight, bias=bias)
        found.append(("dropout_add_layer_norm", inputs, options))
    if dtype != torch.float32 or arch == 75:
        q, k, v = randn(2, 96, 3, 4, 64, dtype=dtype).transpose(1, 3).unbind(2)
        found.append(
            ("causal_attention", dict(q=q, k=k, v=v), dropout if dtype == torch.float16 else {})
        )
    return found


def compile_all(arch: int) -> dict[str, Any]:
    from irongpt_kernels import fused, launch

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    names = {x: name for name, x in kernels().items()}
    compiled: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    case = ""

    def compile_instead(
        self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **{"debug": False, **kwargs})
        options, signature, constants, attrs = self._pack_args(
            backend, {"debug": False, **kwargs}, bound, specialization, options
        )
        key = f"{names[self]} {signature} {constants} {attrs} {options}"
        if key in compiled or key in failed:
            return
        start = time.perf_counter()
        try:
            source = ASTSource(self, signature, constants, attrs)
            made = triton.compile(source, target=target, options=options.__dict__)
        except Exception as e:  # every kernel is tried, and the test names all that fail
            failed[key] = f"{names[self]} in {case}: {type(e).__name__}: {str(e)[-300:]}"
            return
        compiled[key] = dict(
            kernel=names[self],
            case=case,
            seconds=time.perf_counter() - start,
            shared=made.metadata.shared,
            warps=made.metadata.num_warps,
            bf16="bf16" in made.asm["ttir"],
        )

    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if arch >= 80 else [])
    with (
        patch.object(JITFunction, "run", compile_instead),
        patch.object(launch, "architecture", lambda device: arch),
    ):
        for dtype in dtypes:
            for name, inputs, options in cases(dtype, arch):
                case = f"{name} {dtype} {options}"
                op = getattr(fused, name)
                with torch.no_grad():
                    out = op(**inputs, **options)
                out = out if isinstance(out, tuple) else (out,)
                run(op, inputs, tuple(torch.ones_like(y) for y in out), **options)
    launched = {x.fn for x in names if any(e["kernel"] == names[x] for e in compiled.values())}
    used = {x.fn.__name__ for x in names if x.fn in launched}
    texts = " ".join(x.src for x in names)
    called = {x.fn.__name__ for x in names if texts.count(f"{x.fn.__name__}(") > 1}
    return dict(
        compiled=list(compiled.values()),
        failed=list(failed.values()),
        idle=sorted(n for x, n in names.items() if x.fn.__name__ not in used | called),
    )


if __name__ == "__main__":
    print(
        json.dumps({arch: compile_all(int(arch)) for arch in itertools.islice(sys.argv, 1, None)})
    )
