"""Draws the figures of the documentation: diagrams, and charts of measured data from the JSON files beside this script.

pip install ".[docs]" && python docs/figures/draw.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
OURS, OTHERS, IDEAL, MAP, KERNEL, INK = "#2f6fb0", "#9a9a9a", "#7fb77e", "#f3d9a4", "#cfe0f1", "#222222"

# The same figure gives the same bytes, and its labels stay text.
mpl.rcParams.update(
    {"svg.hashsalt": "effnet_kernels", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
)


def save(figure: Figure, name: str) -> None:
    path = HERE / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    # Editors and hooks strip what matplotlib leaves at line ends.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text())


def bars(axes: Axes, rows: dict[str, float], colours: Sequence[str], title: str, unit: str) -> None:
    names = list(rows)[::-1]
    drawn = axes.barh(names, [rows[name] for name in names], color=list(colours)[::-1])
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.margins(x=0.12)
    axes.set_title(title, loc="left")
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


def traffic() -> None:
    data = read("traffic")
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    colours = {"eager": OTHERS, "torch.compile": OTHERS, "effnet_kernels": OURS, "ideal": IDEAL}
    panels = figure.subplots(2, 1, sharex=True)
    for axes, part in zip(panels, ("training", "inference"), strict=True):
        values = data[part] | data["by hand"][part]
        rows = {name: values[name] for name in colours}
        bars(axes, rows, list(colours.values()), part, data["unit"] if axes is panels[-1] else "")
    figure.suptitle(f"Bytes through device memory: {data['case']}")
    save(figure, "traffic")


def cpu() -> None:
    data = read("cpu")
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    colours = [OURS if name.startswith("effnet_kernels") else OTHERS for name in data["rows"]]
    bars(figure.subplots(), data["rows"], colours, f"{data['case']}, {data['date']}", data["unit"])
    save(figure, "cpu")


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Axes without ticks, in which ten units are an inch."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    style = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.8", facecolor=colour, edgecolor=INK)
    axes.add_patch(style)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
    line = {"arrowstyle": "->", "color": INK, "shrinkA": 0, "shrinkB": 0, "linestyle": "--" if dashed else "-"}
    axes.annotate("", end, start, arrowprops=line)


def block() -> None:
    """MBConv at inference, operation by operation and as three kernels."""
    figure, axes = canvas(92, 52)
    axes.text(2, 3, "Eager: every operation reads maps (yellow) from memory and writes one", va="center", weight="bold")
    operations = [
        ["expand 1x1", "BatchNorm", "SiLU", "depthwise", "BatchNorm", "SiLU"],
        ["mean, 2 FCs", "scale by gate", "project 1x1", "BatchNorm", "add input"],
    ]
    for row, names in enumerate(operations):
        y = 7 + 9 * row
        for column, name in enumerate(names):
            x = 2 + 15 * column
            box(axes, x, y, 10.5, 5, name, KERNEL)
            is_last = row == 1 and column == len(names) - 1
            # The excitation makes a vector and no map.
            if name != "mean, 2 FCs" and not is_last:
                box(axes, x + 11.7, y + 1.2, 2.2, 2.6, "", MAP)
    axes.text(2, 28, "Fused: three kernels, and two maps between them", va="center", weight="bold")
    fused = [
        ("expand 1x1", "store: BatchNorm, SiLU"),
        ("depthwise", "store: BatchNorm, SiLU,\nsums for the squeeze"),
        ("project 1x1", "load: times the gate\nstore: BatchNorm, add input"),
    ]
    for column, (name, detail) in enumerate(fused):
        x = 2 + 31 * column
        box(axes, x, 32, 25, 9, f"{name}\n{detail}", KERNEL)
        if column < 2:
            box(axes, x + 26.9, 35.2, 2.2, 2.6, "", MAP)
            arrow(axes, (x + 25, 36.5), (x + 26.9, 36.5))
            arrow(axes, (x + 29.1, 36.5), (x + 31, 36.5))
    box(axes, 46, 45, 20, 4.5, "excite: 2 FCs on [N, C]", "#ffffff")
    arrow(axes, (50, 41), (50, 45), dashed=True)
    arrow(axes, (66, 47.2), (76, 41), dashed=True)
    save(figure, "block")


def backward() -> None:
    """What a layer saves in training, and what its backward pass forms on load."""
    figure, axes = canvas(92, 40)
    axes.text(2, 3, "Forward", va="center", weight="bold")
    box(axes, 2, 6, 18, 8, "convolution\nreturns y and statistics", KERNEL)
    box(axes, 26, 6, 14, 8, "raw output y\n(saved)", MAP)
    box(axes, 26, 17, 14, 6, "scale, shift [C]\n(saved)", "#ffffff")
    box(axes, 46, 6, 24, 8, "next convolution\nload: act(scale y + shift) gate", KERNEL)
    box(axes, 76, 6, 14, 8, "its raw output\n(saved)", MAP)
    arrow(axes, (20, 10), (26, 10))
    arrow(axes, (40, 10), (46, 10))
    arrow(axes, (70, 10), (76, 10))
    arrow(axes, (20, 13), (26, 19), dashed=True)
    arrow(axes, (40, 19), (46, 13), dashed=True)
    axes.text(2, 25, "Backward", va="center", weight="bold")
    box(axes, 46, 28, 24, 9, "data gradient\nload: grad and y give dy\nstore: dz or q, and sums", KERNEL)
    box(axes, 76, 28.5, 14, 8, "gradient map", MAP)
    box(axes, 26, 28.5, 14, 8, "gradient map", MAP)
    box(axes, 2, 28, 18, 9, "data gradient of the\nconvolution before\n(the same again)", KERNEL)
    arrow(axes, (76, 32.5), (70, 32.5))
    arrow(axes, (46, 32.5), (40, 32.5))
    arrow(axes, (26, 32.5), (20, 32.5))
    arrow(axes, (40, 21), (50, 28), dashed=True)
    arrow(axes, (80, 14), (64, 28), dashed=True)
    save(figure, "backward")


def layers() -> None:
    """The layers of the code, each of which calls those below it alone."""
    figure, axes = canvas(92, 46)
    rows = [
        [("models\nnetworks, weights", 26), ("accelerate, restore, explain\nthird-party packages' blocks", 30)],
        [("modules: MBConv, FusedMBConv, ConvBnAct, SqueezeExcitation", 58)],
        [("chains: a block's forward and backward in one autograd.Function", 58)],
        [("primitives: forward and backward steps of the operators, one signature for each", 88)],
        [("reference\nplain PyTorch, defines correct", 28), ("cpu\nC++, AVX2, AVX-512, NEON", 28), ("triton\nGPU", 28)],
    ]
    for row, names in enumerate(rows):
        y, x = 2 + 8.8 * row, 2.0
        for text, width in names:
            box(axes, x, y, width, 6.6, text, KERNEL if row < 3 else "#ffffff" if row == 3 else MAP)
            x += width + 2
    box(
        axes,
        62,
        2,
        28,
        24.2,
        "freeze: an engine for inference\nBatchNorm folded,\none native call on a CPU,\nthe primitives on a GPU",
        KERNEL,
    )
    for row in range(4):
        y = 8.6 + 8.8 * row
        arrow(axes, (31, y), (31, y + 2.2))
    arrow(axes, (76, 26.2), (76, 28.4))
    save(figure, "layers")


if __name__ == "__main__":
    for draw in (traffic, cpu, block, backward, layers):
        draw()
