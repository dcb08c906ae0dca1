"""That the documentation's code imports what is there."""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def imports_of(text: str) -> Iterator[str]:
    """The import statements in a page's blocks of Python, and those in the lines that a diff adds or removes."""
    for block in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield ast.unparse(node)
    yield from re.findall(r"^ *[+-] (from [\w.]+ import .+)$", text, re.MULTILINE)


STATEMENTS = [
    pytest.param(statement, id=f"{page.relative_to(ROOT).as_posix()}: {statement}")
    for page in PAGES
    for statement in dict.fromkeys(imports_of(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_what_pages_import_is_there(statement: str) -> None:
    try:
        exec(statement, {})
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "effnet_kernels":
            raise
        pytest.skip(f"{package} is not installed")


def test_imports_are_found() -> None:
    text = "```python\nimport a\n\n\ndef f():\n    from b import c\n```\n\n    + from d import e\n- from a list\n"
    assert list(imports_of(text)) == ["import a", "from b import c", "from d import e"]
    assert len(STATEMENTS) > 20
