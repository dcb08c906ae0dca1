"""Products of bfloat16 numbers against models of the instructions, bit for bit."""

import pytest
import torch
from native_cases import kernel_isas, needs_native, running, same_bits
from torch import Tensor

from effnet_kernels.backends.cpu.network import Network
from effnet_kernels.fusion.spec import Chain, Layer

pytestmark = needs_native

BF16 = torch.bfloat16
ISAS = kernel_isas(BF16)


def without_denormals(x: Tensor) -> Tensor:
    """Zeros of the same sign for float32's denormal numbers."""
    return torch.where(x.abs() < torch.finfo(torch.float32).tiny, x * 0, x)


def product(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """What the instruction vdpbf16ps makes of bfloat16 matrices a [M, K] and b [K, N], in float32.

    For each pair of k it adds the product of the second numbers to the sum, then that of the first, rounds each time
    to float32, and takes denormal numbers for zeros before and after. The second numbers of half a pair are zeros.
    """
    half = a.shape[1] % 2
    a, b = torch.cat([a, a.new_zeros(len(a), half)], 1), torch.cat([b, b.new_zeros(half, b.shape[1])])
    a, b = (without_denormals(x.float()).double() for x in (a, b))
    sums = without_denormals(bias.float()).repeat(len(a), 1)
    for k in range(0, a.shape[1], 2):
        for i in (k + 1, k):
            sums = without_denormals((sums.double() + a[:, i, None] * b[i]).float())
    return sums


def product_by_amx(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """What the instruction tdpbf16ps of AMX makes of them, called for 16 pairs of k at a time.

    Each call adds up the products of the first numbers of all pairs, and those of the second ones, and adds both sums
    to the tile of sums. The bias comes last.
    """
    half = a.shape[1] % 2
    a, b = torch.cat([a, a.new_zeros(len(a), half)], 1), torch.cat([b, b.new_zeros(half, b.shape[1])])
    a, b = (without_denormals(x.float()).double() for x in (a, b))
    sums = torch.zeros(len(a), b.shape[1])
    for begin in range(0, a.shape[1], 32):
        halves = []
        for first in (begin, begin + 1):
            half = torch.zeros_like(sums)
            for k in range(first, min(begin + 32, a.shape[1]), 2):
                half = without_denormals((half.double() + a[:, k, None] * b[k]).float())
            halves.append(half)
        sums = without_denormals(sums + without_denormals(halves[0] + halves[1]))
    return without_denormals(sums + bias.float())


def multiply(isa: str, a: Tensor, b: Tensor, bias: Tensor, in_place: bool = False) -> Tensor:
    """The same by the kernels: a 1x1 convolution whose pixels are the rows of ``a``.

    In place the kernels read the image where it is; otherwise they copy its pixels, filled up with a zero where the
    channels are odd.
    """
    weight, x = b.T[:, :, None, None], a.T[None, :, None, :].contiguous(memory_format=torch.channels_last)
    if not in_place:
        x = x.repeat_interleave(2, 3)[..., ::2]
    with running(isa, 1):
        network = Network([Chain((Layer("pointwise", weight, bias),))], [0])
        y = network.run(x, torch.channels_last if in_place else torch.contiguous_format)[0]
    return y[0, :, 0, :].T


def expected(isa: str, a: Tensor, b: Tensor, bias: Tensor, in_place: bool = False) -> Tensor:
    """The model of the instruction that multiplies these.

    AMX reads whole pairs, so that it does not read half a pair of an image in place. Nor does it multiply the map of
    one pixel, which is always in place and computed row by row.
    """
    by_amx = isa in ("amx_bf16", "emulated_amx") and len(a) > 1 and (not in_place or a.shape[1] % 2 == 0)
    return (product_by_amx if by_amx else product)(a, b, bias).to(BF16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("inner", [1, 2, 3, 8, 31, 32, 34, 64, 80])
def test_products_are_the_instructions(isa, inner):
    # Output channels below, at and above each boundary of a register tile, and each height of a tile.
    for outputs in (1, 7, 8, 9, 16, 17, 24, 25, 32, 33, 57, 64):
        a, b, bias = torch.randn(29, inner).to(BF16), torch.randn(inner, outputs).to(BF16), torch.randn(outputs)
        assert same_bits(multiply(isa, a, b, bias), expected(isa, a, b, bias))
    for rows in (*range(1, 36), 49, 64, 65, 81):
        a, b, bias = torch.randn(rows, inner).to(BF16), torch.randn(inner, 40).to(BF16), torch.randn(40)
        for in_place in (False, True):
            assert same_bits(multiply(isa, a, b, bias, in_place), expected(isa, a, b, bias, in_place))


@pytest.mark.parametrize("isa", ISAS)
def test_special_numbers(isa):
    """Every pair of infinities, NaN, zeros of both signs, the largest, smallest and denormal numbers."""
    tiny = torch.finfo(torch.float32).tiny
    positive = [0.0, 1.0, 3.0, tiny, tiny / 4, 3e38, 1e-20, torch.inf]
    numbers = torch.tensor([*positive, *(-x for x in positive), torch.nan]).to(BF16)
    for bias in (0.0, -0.0, tiny / 2, -tiny, 1.5):
        a, b = numbers[:, None], numbers[None]
        vector = torch.full((len(numbers),), bias)
        # Behind a complete pair of zeros, and as the first and the second number of a pair.
        zeros = torch.zeros_like(a)
        for columns in ([a], [a, zeros], [zeros, a], [zeros, zeros, a]):
            left, right = torch.cat(columns, 1), torch.cat([b if c is a else torch.zeros_like(b) for c in columns])
            y, exact = multiply(isa, left, right, vector), expected(isa, left, right, vector)
            # Not their bits: the emulation loses the sign of a product that is too small for a float.
            torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)


def between_neighbours() -> Tensor:
    """float32 numbers halfway between those of bfloat16, just beside halfway, and above the largest."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0xBF808000, 0x7F7F8000, 0x7F7F7FFF])
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_stored_maps_are_rounded_to_nearest_even(isa):
    bias, zero = between_neighbours(), torch.zeros(1, 1, dtype=BF16)
    assert same_bits(multiply(isa, zero, zero.expand(1, len(bias)), bias), bias.to(BF16)[None])


@pytest.mark.parametrize("isa", ISAS)
def test_images_are_rounded_to_nearest_even(isa):
    x = torch.cat([between_neighbours(), torch.tensor([torch.inf, -torch.inf, torch.nan])])
    y = multiply(isa, x[:, None], torch.ones(1, 1, dtype=BF16), torch.zeros(1))
    assert y.dtype == torch.float32
    assert same_bits(y[:, 0].to(BF16), x.to(BF16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_nothing_beside_a_pixel_is_read(isa, value):
    """An odd number of channels ends in half a pair: what lies behind it must not count, be it a NaN."""
    for channels in (3, 7, 9, 15, 17):
        first = Layer("dense", torch.randn(channels, 3, 3, 3).to(BF16), torch.randn(channels), padding=(1, 1, 1, 1))
        second = Layer("pointwise", torch.randn(5, channels, 1, 1).to(BF16), torch.randn(5))
        x = torch.randn(1, 3, 3, 40)
        with running(isa, 1):
            network = Network([Chain((first,)), Chain((second,))], [1])
            right = network.run(x)[0]
            # Memory that an earlier call has left.
            network.run(torch.full_like(x, value))
            y = network.run(x)[0]
        assert torch.equal(y, right)
        assert y.isfinite().all()
