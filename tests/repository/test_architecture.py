"""The rules of the repository, checked in the source: imports, banned calls, lengths, signatures.

Each rule is one test that lists its offenders.
"""

import ast
import graphlib
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from irongpt_kernels import Ops
from numerics import DECODING, OPS, UPDATES

from benchmarks.measure import result_file

ROOT = Path(__file__).resolve().parents[2]
IRONGPT = sorted(ROOT.glob("irongpt/**/*.py"))
KERNELS = sorted(ROOT.glob("kernels/irongpt_kernels/**/*.py"))
PACKAGED = IRONGPT + KERNELS
BENCHMARKS = sorted(ROOT.glob("benchmarks/**/*.py"))
EVERY_SOURCE = PACKAGED + BENCHMARKS + sorted(ROOT.glob("tests/**/*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"])
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
BANNED_METHODS = {("torch", "load"), ("os", "system"), ("os", "popen")}
PERSONAL_PATH = re.compile(r"/(?:home|Users|root|work|tmp/\w+)/\w|[A-Z]:\\+Users")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(path: Path) -> str:
    parts = path.relative_to(ROOT / "kernels" if path in KERNELS else ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(source: ast.AST) -> Iterator[str]:
    """Top-level packages that a module imports, at any place. Relative imports give '.'."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0] if node.module and not node.level else "."


def import_graph(sources: Mapping[str, ast.AST]) -> dict[str, set[str]]:
    """Which of these modules each one imports, at the top or inside a function."""
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(source):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & sources.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                for full in (f"{node.module}.{alias.name}" for alias in node.names):
                    graph[name] |= {full if full in sources else node.module} & sources.keys()
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def dangers(source: ast.AST) -> list[str]:
    """Calls and imports that could run or unpack untrusted data."""
    found = [package for package in imports(source) if package in BANNED_IMPORTS]
    for node in ast.walk(source):
        if isinstance(node, ast.Name) and node.id in BANNED_CALLS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            unpacks = node.attr in ("extractall", "unpack_archive")
            if unpacks or (owner, node.attr) in BANNED_METHODS:
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            found += [a.name for a in node.names if (node.module, a.name) in BANNED_METHODS]
        elif isinstance(node, ast.keyword):
            value = getattr(node.value, "value", True)  # an expression may be true
            if node.arg in ("shell", "allow_pickle") and value:
                found.append(f"{node.arg}={value}")
    return found


def undocumented(source: ast.Module) -> list[str]:
    """The module and its public functions and classes, as far as they have no docstring."""
    public = [
        node
        for node in source.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not node.decorator_list  # the docstring of the module explains a Triton kernel
    ]
    missing = [node.name for node in public if not ast.get_docstring(node)]
    return missing if ast.get_docstring(source) else ["the module", *missing]


def broken_links(page: Path) -> list[str]:
    """Links to files and headings of this repository that do not exist."""
    broken = []
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http:", "https:")):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(link)
    return broken


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_this_file_finds_the_sources() -> None:
    assert {"model.py", "config.py", "eager.py", "dropout.py"} <= {path.name for path in PACKAGED}
    assert Path(__file__).resolve() in EVERY_SOURCE
    assert BENCHMARKS
    assert ROOT / "README.md" in PAGES


def test_imports_follow_the_one_arrow() -> None:
    """benchmarks -> irongpt -> irongpt_kernels -> torch, triton. The emulator has NumPy too."""
    for_kernels = sys.stdlib_module_names | {"irongpt_kernels", "torch", "triton"}
    above = {"benchmarks", "tests", "numerics", "."}
    offenders = {name(p): set(imports(tree(p))) - for_kernels for p in KERNELS}
    for p in (p for p in KERNELS if p.parent.name == "ptx"):
        offenders[name(p)] -= {"numpy"}
    offenders |= {name(p): set(imports(tree(p))) & above for p in IRONGPT}
    offenders |= {name(p): set(imports(tree(p))) & (above - {"benchmarks"}) for p in BENCHMARKS}
    assert {path: wrong for path, wrong in offenders.items() if wrong} == {}


def test_there_is_no_circle_of_imports() -> None:
    sources = {module(path): tree(path) for path in PACKAGED + BENCHMARKS}
    assert cycle(import_graph(sources)) == []


@pytest.mark.parametrize(
    ("second", "found"),
    [
        ("import package.one", True),
        ("from package import one", True),
        ("from package.one import f", True),
        ("def f():\n    from package.one import f", True),
        ("from package import other", False),
        ("import os", False),
    ],
)
def test_the_search_for_circles_sees(second: str, found: bool) -> None:
    sources = {"package": "", "package.one": "from package import two", "package.two": second}
    graph = import_graph({name: ast.parse(source) for name, source in sources.items()})
    assert bool(cycle(graph)) == found


def test_no_triton_without_fused_ops() -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
        "import irongpt.model, irongpt.ops, irongpt_kernels.eager, torch\n"
        "for name in ('eager', 'builtin'): irongpt.ops.load(name, torch.device('cpu'))\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'triton'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_are_short() -> None:
    limits = {path: 450 for path in EVERY_SOURCE if path.name != "eager.py"}
    limits[ROOT / "README.md"] = 170
    lengths = {path: len(path.read_text().splitlines()) for path in limits}
    assert {name(p): n for p, n in lengths.items() if n > limits[p]} == {}


def test_the_packages_do_not_run_what_they_read() -> None:
    """Except `ptx.blocks`, which makes functions of the PTX that Triton has just compiled."""
    emulator = ROOT / "kernels" / "irongpt_kernels" / "ptx" / "blocks.py"
    assert dangers(tree(emulator)) == ["exec", "compile"]
    found = {name(path): dangers(tree(path)) for path in PACKAGED if path != emulator}
    assert {path: calls for path, calls in found.items() if calls} == {}


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
    """eager, builtin, and fused if Triton is installed."""
    return ["eager", "builtin"] + ["fused"] * bool(importlib.util.find_spec("triton"))


@pytest.mark.parametrize("implementation", implementations())
def test_every_implementation_has_the_ops_and_signatures_of_the_protocol(
    implementation: str,
) -> None:
    implemented = importlib.import_module(f"irongpt_kernels.{implementation}")
    ops = {op: f for op, f in vars(Ops).items() if not op.startswith("_")}
    assert set(ops) == {*OPS, *UPDATES, *DECODING}
    for op, declared in ops.items():
        wanted, got = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (declared, getattr(implemented, op))
        )
        assert got == wanted[1:], op  # without self
        assert getattr(implemented, op).__doc__, op


def test_the_kernels_package_documents_its_public_names() -> None:
    found = {name(path): undocumented(tree(path)) for path in KERNELS}
    assert {path: names for path, names in found.items() if names} == {}


def test_no_file_names_a_path_of_a_developers_machine() -> None:
    notebooks, results = ROOT.glob("benchmarks/*.ipynb"), ROOT.glob("benchmarks/results/*/*.json")
    settings = [ROOT / file for file in ("Makefile", "pyproject.toml", ".ci/run", ".gitignore")]
    settings += ROOT.glob(".github/**/*.yml")
    found = {
        name(path): PERSONAL_PATH.findall(path.read_text())
        for path in [*EVERY_SOURCE, *PAGES, *notebooks, *results, *settings]
    }
    assert {path: paths for path, paths in found.items() if paths} == {}


def test_the_links_of_every_page_resolve() -> None:
    found = {name(page): broken_links(page) for page in PAGES}
    assert {page: links for page, links in found.items() if links} == {}


def test_every_module_that_a_page_runs_exists() -> None:
    missing = {
        (name(page), target)
        for page in PAGES
        for target in re.findall(
            r"python -m ((?:benchmarks|tests|irongpt\w*)[\w.]*\w)", page.read_text()
        )
        if not any(
            (ROOT / folder / target.replace(".", "/") / file).with_suffix(".py").exists()
            for folder in ("", "kernels")
            for file in ("", "__main__")
        )
    }
    assert missing == set()


def test_a_wheel_has_every_folder_with_sources() -> None:
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    find = settings["packages"]["find"]
    packages = {
        package
        for folder in find["where"]
        for package in setuptools.find_packages(ROOT / folder, include=find["include"])
    }
    assert packages == {module(path.parent / "__init__.py") for path in PACKAGED}
    assert settings["package-data"] == {p: ["py.typed"] for p in ("irongpt", "irongpt_kernels")}
    assert all((ROOT / p / "py.typed").exists() for p in ("irongpt", "kernels/irongpt_kernels"))


def test_results_are_read_and_written_where_the_pages_say() -> None:
    assert result_file.FOLDER == ROOT / "benchmarks" / "results"
