"""The rules of the house, read off the source: imports, banned calls, lengths, signatures."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from irongpt_kernels import Ops
from numerics import DECODING, OPS, UPDATES

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted([*ROOT.glob("irongpt/**/*.py"), *ROOT.glob("kernels/irongpt_kernels/**/*.py")])
KERNELS = [path for path in SHIPPED if "irongpt_kernels" in path.parts]
EVERY_SOURCE = SHIPPED + sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
BANNED_METHODS = {("torch", "load"), ("os", "system"), ("os", "popen")}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a module imports, wherever in it. Relative imports give '.'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0] if node.module and not node.level else "."


def dangers(tree: ast.AST) -> list[str]:
    """What may run or unpack more than was asked for."""
    found = [name for name in imports(tree) if name in BANNED_IMPORTS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in BANNED_CALLS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (
                node.attr in ("extractall", "unpack_archive")
                or (owner, node.attr) in BANNED_METHODS
            ):
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            found += [a.name for a in node.names if (node.module, a.name) in BANNED_METHODS]
        elif isinstance(node, ast.keyword):
            value = getattr(node.value, "value", True)  # what is no literal may be true
            if (node.arg == "shell" and value) or (node.arg == "allow_pickle" and value):
                found.append(f"{node.arg}={value}")
    return found


def test_the_sources_are_where_this_file_looks() -> None:
    assert {"model.py", "config.py", "eager.py", "dropout.py"} <= {path.name for path in SHIPPED}
    assert Path(__file__).resolve() in EVERY_SOURCE


@pytest.mark.parametrize("path", KERNELS, ids=named)
def test_kernels_import_pytorch_triton_and_nothing_else(path: Path) -> None:
    """The one arrow: irongpt -> irongpt_kernels -> torch, triton."""
    allowed = sys.stdlib_module_names | {"irongpt_kernels", "torch", "triton"}
    assert set(imports(ast.parse(path.read_text()))) <= allowed


@pytest.mark.parametrize("module", ["irongpt_kernels", "irongpt_kernels.eager", "irongpt.model"])
def test_no_triton_without_fused_ops(module: str) -> None:
    code = (
        f"import sys, {module}, irongpt_kernels.builtin, irongpt.ops, torch\n"
        "for name in ('eager', 'builtin'): irongpt.ops.load(name, torch.device('cpu'))\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'triton'))"
    )
    path = [str(ROOT), str(ROOT / "kernels")]
    code = f"import sys; sys.path[:0] = {path!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", EVERY_SOURCE, ids=named)
def test_a_file_has_at_most_450_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_nothing_shipped_runs_what_it_reads(path: Path) -> None:
    assert dangers(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load(f)",
        "from torch import load",
        "eval(x)",
        "run = exec",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=flag)",
        "np.load(f, allow_pickle=True)",
        "archive.extractall(p)",
        "os.system(x)",
    ],
)
def test_the_ban_sees(code: str) -> None:
    assert dangers(ast.parse(code))


@pytest.mark.parametrize("code", ["model.eval()", "torch.compile(f)", "json.load(f)", "re.compile"])
def test_the_ban_does_not_see(code: str) -> None:
    assert not dangers(ast.parse(code))


def implementations() -> list[str]:
    """Those that there are. fused needs Triton to be imported."""
    names = ["eager", "builtin"]
    if importlib.util.find_spec("irongpt_kernels.fused") and importlib.util.find_spec("triton"):
        names.append("fused")
    return names


@pytest.mark.parametrize("name", implementations())
def test_every_implementation_has_the_ops_and_signatures_of_the_protocol(name: str) -> None:
    module = importlib.import_module(f"irongpt_kernels.{name}")
    ops = {op: f for op, f in vars(Ops).items() if not op.startswith("_")}
    assert set(ops) == {*OPS, *UPDATES, *DECODING}
    for op, declared in ops.items():
        wanted, got = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (declared, getattr(module, op))
        )
        assert got == wanted[1:], op  # without self
        assert getattr(module, op).__doc__, op


@pytest.mark.parametrize("path", KERNELS, ids=named)
def test_the_kernels_package_documents_what_it_offers(path: Path) -> None:
    tree = ast.parse(path.read_text())
    offered = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not node.decorator_list  # a Triton kernel is explained in its module's docstring
    ]
    assert ast.get_docstring(tree)
    assert [node.name for node in offered if not ast.get_docstring(node)] == []
