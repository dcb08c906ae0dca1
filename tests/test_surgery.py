"""Blocks and networks whose parts were changed at random: they compute what torch computes of them, or raise an error.

``pytest tests/test_surgery.py --cases 20000`` tries more than a run of the whole suite does.
"""

import contextlib
import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import TOLERANCES, randomize, relative_rms
from native_cases import needs_native
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels.backends import select
from effnet_kernels.modules import ConvBnAct, FusedMBConvConfig, MBConvConfig

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

SIZES = [(7, 9), (1, 1), (5, 4), (30, 1), (8, 8), (2, 3)]


def mbconv(draw: random.Random) -> tuple[nn.Module, int]:
    config = MBConvConfig(draw.choice([1, 2, 4]), draw.choice([3, 5]), 1, 16, draw.choice([16, 16, 24]), 1)
    return config.block(config, 0.0, nn.BatchNorm2d), 16


def fused_mbconv(draw: random.Random) -> tuple[nn.Module, int]:
    config = FusedMBConvConfig(draw.choice([1, 4]), 3, 1, 16, draw.choice([16, 16, 24]), 1)
    return config.block(config, 0.0, nn.BatchNorm2d), 16


def conv_bn_act(draw: random.Random) -> tuple[nn.Module, int]:
    channels = draw.choice([3, 8])
    groups = channels if draw.random() < 0.3 else 1
    return ConvBnAct(channels, 8 * groups, draw.choice([1, 3, 5]), draw.choice([1, 2, 3]), groups), channels


def torchvision_mbconv(draw: random.Random) -> tuple[nn.Module, int]:
    from torchvision.models.efficientnet import MBConv
    from torchvision.models.efficientnet import MBConvConfig as Config

    return MBConv(Config(draw.choice([1, 4]), 3, 1, 16, draw.choice([16, 24]), 1), 0.0, nn.BatchNorm2d), 16


def torchvision_fused(draw: random.Random) -> tuple[nn.Module, int]:
    from torchvision.models.efficientnet import FusedMBConv
    from torchvision.models.efficientnet import FusedMBConvConfig as Config

    return FusedMBConv(Config(draw.choice([1, 4]), 3, 1, 16, draw.choice([16, 24]), 1), 0.0, nn.BatchNorm2d), 16


def torchvision_layer(draw: random.Random) -> tuple[nn.Module, int]:
    from torchvision.ops.misc import Conv2dNormActivation

    channels, kernel = draw.choice([3, 8]), draw.choice([1, 2, 3, 5])
    stride, padding = draw.choice([1, 2, 3, 20]), draw.choice([None, 0, 1, 3, 10])
    return Conv2dNormActivation(channels, 8, kernel, stride, padding), channels


def timm_inverted_residual(draw: random.Random) -> tuple[nn.Module, int]:
    from timm.layers import BatchNormAct2d
    from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite

    layers = {"act_layer": nn.SiLU, "norm_layer": BatchNormAct2d, "se_layer": SqueezeExcite}
    return InvertedResidual(16, draw.choice([16, 24]), 3, 1, exp_ratio=2.0, pad_type="", **layers), 16


def lukemelas_block(draw: random.Random) -> tuple[nn.Module, int]:
    from efficientnet_pytorch import EfficientNet

    return copy.deepcopy(EfficientNet.from_name("efficientnet-b0")._blocks[draw.choice([0, 2])]), draw.choice([24, 32])


MAKERS = [
    mbconv,
    fused_mbconv,
    conv_bn_act,
    torchvision_mbconv,
    torchvision_fused,
    torchvision_layer,
    timm_inverted_residual,
    lukemelas_block,
]


def replace_convolution(model: nn.Module, name: str, inputs: int, outputs: int) -> None:
    conv = model.get_submodule(name)
    made = nn.Conv2d(inputs, outputs, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)


def operate(model: nn.Module, draw: random.Random) -> str:
    """Changes one thing about one of the convolutions or norms, as people do, and says what."""
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    name = draw.choice(list(convolutions))
    conv = convolutions[name]
    norm_name = draw.choice(list(norms))
    norm = norms[norm_name]
    number = draw.choice([1, 2, 3])
    width = draw.choice([1, 8, conv.out_channels + 8])

    def new_weight() -> None:
        shape = draw.choice([conv.weight.shape[0], 8]), *conv.weight.shape[1:]
        conv.weight.data = torch.randn(shape)[:, : draw.choice([1, 8, 999])]

    def new_kernel() -> None:
        conv.kernel_size = (number + 1, number + 1)
        conv.weight.data = torch.randn(*conv.weight.shape[:2], number + 1, number + 1)

    def new_vector() -> None:
        vectors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        draw.choice([v for v in vectors if v is not None]).data = torch.rand(draw.choice([1, 8, norm.num_features + 8]))

    def residual() -> None:
        for module in model.modules():
            for attribute in ("use_res_connect", "has_skip"):
                if attribute in module.__dict__:
                    setattr(module, attribute, True)

    operations: dict[str, Callable[[], object]] = {
        "stride": lambda: setattr(conv, "stride", (number, number)),
        "stride, a number": lambda: setattr(conv, "stride", number),
        "padding, a list": lambda: setattr(conv, "padding", [number - 1, number - 1]),
        "uneven stride": lambda: setattr(conv, "stride", (number, 1)),
        "padding": lambda: setattr(conv, "padding", (2 * number - 2,) * 2),
        "dilation": lambda: setattr(conv, "dilation", (number, number)),
        "groups": lambda: setattr(conv, "groups", 2**number),
        "fewer outputs": lambda: replace_convolution(model, name, conv.in_channels, width),
        "fewer inputs": lambda: replace_convolution(model, name, width, conv.out_channels),
        "bias": lambda: setattr(conv, "bias", nn.Parameter(torch.randn(draw.choice([conv.out_channels, 1])))),
        "no bias": lambda: setattr(conv, "bias", None),
        "weight": new_weight,
        "kernel": new_kernel,
        "norm": new_vector,
        "no statistics": lambda: setattr(norm, draw.choice(["running_mean", "running_var"]), None),
        "norm without weight": lambda: setattr(norm, draw.choice(["weight", "bias"]), None),
        "double": lambda: draw.choice([conv, norm]).double(),
        "residual": residual,
    }
    what = draw.choice(list(operations))
    operations[what]()
    return f"{what} of {name} or {norm_name}"


