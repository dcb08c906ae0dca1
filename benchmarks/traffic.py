"""Bytes an image moves through device memory in a training step and at inference, counted from a launch trace.

    python benchmarks/traffic.py [--model efficientnet_b0] [--dtype fp16] [--batch 64] [--json FILE] [--plot FILE.svg]

The step runs on meta tensors at full size: no kernel is executed, and no formula for a step is used. The first figure
counts each tensor of a launch once (one that it reads and writes, twice), and the inputs and outputs of every operation
of torch's, including the sums that the autograd engine computes. The second, "requested", is the bytes that our
launches' programs request, tile by tile: data that several programs read counts for each (``requested_bytes.py``).
torch's operations count in it as in the first. Device memory moves more than the first figure and less than the second.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from launch_trace import Pass, Step, tensor_bytes, trace_step
from requested_bytes import requested_bytes

from effnet_kernels.backends.triton.launch import Launch

# Inductor's generated kernels with cuDNN's convolutions, B0 at 224, fp16 under autocast, batch 64 (torch 2.14.1), and
# the sum of the tensors that the design must move; both counted once, by hand.
CITED = {"Inductor": {"training": 286.0, "inference": 59.3}, "ideal": {"training": 111.9, "inference": 27.4}}


def megabytes(part: Pass, batch: int, count: Callable[[Launch], int] = tensor_bytes) -> float:
    return (sum(map(count, part.launches)) + sum(part.torch_bytes.values())) / batch / 1e6


def all_requested_bytes(launch: Launch) -> int:
    return sum(requested_bytes(launch).values())


def count(model: str, dtype: str, batch: int, fused: bool) -> dict[str, float]:
    step = trace_step(model, batch, dtype, training=True, fused=fused)
    inference = trace_step(model, batch, dtype, training=False, fused=fused)
    return figures(step, inference, batch)


def figures(step: Step, inference: Step, batch: int) -> dict[str, float]:
    assert step.backward is not None
    forward, backward = megabytes(step.forward, batch), megabytes(step.backward, batch)
    return {
        "training forward": forward,
        "training backward": backward,
        "training": forward + backward,
        "inference": megabytes(inference.forward, batch),
        "training, requested": sum(
            megabytes(part, batch, all_requested_bytes) for part in (step.forward, step.backward)
        ),
        "inference, requested": megabytes(inference.forward, batch, all_requested_bytes),
        "saved for backward": step.saved / batch / 1e6,
        "launches in training": len(step.forward.launches) + len(step.backward.launches),
        "launches at inference": len(inference.forward.launches),
    }


def plot(rows: dict[str, dict[str, float]], title: str) -> str:
    """Horizontal bars as SVG."""
    colours = {"eager": "#9a9a9a", "Inductor": "#c9a227", "ours": "#2f6fb0", "ideal": "#7fb77e"}
    lines, y = [], 46
    largest = max(row["training"] for row in rows.values())
    for group in ("training", "inference"):
        lines.append(f'<text x="8" y="{y}" font-weight="bold">{group}, MB an image</text>')
        y += 10
        for name, row in rows.items():
            width = 560 * row[group] / largest
            lines.append(f'<text x="76" y="{y + 14}" text-anchor="end">{name}</text>')
            lines.append(f'<rect x="84" y="{y}" width="{width:.1f}" height="19" fill="{colours[name]}"/>')
            lines.append(f'<text x="{90 + width:.1f}" y="{y + 14}">{row[group]:.1f}</text>')
            y += 24
        y += 26
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{y}" font-family="sans-serif" font-size="13">\n'
        f'<rect width="720" height="{y}" fill="white"/>\n<text x="8" y="20" font-size="15">{title}</text>\n'
        f"{body}\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--dtype", default="fp16", choices=["fp16", "bf16", "fp32"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = {
        name: count(options.model, options.dtype, options.batch, fused)
        for name, fused in (("eager", False), ("ours", True))
    }
    print(f"{options.model}, {options.dtype}, batch {options.batch}: MB an image")
    for key in rows["ours"]:
        eager, ours = rows["eager"][key], rows["ours"][key]
        ratio = f"{ours / eager:8.2f}" if eager else ""
        print(f"{key:24} eager {eager:9.1f}  ours {ours:9.1f} {ratio}")
    if options.json:
        options.json.write_text(json.dumps({"options": {**vars(options), "json": "", "plot": ""}, **rows}, indent=1))
    if options.plot:
        shown = {"eager": rows["eager"], "ours": rows["ours"]}
        if (options.model, options.dtype) == ("efficientnet_b0", "fp16"):
            shown = {
                "eager": rows["eager"],
                "Inductor": CITED["Inductor"],
                "ours": rows["ours"],
                "ideal": CITED["ideal"],
            }
        title = f"{options.model}, {options.dtype}: bytes through device memory"
        options.plot.write_text(plot(shown, title))


if __name__ == "__main__":
    main()
