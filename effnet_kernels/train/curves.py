"""The curves of runs over their steps."""

import csv
from collections.abc import Sequence
from pathlib import Path

# The panels: the word at the axis, and its metrics with the style of their lines.
_PANELS = (
    ("loss", {"train/loss_epoch": "--", "val/loss": "-"}),
    ("accuracy", {"train/accuracy": "--", "val/accuracy": "-"}),
    ("learning rate", {"lr": "-"}),
)


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The values of each metric that a run has logged, with their steps; ``lr`` is the highest of the learning rates.

    Each time that training went on has a file of its own; of a step that two have, the later counts.

    Raises FileNotFoundError where there is no ``metrics.csv``, ValueError where one holds anything but numbers.
    """
    paths = sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    if not paths:
        raise FileNotFoundError(f"{folder}: expected the folder of a run, with logs/version_0/metrics.csv")
    metrics: dict[str, dict[int, float]] = {}
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    values = {name: float(value) for name, value in row.items() if name and value}
                    step = int(values["step"])
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}: expected numbers, got {row}") from error
                rates = [value for name, value in values.items() if name.startswith("lr-")]
                if rates:
                    values["lr"] = max(rates)
                for name, value in values.items():
                    metrics.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in metrics.items()}


def plot_runs(folders: Sequence[Path], path: Path) -> None:
    """Draws loss, accuracy and learning rate of runs over the steps; training is dashed, validation is not.

    Raises OSError and ValueError as :func:`read_metrics`, and for a suffix that matplotlib does not know.
    """
    from matplotlib.figure import Figure

    runs = [read_metrics(folder) for folder in folders]
    figure = Figure((15, 4.5), layout="constrained")
    for axes, (label, lines) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for number, (folder, metrics) in enumerate(zip(folders, runs, strict=True)):
            for name, style in lines.items():
                points = metrics.get(name, [])
                shown = folder.name if style == "-" else None
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=shown) if points else None
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle("dashed: training; solid: validation")
    figure.savefig(path, dpi=150)
