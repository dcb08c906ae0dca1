"""Networks of one to three layers on every instruction set, against torch in float64."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCES, assert_close
from native_cases import kernel_isas, needs_native, running
from torch import Tensor

from effnet_kernels.backends.activation import activate, gate_of
from effnet_kernels.backends.cpu.network import Network
from effnet_kernels.fusion.geometry import resolve_padding
from effnet_kernels.fusion.spec import ACTIVATIONS, GATES, Chain, Excitation, Layer

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


class Target(NamedTuple):
    """The kernels of an instruction set for networks of one dtype."""

    isa: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.isa}-{str(self.dtype).removeprefix('torch.')}"


TARGETS = [Target(isa, dtype) for dtype in (torch.float32, torch.bfloat16) for isa in kernel_isas(dtype)]
DTYPES = dict.fromkeys(target.dtype for target in TARGETS)
# Numbers that differ in float32's last bit are now and then rounded to neighbours of bfloat16, 2^-8 apart, and a gate's
# product with weights is rounded too. tests/test_bfloat16.py tests single products bit for bit.
NETWORK_TOLERANCES = TOLERANCES | {torch.bfloat16: 2**-7}


class Step(NamedTuple):
    """A layer that reads tensor i (0 is the image) and makes tensor i + 1."""

    layer: Layer
    residual: int = -1  # the tensor that is added to the output, or -1
    pool: bool = False


def dense(inputs, outputs, kernel=1, stride=1, padding=None, act="none", residual=-1, pool=False):
    weight = torch.randn(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel**2)
    padding = (kernel // 2,) * 4 if padding is None else padding
    kind = "pointwise" if kernel == stride == 1 else "dense"
    return Step(Layer(kind, weight, torch.randn(outputs), stride, padding, act=act), residual, pool)


def depthwise(channels, kernel=3, squeeze=0, gate="sigmoid", padding=None, stride=1, act="none"):
    weight, padding = torch.randn(channels, 1, kernel, kernel) / kernel, padding or (kernel // 2,) * 4
    step = Step(Layer("depthwise", weight, torch.randn(channels), stride, padding, None, act))
    return excited(step, squeeze, gate) if squeeze else step


def excited(step: Step, squeeze: int, gate: str = "sigmoid") -> Step:
    channels = step.layer.weight.shape[0]
    w1, w2 = torch.randn(squeeze, channels, 1, 1) / math.sqrt(channels), torch.randn(channels, squeeze, 1, 1)
    excitation = Excitation(w1, torch.randn(squeeze), w2, torch.randn(channels), "silu", gate)
    return step._replace(layer=step.layer._replace(excitation=excitation))


def rounded(steps: list[Step], dtype: torch.dtype) -> list[Step]:
    """The steps with weights of a dtype; vectors stay float32."""

    def in_dtype(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dim() == 1 else t.to(dtype)

    return [
        step._replace(layer=step.layer.with_parameters([in_dtype(t) for t in step.layer.parameters()]))
        for step in steps
    ]


def network_of(steps: list[Step], outputs: list[int]) -> Network:
    """The steps in chains that end where a residual begins, where it is added, and at outputs and means."""
    around = {end for i, step in enumerate(steps) if step.residual >= 0 for end in (step.residual, i + 1)}
    ends = sorted({*outputs, *around, *(i + 1 for i, step in enumerate(steps) if step.pool), len(steps)} - {0})
    chains = []
    for begin, end in itertools.pairwise([0, *ends]):
        last = steps[end - 1]
        assert last.residual in (-1, begin)
        chains.append(Chain(tuple(step.layer for step in steps[begin:end]), last.residual >= 0, last.pool))
    return Network(chains, [ends.index(output) for output in outputs])


def expected(steps: list[Step], x: Tensor, outputs: list[int]) -> list[Tensor]:
    """Every tensor in float64, the image first; in bfloat16 rounded where the engine stores it."""

    def stored(y: Tensor) -> Tensor:
        return y if x.dtype == torch.float32 else y.to(x.dtype).double()

    read_twice = {step.residual for step in steps} | set(outputs)
    tensors = [x.double()]
    for i, (layer, residual, pool) in enumerate(steps):
        z, kernel = tensors[-1], layer.weight.shape[-1]
        padding = resolve_padding(layer.padding, (z.shape[2], z.shape[3]), kernel, layer.stride)
        groups = z.shape[1] if layer.kind == "depthwise" else 1
        y = F.conv2d(F.pad(z, padding), layer.weight.double(), layer.bias.double(), layer.stride, groups=groups)
        y = activate(y, layer.act)
        if residual >= 0:
            y = y + tensors[residual]
        if layer.excitation is not None:
            w1, b1, w2, b2 = (t.double() for t in layer.excitation[:4])
            hidden = activate(F.conv2d(y.mean((2, 3), keepdim=True), w1, b1), layer.excitation.act)
            y = stored(y) * gate_of(F.conv2d(hidden, w2, b2), layer.excitation.gate)
        y = y.mean((2, 3), keepdim=True) if pool else y
        # The rows between a convolution and a depthwise one stay float32.
        before_depthwise = i + 1 < len(steps) and steps[i + 1].layer.kind == "depthwise"
        plain = layer.kind != "depthwise" and layer.excitation is None and residual < 0
        on_the_way = before_depthwise and plain and i + 1 not in read_twice
        tensors.append(y if on_the_way else stored(y))
    return tensors


def with_gaps(x: Tensor) -> Tensor:
    """The values of x in channels-last strides with other pixels behind each row."""
    return torch.cat([x, x], 3).contiguous(memory_format=torch.channels_last)[..., : x.shape[3]]


DENSE = (torch.contiguous_format, torch.channels_last)


def check(
    steps: list[Step],
    x: Tensor,
    target: Target,
    threads: int = 1,
    outputs: list[int] | None = None,
    mixed: bool = False,
) -> None:
    """In contiguous and channels-last strides; ``mixed``, too, with an image in other strides than the outputs."""
    outputs = [len(steps)] if outputs is None else outputs
    steps, x = rounded(steps, target.dtype), x.to(target.dtype)
    right = expected(steps, x, outputs)
    network = network_of(steps, outputs)
    images = [x.contiguous(memory_format=strides) for strides in DENSE]
    # Images and a single output in channels-last strides are read and written in place, the others are copied.
    pairs = itertools.product([*images, with_gaps(x)], DENSE) if mixed else zip(images, DENSE, strict=True)
    for image, strides in pairs:
        with running(target.isa, threads):
            actual = network.run(image, strides)
        for index, y in zip(outputs, actual, strict=True):
            assert y.dtype == target.dtype
            assert y.is_contiguous(memory_format=strides)
            assert_close(y.double(), right[index], NETWORK_TOLERANCES[target.dtype])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33])
def test_pointwise_channels(target, channels):
    for others, size in itertools.product((1, 5, 8, 16, 27), (1, 5)):
        check(
            [dense(3, others, act="relu"), dense(others, channels, act="silu")], torch.randn(2, 3, size, size), target
        )


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_pointwise_rows(target):
    # Every height of a register tile, several tiles with and without a remainder, and more than one block of rows.
    layers = [dense(4, 8), dense(8, 19, act="silu"), dense(19, 19, residual=2)]
    for size in (*range(1, 32), 42, 43, 83, 512):
        check(layers, torch.randn(3, 4, 1, size), target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_dense(target, kernel, stride):
    padding = (kernel // 2, (kernel - 1) // 2, kernel // 2, (kernel - 1) // 2)
    for channels, size, outputs in itertools.product((1, 3, 16), ((7, 9), (8, 33)), (5, 16, 40)):
        x = torch.randn(2, channels, *size)
        for given in (padding, "same", (0, 1, 2, 0)):
            check([dense(channels, outputs, kernel, stride=stride, padding=given, act="silu")], x, target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_dense_with_residual(target):
    layers = [dense(3, 24), dense(24, 40, 3, act="silu"), dense(40, 24, 3, residual=1), dense(24, 24, act="silu")]
    check(layers, torch.randn(2, 3, 8, 8), target, outputs=[3, 4])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_blocks_by_themselves(target, threads):
    """Networks that begin with a depthwise convolution, or add or pool the image: blocks of a model."""
    for channels, size, images in itertools.product((7, 8, 16, 40), ((5, 6), (14, 14)), (1, 6)):
        x = torch.randn(images, channels, *size)
        expand, middle = 3 * channels + 1, dense(channels, 3 * channels + 1, act="silu")
        project = dense(expand, channels, residual=0)
        for steps in (
            [middle, depthwise(expand, squeeze=3, act="silu"), project],
            [depthwise(channels, 5, squeeze=2, act="silu"), dense(channels, 16)],
            [depthwise(channels, stride=2, act="relu6")],
            [dense(channels, channels, residual=0)],
            [dense(channels, channels, 3, act="silu", residual=0)],
            [dense(channels, 72, act="silu", pool=True)],
        ):
            check(steps, x, target, threads, mixed=True)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_blocks_behind_one_another(target):
    """The image and the output are added, read twice, returned, or none of it, with every kind of first layer."""
    for channels, images in itertools.product((7, 8, 16), (1, 6)):
        x = torch.randn(images, channels, 6, 5)
        begins = [depthwise(channels, act="silu")], [dense(channels, channels, 3)], [dense(channels, channels)]
        for begin in (*begins, []):
            at = len(begin)
            for residuals in ((-1, -1), (at, -1), (-1, at + 1), (at, at + 1), (-1, at)):
                behind = [dense(channels, channels, act="silu", residual=residual) for residual in residuals]
                check([*begin, *behind], x, target, mixed=True)
            check([*begin, dense(channels, channels, residual=at)], x, target, outputs=sorted({1, at + 1}))


@pytest.mark.parametrize("isa", kernel_isas())
@pytest.mark.parametrize("channels", [16, 17, 24, 33])
def test_winograd(isa, channels):
    """3x3 convolutions of stride 1 and enough channels, on maps that end inside, at and behind a tile."""
    target = Target(isa, torch.float32)
    for outputs, size in itertools.product((16, 24, 41), ((1, 1), (4, 4), (5, 7), (8, 3), (13, 18))):
        for padding in ((1, 1, 1, 1), "same", (1, 2, 2, 0)):
            x = torch.randn(2, channels, *size)
            check([dense(channels, outputs, 3, padding=padding, act="silu")], x, target)
        # Behind another layer and before a depthwise one, with a residual, on several threads.
        layers = [dense(3, channels), dense(channels, channels, 3, act="relu", residual=1), depthwise(channels)]
        check(layers, torch.randn(3, 3, *size), target, threads=3, outputs=[2, 3])
    names = [name for name, *_ in network_of([dense(16, 16, 3)], [1]).profile(torch.randn(1, 16, 8, 8))]
    assert names == ["winograd 3x3 16 to 16 at 8x8"]


def test_winograd_switched_off(monkeypatch):
    layers, x = [dense(16, 16, 3)], torch.randn(1, 16, 8, 8)
    transformed = network_of(layers, [1]).run(x)[0]
    monkeypatch.setenv("EFFNET_KERNELS_WINOGRAD", "0")
    network = network_of(layers, [1])
    assert [name for name, *_ in network.profile(x)] == ["dense 3x3 16 to 16 at 8x8"]
    y = network.run(x)[0]
    assert not torch.equal(y, transformed)
    assert_close(transformed, y)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_expand_and_depthwise(target, kernel, stride):
    for channels, size, padding in itertools.product(
        (8, 17, 40), ((1, 1), (6, 11), (29, 31)), ((kernel // 2,) * 4, "same", (0, 3, 2, 1))
    ):
        if padding == (0, 3, 2, 1) and size[1] < kernel:
            continue
        options = {"stride": stride, "padding": padding, "act": "silu"}
        x = torch.randn(2, 3, *size)
        # Behind a 1x1 convolution, behind the stem, and behind a map that something else reads.
        expand = [dense(3, 9), dense(9, channels, act="silu")]
        check([*expand, depthwise(channels, kernel, squeeze=5, **options), dense(channels, 12)], x, target)
        check([dense(3, channels, 3, act="silu"), depthwise(channels, kernel, **options)], x, target)
        check([*expand, depthwise(channels, kernel, **options), dense(channels, 12)], x, target, outputs=[2, 4])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_squeeze_and_excitation(target, gate, size):
    for channels, squeeze, outputs in ((8, 1, 4), (20, 6, 40), (33, 17, 9)):
        layers = [
            dense(3, channels, 3, act="silu"),
            depthwise(channels, 3, squeeze, gate, act="silu"),
            dense(channels, outputs),
        ]
        x = torch.randn(3, 3, size, size)
        check(layers, x, target)
        check(layers, x, target, outputs=[2, 3])
        check(layers[:2], x, target)


KINDS = {
    "dense": lambda channels: dense(channels, channels, 3, act="silu"),
    "winograd": lambda channels: dense(channels, channels, 3, act="silu"),
    "strided": lambda channels: dense(channels, channels, 3, 2, act="silu"),
    "pointwise": lambda channels: dense(channels, channels + 3, act="silu"),
    "depthwise": lambda channels: depthwise(channels, act="silu"),
}


@pytest.mark.parametrize("target", [[t for t in TARGETS if t.dtype is dtype][-1] for dtype in DTYPES], ids=str)
@pytest.mark.parametrize("size", [3, 12])
def test_squeeze_and_excitation_behind_any_layer(target, size):
    """Three layers of any kinds behind a first one, each with and without an excitation."""
    for kinds in itertools.product(KINDS, repeat=3):
        for excitations in itertools.product([0, 5], repeat=3):
            if not any(excitations):
                continue
            channels = 24 if "winograd" in kinds else 11
            steps = [dense(3, channels)]
            for kind, squeeze in zip(kinds, excitations, strict=True):
                step = KINDS[kind](channels)
                channels = step.layer.weight.shape[0]
                steps.append(excited(step, squeeze) if squeeze else step)
            check(steps, torch.randn(2, 3, size, size), target)


@pytest.mark.parametrize("beside", [{"residual": 0}, {"pool": True}])
def test_squeeze_and_excitation_beside_a_residual_or_pooling_is_refused(beside):
    step = excited(dense(8, 8), 4)._replace(**beside)
    with pytest.raises(ValueError, match="neither a residual nor pooling beside squeeze-and-excitation"):
        network_of([step], [1])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_pool_and_classifier(target, act):
    for channels, outputs, size in ((5, 3, 1), (16, 33, 7), (100, 1000, 12)):
        layers = [dense(3, 8), dense(8, channels, act=act, pool=True), dense(channels, outputs)]
        check(layers, torch.randn(5, 3, size, size), target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_images_go_together_in_any_number(target):
    layers = [dense(3, 8, 3, stride=2, act="silu"), depthwise(8, squeeze=2), dense(8, 8), dense(8, 8, residual=3)]
    for batch in (1, 2, 3, 4, 5, 8, 9, 13):
        check(layers, torch.randn(batch, 3, 9, 9), target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_threads_change_no_bit(target):
    layers = [
        dense(3, 24, 3, stride=2, act="silu"),
        depthwise(24, squeeze=6, act="silu"),
        dense(24, 16),
        dense(16, 96, act="silu"),
        depthwise(96, 5, squeeze=4, act="silu"),
        dense(96, 16, residual=3),
        dense(16, 33, act="silu", pool=True),
        dense(33, 10),
    ]
    with running(target.isa, 1):
        network = network_of(rounded(layers, target.dtype), [8])
    for batch, size in ((1, 32), (3, 57)):
        x = torch.randn(batch, 3, size, size)
        with running(target.isa, 1):
            once = network.run(x)[0]
        for threads in (2, 3, 7):
            with running(target.isa, threads):
                assert torch.equal(network.run(x)[0], once)
    check(layers, x, target, threads=2)


def test_strides_of_the_image_change_no_bit():
    network = network_of([dense(3, 8, 3, act="silu"), depthwise(8)], [2])
    x = torch.randn(2, 3, 9, 10)
    once = network.run(x)[0]
    wide = torch.zeros(2, 3, 18, 30)
    wide[:, :, ::2, ::3] = x
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        wide[:, :, ::2, ::3],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(network.run(other)[0], once)
    ours = network.run(x, torch.channels_last)[0]
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, once)
    one = torch.randn(1, 3, 9, 10)
    assert torch.equal(network.run(one.expand(3, -1, -1, -1))[0], network.run(one.repeat(3, 1, 1, 1))[0])


def test_residual_of_another_size():
    network = network_of([dense(3, 8), dense(8, 8, 3, stride=2), dense(8, 8, residual=1)], [3])
    with pytest.raises(ValueError, match="layer 2: expected a residual of 8 x 3 x 3, got 8 x 5 x 5"):
        network.run(torch.randn(1, 3, 5, 5))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(1, 3, 8, 8).double(), "expected a float32.*float64"),
        (torch.randn(1, 3, 8, 8, device="meta"), "expected a float32 tensor on the CPU, got .*meta"),
        (torch.randn(1, 4, 8, 8), r"expected images \[N, 3, H, W\], got shape \(1, 4, 8, 8\)"),
        (torch.randn(3, 8, 8), r"expected images \[N, 3, H, W\], got shape \(3, 8, 8\)"),
        (torch.randn(1, 3, 1, 8), "expected a larger image, got 1 x 8"),
    ],
)
def test_wrong_images(x, message):
    with pytest.raises(ValueError, match=message):
        network_of([dense(3, 8, 3, padding=(0, 0, 0, 0))], [1]).run(x)


def test_no_images():
    assert network_of([dense(3, 8)], [1]).run(torch.randn(0, 3, 8, 8))[0].shape == (0, 8, 8, 8)
