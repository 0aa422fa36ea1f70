"""The rules of the repository, checked in the source: imports, banned calls, lengths, signatures.

For each rule a test lists the places that break it.
"""

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
from irongpt_kernels import Ops
from numerics import FUNCTIONS

from benchmarks.measure import result_file
from tests.mutants import run as mutants

ROOT = Path(__file__).resolve().parents[2]
IRONGPT = sorted(ROOT.glob("irongpt/**/*.py"))
KERNELS = sorted(ROOT.glob("kernels/irongpt_kernels/**/*.py"))
PACKAGED = IRONGPT + KERNELS
BENCHMARKS = sorted(ROOT.glob("benchmarks/**/*.py"))
EVERY_SOURCE = PACKAGED + BENCHMARKS + sorted(ROOT.glob("tests/**/*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"])
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
BANNED_METHODS = {"torch.load", "os.system", "os.popen"}
UNPACKING = {"extractall", "unpack_archive", "all_gather_object", "broadcast_object_list"}
PERSONAL_PATH = re.compile(r"/(?:home|Users|root|work|tmp/\w+)/\w|[A-Z]:\\+Users")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(path: Path) -> str:
    parts = path.relative_to(ROOT / "kernels" if path in KERNELS else ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(source: ast.AST) -> set[str]:
    """Full names of all that a module imports, at the top or inside a function. A relative import
    gives '.'."""
    names = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = node.level or not node.module
            names |= {"." if relative else f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(source: ast.AST) -> set[str]:
    return {full.split(".")[0] or "." for full in imported(source)}


def import_cycle(sources: Mapping[str, ast.AST]) -> list[str]:
    """Modules among the sources that import each other in a circle."""
    graph = {
        name: {full if full in sources else full.rpartition(".")[0] for full in imported(source)}
        & sources.keys()
        for name, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def dangers(source: ast.AST) -> list[str]:
    """Calls and imports that could run or unpack untrusted data."""
    found = [*packages(source) & BANNED_IMPORTS, *imported(source) & BANNED_METHODS]
    for node in ast.walk(source):
        if isinstance(node, ast.Name) and node.id in BANNED_CALLS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            method = f"{owner}.{node.attr}"
            if method in BANNED_METHODS or node.attr in UNPACKING:
                found.append(method)
        elif isinstance(node, ast.keyword):
            value = getattr(node.value, "value", True)  # an expression may be true
            found += [node.arg] if value and node.arg in ("shell", "allow_pickle") else []
    return found


def undocumented(source: ast.Module) -> list[str]:
    """The module and its public functions and classes that have no docstring."""
    missing = [] if ast.get_docstring(source) else ["the module"]
    for node in source.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not ast.get_docstring(node):
            kernel = bool(node.decorator_list)  # it is explained in the module's docstring
            missing += [] if kernel or node.name.startswith("_") else [node.name]
    return missing


def broken_links(page: Path) -> list[str]:
    """Links to files and headings of this repository that do not exist."""
    broken = []
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def found(by_file: Mapping[Path, object]) -> dict[str, object]:
    """The files for which something was found."""
    return {name(path): x for path, x in by_file.items() if x}


def test_this_file_finds_the_sources() -> None:
    assert {"model.py", "config.py", "eager.py", "dropout.py"} <= {path.name for path in PACKAGED}
    assert Path(__file__).resolve() in EVERY_SOURCE
    assert BENCHMARKS
    assert ROOT / "README.md" in PAGES


def test_imports_go_in_one_direction() -> None:
    """benchmarks -> irongpt -> irongpt_kernels -> torch, triton. The emulator of PTX has NumPy."""
    for_kernels = sys.stdlib_module_names | {"irongpt_kernels", "torch", "triton"}
    above = {"benchmarks", "tests", "numerics", "."}
    wrong = {p: packages(tree(p)) - for_kernels for p in KERNELS}
    for p in (p for p in KERNELS if p.parent.name == "ptx"):
        wrong[p] -= {"numpy"}
    wrong |= {p: packages(tree(p)) & above for p in IRONGPT}
    wrong |= {p: packages(tree(p)) & (above - {"benchmarks"}) for p in BENCHMARKS}
    assert found(wrong) == {}


def test_there_is_no_import_cycle() -> None:
    assert import_cycle({module(path): tree(path) for path in PACKAGED + BENCHMARKS}) == []


@pytest.mark.parametrize(
    "second",
    [
        "import package.one",
        "from package import one",
        "from package.one import f",
        "def f():\n    from package.one import f",
    ],
)
def test_import_cycles_are_found(second: str) -> None:
    sources = {"package": "", "package.one": "from package import two", "package.two": second}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    assert import_cycle(trees)
    assert not import_cycle(trees | {"package.two": ast.parse("from package import other")})


def test_training_without_fused_ops_imports_no_compiler() -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
        "import gc, irongpt.cli\n"
        "assert irongpt.cli.main(['train', '--resume', 'nowhere']) == 2\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 1000  # after the import of PyTorch\n"
        "import irongpt.device, irongpt.ops, torch\n"
        "for name in ('eager', 'builtin'): irongpt.ops.load(name, torch.device('cpu'))\n"
        "irongpt.device.make_deterministic()\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "print([name for name in ('triton', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_are_short() -> None:
    limits = {path: 450 for path in EVERY_SOURCE if path.name != "eager.py"}
    limits[ROOT / "README.md"] = 170
    lengths = {path: len(path.read_text().splitlines()) for path in limits}
    assert found({path: n for path, n in lengths.items() if n > limits[path]}) == {}


def test_the_packages_do_not_run_what_they_read() -> None:
    """Except `ptx.blocks`, which makes functions of the PTX that Triton has just compiled."""
    wrong = {path: dangers(tree(path)) for path in PACKAGED}
    assert wrong.pop(ROOT / "kernels/irongpt_kernels/ptx/blocks.py") == ["exec", "compile"]
    assert found(wrong) == {}


BANNED = """import pickle / from pickle import loads / eval(x) / run = exec / os.system(x)
import torch; torch.load(f) / from torch import load / np.load(f, allow_pickle=True)
subprocess.run(x, shell=True) / subprocess.run(x, shell=flag) / archive.extractall(p)
dist.all_gather_object(values, x)"""
ALLOWED = "model.eval() / torch.compile(f) / json.load(f) / re.compile"


def test_banned_code_is_found_and_similar_code_is_not() -> None:
    for code in re.split(r" / |\n", BANNED):
        assert dangers(ast.parse(code)), code
    for code in ALLOWED.split(" / "):
        assert not dangers(ast.parse(code)), code


@pytest.mark.parametrize("implementation", ["eager", "builtin", "fused"])
def test_every_implementation_has_the_signatures_of_the_protocol(implementation: str) -> None:
    if implementation == "fused":
        pytest.importorskip("triton")
    implemented = importlib.import_module(f"irongpt_kernels.{implementation}")
    ops = {op: f for op, f in vars(Ops).items() if not op.startswith("_")}
    assert sorted(ops) == sorted(FUNCTIONS)  # each is in one row of the op table
    assert set(getattr(implemented, "__all__", ops)) == set(ops)
    for op, declared in ops.items():
        wanted, got = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (declared, getattr(implemented, op))
        )
        assert got == wanted[1:], op  # without self
        assert getattr(implemented, op).__doc__, op


def test_the_kernels_package_documents_its_public_names() -> None:
    assert found({path: undocumented(tree(path)) for path in KERNELS}) == {}


def test_no_file_names_a_path_of_a_developers_machine() -> None:
    files = [ROOT / file for file in ("Makefile", "pyproject.toml", ".ci/run", ".gitignore")]
    for pattern in (".github/**/*.yml", "benchmarks/*.ipynb", "benchmarks/results/*/*.json"):
        files += ROOT.glob(pattern)
    files += EVERY_SOURCE + PAGES
    assert found({path: PERSONAL_PATH.findall(path.read_text()) for path in files}) == {}


def test_every_link_of_a_page_resolves() -> None:
    assert found({page: broken_links(page) for page in PAGES}) == {}


def test_every_module_that_a_page_runs_exists() -> None:
    command = re.compile(r"python -m ((?:benchmarks|tests|irongpt\w*)[\w.]*\w)")
    modules = {module(path).removesuffix(".__main__") for path in EVERY_SOURCE}
    assert found({page: {*command.findall(page.read_text())} - modules for page in PAGES}) == {}


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
    assert settings["package-data"] == {
        "irongpt": ["py.typed", "interchange/*.html"],
        "irongpt_kernels": ["py.typed"],
    }
    assert all((ROOT / p / "py.typed").exists() for p in ("irongpt", "kernels/irongpt_kernels"))


def test_results_are_in_the_folder_that_the_pages_name() -> None:
    assert result_file.FOLDER == ROOT / "benchmarks" / "results"


def test_every_injected_bug_and_its_tests_exist() -> None:
    assert mutants.problems() == []
