"""A hook of MkDocs: TeX between dollar signs as MathML."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Called by MkDocs with each page as HTML."""
    return _FORMULA.sub(lambda found: _mathml(found[1] == "[", html.unescape(found[2])), content)


def _mathml(block: bool, formula: str) -> str:
    return convert(formula.strip(), display="block" if block else "inline")
