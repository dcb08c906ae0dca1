"""Maps of more than 2^31 elements: three pixels of 2^30 channels, of which one block of channels is computed.

The grid has programs for the first block of channels alone, so that few pages of the map are touched. The simulator
copies tensors, and so gets a small one: there the test collects the addresses that a kernel accesses instead.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from effnet_kernels.backends.triton.kernels.bn_act_add import bn_act_add_kernel
from effnet_kernels.backends.triton.kernels.depthwise import depthwise_conv_kernel
from effnet_kernels.backends.triton.kernels.depthwise_backward import depthwise_conv_backward_kernel
from effnet_kernels.backends.triton.kernels.pointwise import pointwise_conv_backward_data_kernel, pointwise_conv_kernel
from effnet_kernels.backends.triton.launch import launcher, simulated

PITCH, PIXELS, CHANNELS = 2**30, 3, 64
EXPECTED = np.array([[pixel * PITCH + c for c in range(CHANNELS)] for pixel in range(PIXELS)])


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The addresses of 16-bit elements that a simulated kernel accesses; loads give zeros, and stores do nothing."""
    seen: list[np.ndarray] = []
    if simulated():
        from ttsem.memory import Memory

        def load(self, addresses, mask, other, dtype):
            if np.dtype(dtype).itemsize == 2:
                seen.append(addresses[np.broadcast_to(True if mask is None else mask, addresses.shape)])
            return np.zeros(np.shape(addresses), dtype)

        def store(self, addresses, values, mask):
            if values.dtype.itemsize == 2:
                seen.append(addresses[np.broadcast_to(True if mask is None else mask, addresses.shape)])

        monkeypatch.setattr(Memory, "load", load)
        monkeypatch.setattr(Memory, "store", store)
    return seen


def check(
    kernel, grid: tuple[int, int, int], accesses: list[np.ndarray], maps: list[str], constants, **arguments
) -> None:
    """Launches with ``maps`` of PIXELS pixels, and checks the accessed addresses, or on a GPU the last map's values."""
    # One allocation for all maps, each in channels of its own.
    size = CHANNELS if simulated() else (PIXELS - 1) * PITCH + len(maps) * CHANNELS
    storage = torch.ones(size, dtype=torch.float16, device="cuda")
    given = dict.fromkeys(kernel.arg_names)
    given.update(arguments)
    for index, name in enumerate(maps):
        given[name] = storage if simulated() else storage[index * CHANNELS :]
    if not simulated():
        pixels(given[maps[-1]]).zero_()
    launcher(kernel)(grid, **{**given, **constants})
    if simulated():
        offsets = (np.concatenate(accesses) - storage.data_ptr()) // 2
        assert np.array_equal(np.unique(offsets), EXPECTED.ravel())
        assert len(offsets) >= len(maps) * EXPECTED.size
    else:
        assert (pixels(given[maps[-1]]) != 0).all()


def pixels(storage: Tensor) -> Tensor:
    """The first channels of each pixel, [PIXELS, CHANNELS]."""
    return storage.as_strided((PIXELS, CHANNELS), (PITCH, 1))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


def test_pointwise(accesses: list[np.ndarray]) -> None:
    constants = {
        "ACT": "none",
        "OUT_ACT": "none",
        "REDUCTION": "none",
        "PRECISION": "ieee",
        "IN_DIVISOR": 8,
        "OUT_DIVISOR": 8,
    }
    constants |= {"BLOCK_M": 16, "BLOCK_N": CHANNELS, "BLOCK_K": 16}
    numbers = {"rows": 1, "groups": PIXELS, "in_quotient": 2, "out_quotient": PITCH // 8, "eps": 0.0}
    tensors = {"x_ptr": ones(PIXELS, 16), "weight_ptr": ones(CHANNELS, 16)}
    check(pointwise_conv_kernel, (1, PIXELS, 1), accesses, ["residual_ptr", "y_ptr"], constants, **numbers, **tensors)


def test_pointwise_backward(accesses: list[np.ndarray]) -> None:
    constants = {
        "OUT_ACT": "none",
        "ACT": "silu",
        "APPLY_ACT_GRAD": True,
        "PRECISION": "ieee",
        "IN_DIVISOR": 8,
        "OUT_DIVISOR": 1,
    }
    constants |= {"BLOCK_M": 16, "BLOCK_N": CHANNELS, "BLOCK_K": 16}
    numbers = {"rows": 1, "groups": PIXELS, "in_quotient": PITCH // 8, "out_quotient": 1}
    # One output channel, so that the weight, whose rows are as far apart as the map's, has a single one.
    tensors = {"grad_ptr": ones(PIXELS, 1), "weight_ptr": ones(1, CHANNELS)}
    kernel = pointwise_conv_backward_data_kernel
    check(kernel, (1, PIXELS, 1), accesses, ["x_ptr", "dx_ptr"], constants, **numbers, **tensors)


def depthwise_numbers() -> dict[str, int]:
    """Samples of a single pixel, so that the kernel's middle tap is all there is."""
    names = ("height", "width", "out_height", "out_width", "pad_top", "pad_left", "row_strips", "column_strips")
    return {**dict.fromkeys(names, 1), "strips": PIXELS, "c_quotient": PITCH // 8, "strip_height": 1}


def test_depthwise(accesses: list[np.ndarray]) -> None:
    constants = {"ACT": "none", "OUT_ACT": "none", "REDUCTION": "none", "C_DIVISOR": 8, "K": 3, "STRIDE": 1, "WIDTH": 1}
    constants |= {"STRIPS": 1, "BLOCK_C": CHANNELS}
    numbers = {**depthwise_numbers(), "first_step": 0, "eps": 0.0}
    weight = ones(CHANNELS, 9)
    check(depthwise_conv_kernel, (PIXELS, 1, 1), accesses, ["x_ptr", "y_ptr"], constants, **numbers, weight_ptr=weight)


def test_depthwise_backward(accesses: list[np.ndarray]) -> None:
    constants = {"OUT_ACT": "none", "ACT": "none", "C_DIVISOR": 8, "K": 3, "STRIDE": 1, "WIDTH": 1, "STRIPS": 1}
    constants |= {"BLOCK_C": CHANNELS}
    tensors = {"weight_ptr": ones(CHANNELS, 9), "dweight_ptr": ones(CHANNELS, 9)}
    maps = ["grad_ptr", "x_ptr", "dz_ptr"]
    check(depthwise_conv_backward_kernel, (1, 1, 1), accesses, maps, constants, **depthwise_numbers(), **tensors)


def test_bn_act_add(accesses: list[np.ndarray]) -> None:
    constants = {"ACT": "none", "C_DIVISOR": 8, "BLOCK_M": 16, "BLOCK_C": CHANNELS}
    numbers = {"rows": 1, "c_quotient": PITCH // 8, "eps": 0.0}
    maps = ["x_ptr", "residual_ptr", "out_ptr"]
    check(bn_act_add_kernel, (1, 1, PIXELS), accesses, maps, constants, **numbers, scale_ptr=ones(CHANNELS))
