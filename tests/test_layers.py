"""That imports point downward only: no circle, and no layer that reaches above itself, lazy imports included."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import effnet_kernels

PACKAGE = Path(effnet_kernels.__file__).parent
# From the bottom up; a module belongs to the longest name that it begins with. The package itself is the public names.
LAYERS = [
    ["fusion.spec", "fusion.geometry"],
    [
        "backends.base",
        "backends.scoped_value",
        "backends.operands",
        "backends.activation",
        "backends.batch_norm",
        "backends.dense",
    ],
    ["backends.profiling"],
    ["backends.reference", "backends.cpu", "backends.triton"],
    ["backends"],
    ["fusion"],
    ["ops"],
    ["modules"],
    ["models"],
    ["interop"],
    ["inference"],
    ["tools.warmup"],
    ["tools.console"],
    ["train"],
    [""],
    ["tools"],
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """The package's modules by their names inside of it; the package itself is the empty name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def layer_of(module: str) -> str:
    names = [name for name in RANKS if name and (module == name or module.startswith(f"{name}."))]
    return max(names, key=len, default="")


def imports_of(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (inside(alias.name) for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module is not None and is_ours(node.module):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                name = inside(f"{node.module}.{alias.name}")
                # What is imported from a module is a module, or a name in it.
                yield name if name in MODULES else inside(node.module)


def is_ours(name: str) -> bool:
    return name.partition(".")[0] == "effnet_kernels"


def inside(name: str) -> str:
    return name.removeprefix("effnet_kernels").removeprefix(".")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    for imported in imports_of(MODULES[module]):
        ours, theirs = layer_of(module), layer_of(imported)
        # A package's own name stands for what it exports, to those above it.
        assert RANKS[theirs] <= RANKS[ours], f"{module or 'the package'} imports {imported or 'the package'}"


def test_there_is_no_circle() -> None:
    graph = {module: set(imports_of(path)) - {module} for module, path in MODULES.items()}
    # Raises CycleError with the circle.
    assert list(TopologicalSorter(graph).static_order())


def test_production_code_imports_the_reference_in_one_place() -> None:
    importers = {
        module
        for module, path in MODULES.items()
        if not module.startswith("backends.reference")
        and any(name.startswith("backends.reference") for name in imports_of(path))
    }
    assert importers == {"backends.select"}


def test_no_module_lies_loose_at_the_top() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}


def test_files_can_be_read_in_one_sitting() -> None:
    long = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in long.items() if lines > 400} == {}
