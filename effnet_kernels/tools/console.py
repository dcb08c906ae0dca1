"""Output: text that a terminal shows and does not obey, and JSON that every reader takes."""

import json
import sys
import unicodedata
from typing import Any, TextIO

# Controls, marks of direction and the like, lone surrogates, separators of lines and paragraphs.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """The text with escapes in place of the characters that a terminal might obey or could not show."""
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _UNPRINTABLE else character
        for character in text
    )


def to_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON of ASCII characters; values that JSON does not have become text.

    Names of files that are not UTF-8 have lone surrogates, which come as backslash escapes.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(_without_surrogates(value), indent=indent, allow_nan=False, default=str)
    # The one control character that json leaves as it is.
    return text.replace("\x7f", "\\u007f")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(item) for item in value]
    return value


def say(text: str, file: TextIO | None) -> None:
    """Prints a line above the progress bar, if there is one; characters that the file cannot encode are escaped.

    A stream that was closed before the program began is None, and nothing is printed.
    """
    if file is None:
        return
    encoding = file.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=file)
    else:
        print(text, file=file)
