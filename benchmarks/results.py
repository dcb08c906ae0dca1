"""Results that a run keeps however it ends: a JSON file written after each entry, and the time left for more."""

import time
from pathlib import Path
from typing import Any

from effnet_kernels.tools.timing import write_results


class Results:
    """Entries by section and name, after ``facts``. ``seconds`` is the budget, from now; None for no end."""

    def __init__(self, path: Path | None, seconds: float | None = None, **facts: object) -> None:
        self.path = path
        self.start = time.monotonic()
        self.seconds = seconds
        self.data: dict[str, Any] = dict(facts)

    def left(self) -> float:
        """Seconds, less than zero when the budget is spent."""
        return float("inf") if self.seconds is None else self.start + self.seconds - time.monotonic()

    def put(self, section: str, name: str, entry: object) -> None:
        self.data.setdefault(section, {})[name] = entry
        self.data["seconds"] = round(time.monotonic() - self.start, 1)
        if self.path is not None:
            write_results(self.path, self.data)
