"""What the subcommands share: exit statuses, types of arguments."""

import argparse
import math
from typing import Any

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_USAGE = 2


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why."""


def positive(text: str) -> int:
    """An integer from 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return number


def minutes(text: str) -> float:
    """A finite number of minutes above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    # Not <=, so that a NaN is refused.
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")
    return number


def device(name: str) -> Any:
    """The device of this name; raises UsageError where there is none."""
    import torch

    try:
        found = torch.device(name)
        # Read back, which the meta device cannot.
        torch.zeros(1, device=found).item()
    # Each device type has its own error for not being there.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise UsageError(f"--device {name}: {reason}") from error
    return found