Outcome = list[Tensor] | Exception


def train(module: nn.Module, x: Tensor, backend: select.Backend | None) -> Outcome:
    """The output and all gradients, or the error."""
    x = x.clone().requires_grad_()
    try:
        with contextlib.nullcontext() if backend is None else select.use_backend(backend):
            y = module(x)
            y.backward(torch.linspace(-1, 1, y.numel()).to(y.dtype).reshape(y.shape))
    except Exception as error:
        return error
    return [y.detach(), *(t.grad for t in (x, *module.parameters()) if t.grad is not None)]


def agree(ours: list[Tensor], theirs: list[Tensor], exact: Outcome) -> bool:
    """Whether each tensor is as right as torch's.

    BatchNorm of two values a channel magnifies rounding, in torch's operators as in ours, so that what is allowed is
    ten times torch's own error, or 1e-4 of the largest gradient.
    """
    if isinstance(exact, Exception):
        exact = [t.double() for t in theirs]
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return False
    largest = max((float(t.abs().max()) for t in exact[1:]), default=0.0)
    for index, (own, other, right) in enumerate(zip(ours, theirs, exact, strict=True)):
        allowed = 10 * float((other - right).abs().max()) + 1e-4 * (float(right.abs().max()) if index == 0 else largest)
        if not float((own - right).abs().max()) <= allowed:
            return False
    return True


def surgeries(count: int, seed: int) -> Iterator[tuple[str, nn.Module, Tensor]]:
    for case in range(seed, seed + count):
        draw = random.Random(case)
        torch.manual_seed(case)
        maker = draw.choice(MAKERS)
        block, channels = maker(draw)
        randomize(block, case).train(draw.random() < 0.5)
        block = ek.accelerate(nn.Sequential(block))
        x = torch.randn(draw.choice([1, 2]), channels, *draw.choice(SIZES))
        if draw.random() < 0.5:
            # What was found out about the block before the change must not outlive it.
            train(block, torch.randn(2, channels, 8, 8), None)
            block.zero_grad()
        changes = [operate(block, draw) for _ in range(draw.choice([0, 1, 1, 2]))]
        yield f"case {case}: {maker.__name__}, {', '.join(changes)}, {tuple(x.shape)}", block, x


@pytest.mark.parametrize("part", range(8))
def test_changed_blocks_compute_what_torch_computes_or_raise(part: int, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--cases") // 8
    seen: Counter[str] = Counter()
    for name, block, x in surgeries(count, seed=part * 1_000_000):
        theirs = train(copy.deepcopy(block), x, "torch")
        ours = train(copy.deepcopy(block), x, None)
        if isinstance(theirs, Exception):
            assert isinstance(ours, Exception), f"{name}: torch says {theirs}"
            seen["both raise"] += 1
        elif isinstance(ours, Exception):
            # A parameter of another dtype is refused, where torch may convert it; all else runs as torch has it.
            assert isinstance(ours, ValueError), f"{name}: {ours!r}"
            assert "double" in name, f"{name}: {ours!r}"
            seen["refused"] += 1
        else:
            assert agree(ours, theirs, train(copy.deepcopy(block).double(), x.double(), "torch")), name
            seen["agree"] += 1
    assert seen["agree"] > 0.3 * count
    assert seen["refused"] < 0.1 * count, seen


def networks() -> dict[str, Callable[[], nn.Module]]:
    def ours() -> nn.Module:
        settings = [MBConvConfig(1, 3, 1, 8, 16, 1), MBConvConfig(4, 5, 2, 16, 24, 2)]
        return ek.EfficientNet(settings, 0.0, 0.0, num_classes=5)

    def torchvision() -> nn.Module:
        from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

        settings = [FusedMBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2, 1.0, 1.0)]
        return EfficientNet(settings, 0.0, 0.0, num_classes=5)

    return {"ours": ours, "torchvision": torchvision}


@pytest.mark.parametrize("name", networks())
def test_frozen_networks_with_changed_parts_compute_what_torch_computes_or_raise(
    name: str, request: pytest.FixtureRequest
) -> None:
    count = request.config.getoption("--cases") // 4
    seen: Counter[str] = Counter()
    for case in range(count):
        draw = random.Random(case)
        torch.manual_seed(case)
        model = randomize(networks()[name](), case).eval()
        changes = [operate(model, draw) for _ in range(draw.choice([0, 1, 1, 2]))]
        x = torch.randn(2, 3, *draw.choice([(17, 15), (32, 32), (9, 30)]))
        what = f"case {case}: {', '.join(changes)}"
        try:
            with torch.no_grad(), select.use_backend("torch"):
                expected = copy.deepcopy(model).double()(x.double())
                model(x)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017, PT011 - any error will do where torch has one
                ek.freeze(model)(x)
            seen["both raise"] += 1
            continue
        try:
            y = ek.freeze(model)(x)
        except (ValueError, TypeError):
            seen["refused"] += 1
            continue
        assert y.shape == expected.shape, what
        assert relative_rms(y, expected) <= TOLERANCES[torch.float32], what
        seen["agree"] += 1
    assert seen["agree"] > 0.2 * count, seen
