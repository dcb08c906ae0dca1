"""Maps of more than 2^31 elements: three pixels that are 2^30 elements apart, of whose channels a block is computed.

The kernels are launched as for a map of 2^30 channels, with programs for the first block of them alone, so that the
offsets are those of a map of 6 GiB and hardly a page of it is touched.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from effnet_kernels.triton.kernels.depthwise import depthwise_conv_kernel
from effnet_kernels.triton.kernels.merge import merge_kernel
from effnet_kernels.triton.kernels.pointwise import pointwise_conv_kernel
from effnet_kernels.triton.launch import launch, simulated

PITCH, PIXELS, CHANNELS = 2**30, 3, 64
SIZE = (PIXELS - 1) * PITCH + 2 * CHANNELS


@pytest.fixture
def storage() -> Tensor:
    """2^31 and some elements in float16, untouched."""
    if simulated():
        return torch.from_numpy(np.zeros(SIZE, dtype=np.float16))
    return torch.empty(SIZE, dtype=torch.float16, device="cuda")


def pixels(storage: Tensor, start: int = 0) -> Tensor:
    """The first channels of each pixel, [PIXELS, CHANNELS]."""
    return storage[start:].as_strided((PIXELS, CHANNELS), (PITCH, 1))


def test_pointwise(storage: Tensor) -> None:
    x, weight = torch.randn(PIXELS, 16, device="cuda").half(), torch.randn(CHANNELS, 16, device="cuda").half()
    absent = [None] * 10
    launch(
        pointwise_conv_kernel, (1, PIXELS, 1), x, weight, *absent[:9], storage, None,
        1, PIXELS, 2, PITCH // 8, 0.0,
        ACT="none", OUT_ACT="none", REDUCTION="none", PRECISION="ieee", IN_UNIT=8, OUT_UNIT=8,
        BLOCK_M=16, BLOCK_N=CHANNELS, BLOCK_K=16,
    )  # fmt: skip
    torch.testing.assert_close(pixels(storage), x @ weight.T, rtol=2e-3, atol=2e-3)


def test_depthwise(storage: Tensor) -> None:
    """Samples of one pixel: the kernel's middle tap is all there is."""
    x = torch.randn(PIXELS, CHANNELS, device="cuda").half()
    pixels(storage).copy_(x)
    weight = torch.randn(CHANNELS, 9, device="cuda")
    y = storage[CHANNELS:]
    launch(
        depthwise_conv_kernel, (PIXELS, 2, 1), storage, weight, *[None] * 6, y, None,
        PIXELS, PITCH // 8, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0.0,
        ACT="none", OUT_ACT="none", REDUCTION="none", CHANNELS=8, K=3, STRIDE=1, WIDTH=1, STRIPS=1, BLOCK_C=32,
    )  # fmt: skip
    torch.testing.assert_close(pixels(storage, CHANNELS), (x * weight[:, 4]).half(), rtol=2e-3, atol=2e-3)


def test_merge(storage: Tensor) -> None:
    x = torch.randn(PIXELS, CHANNELS, device="cuda").half()
    pixels(storage).copy_(x)
    scale = torch.randn(CHANNELS, device="cuda")
    out = storage[CHANNELS:]
    arguments = dict.fromkeys(merge_kernel.arg_names)
    arguments.update(x_ptr=storage, scale_ptr=scale, out_ptr=out, rows=1, channel_units=PITCH // 8, eps=0.0)
    constants = {"ACT": "none", "CHANNELS": 8, "BLOCK_ROWS": 16, "BLOCK_CHANNELS": CHANNELS}
    given = [arguments[name] for name in merge_kernel.arg_names if name not in constants]
    launch(merge_kernel, (1, 1, PIXELS), *given, **constants)
    torch.testing.assert_close(pixels(storage, CHANNELS), (x * scale).half(), rtol=2e-3, atol=2e-3)
