"""The bytes that a launch's programs request, tile by tile: data that several programs read counts for each of them.

Caches serve most of the repeated reads, so that device memory moves fewer bytes than are requested, and at least each
tensor once. ``tests/gpu/test_requested_bytes.py`` compares these counts with the accesses that the kernels make when
they are executed.
"""

from collections.abc import Callable

from launch_trace import size
from torch import Tensor

from effnet_kernels.backends.triton.launch import Launch


def requested_bytes(launch: Launch) -> dict[str, int]:
    """Requested bytes by argument: maps and matrices each time they are read or written, vectors and partials once."""
    factors = _REQUESTS.get(launch.kernel.__name__, lambda launch: {})(launch)
    return {
        name: round(size(argument) * factors.get(name.removesuffix("_ptr"), 1))
        for name, argument in launch.arguments.items()
        if isinstance(argument, Tensor)
    }


def _gemm(launch: Launch) -> dict[str, float]:
    """Programs of each block of columns read all rows, and programs of each tile of rows all weights."""
    a, column_blocks = launch.arguments, launch.grid[0]
    tiles = launch.grid[2] * a["groups"] * -(-a["rows"] // launch.constants["BLOCK_M"])
    rows = ("x",) if launch.kernel.__name__ == "pointwise_conv_kernel" else ("grad", "y")
    return {**dict.fromkeys(rows, column_blocks), "weight": tiles}


def _weight_gradient(launch: Launch) -> dict[str, float]:
    input_blocks, output_blocks, _ = launch.grid
    return {"grad": input_blocks, "y": input_blocks, "x": output_blocks}


def _depthwise(launch: Launch) -> dict[str, float]:
    """The input windows of neighbouring strips overlap, and each strip prefetches one row more than it needs."""
    a, c = launch.arguments, launch.constants
    stride, kernel = c["STRIDE"], c["K"]
    steps = a["strip_height"] + (kernel - 1) // stride - a["first_step"]
    rows = [(i * a["strip_height"] + a["first_step"]) * stride - a["pad_top"] for i in range(a["row_strips"])]
    columns = [i * c["WIDTH"] * stride - a["pad_left"] for i in range(a["column_strips"])]
    covered = _covered(rows, steps * stride + 1, a["height"]) * _covered(
        columns, stride * (c["WIDTH"] - 1) + kernel, a["width"]
    )
    return {"x": covered / (a["height"] * a["width"])}


def _depthwise_backward(launch: Launch) -> dict[str, float]:
    """The input is read for the window of activations, and again for the derivative, which small kernels keep."""
    a, c = launch.arguments, launch.constants
    stride, before = c["STRIDE"], (c["K"] - 1) // c["STRIDE"]
    steps, strip = a["strip_height"] // stride + before, c["WIDTH"]
    rows = [a["pad_top"] // stride + i * a["strip_height"] // stride - before for i in range(a["row_strips"])]
    columns = [a["pad_left"] // stride + i * strip // stride - before for i in range(a["column_strips"])]
    covered = _covered(rows, steps + 1, a["out_height"]) * _covered(columns, strip // stride + before, a["out_width"])
    times = covered / (a["out_height"] * a["out_width"])
    keeps = c["ACT"] != "none" and (c["K"] == 3 or (c["K"] == 5 and a["x_ptr"].element_size() == 2))
    twice = a["scale_ptr"] is not None or a["shift_ptr"] is not None or a["mean_ptr"] is not None or c["ACT"] != "none"
    return {"grad": times, "y": times, "x": 2 if twice and not keeps else 1}


def _covered(starts: list[int], length: int, limit: int) -> int:
    """The total length of the parts of intervals [start, start + length) that lie in [0, limit)."""
    return sum(max(0, min(start + length, limit) - max(start, 0)) for start in starts)


# By kernel, how many times its programs together request an argument, where that is not once.
_REQUESTS: dict[str, Callable[[Launch], dict[str, float]]] = {
    "pointwise_conv_kernel": _gemm,
    "pointwise_conv_backward_data_kernel": _gemm,
    "pointwise_conv_backward_weight_kernel": _weight_gradient,
    "depthwise_conv_kernel": _depthwise,
    "depthwise_conv_backward_kernel": _depthwise_backward,
}
