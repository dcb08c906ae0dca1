"""What people do around a network while it trains gives what torch's own modules give: settings, hooks, strides."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_cases import BLOCKS, THIRD_PARTY_BLOCKS
from conftest import assert_buffers_close, assert_close, calibrate, randomize
from native_cases import needs_native
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import effnet_kernels as ek
from effnet_kernels.modules import MBConvConfig

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


def ours() -> nn.Module:
    torch.manual_seed(0)
    stages = [MBConvConfig(1, 3, 1, 16, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 1)]
    return calibrate(ek.EfficientNet(stages, 0.0, 0.0, num_classes=4, last_channel=32))


def torchvisions() -> nn.Module:
    package = pytest.importorskip("torchvision.models.efficientnet", reason="torchvision is not installed")
    torch.manual_seed(0)
    stages = [package.MBConvConfig(1, 3, 1, 16, 8, 1), package.MBConvConfig(4, 3, 2, 8, 16, 1)]
    return ek.accelerate(calibrate(package.EfficientNet(stages, 0.0, 0.0, num_classes=4, last_channel=32)))


def timms() -> nn.Module:
    package = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    return ek.accelerate(calibrate(package.create_model("efficientnet_lite0", num_classes=4)))


NETWORKS = {"ours": ours, "torchvision": torchvisions, "timm": timms}


def norms(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def of_torch(model: nn.Module) -> nn.Module:
    """A copy on torch's modules, by :func:`torchs`."""
    return ek.restore(copy.deepcopy(model))


def torchs(model: nn.Module, *inputs: Tensor) -> Any:
    with ek.use_backend("torch"):
        return model(*inputs)


# Settings of norms


SETTINGS: dict[str, Callable[[Any], None]] = {
    "a momentum that is a tensor": lambda norm: setattr(norm, "momentum", torch.tensor(0.3)),
    "an eps that is a tensor": lambda norm: setattr(norm, "eps", torch.tensor(1e-2)),
    "no eps": lambda norm: setattr(norm, "eps", 0.0),
    "a negative momentum": lambda norm: setattr(norm, "momentum", -0.5),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_norms(setting: str, training: bool, backend: ek.backends.select.Backend) -> None:
    block, x = randomize(BLOCKS["expand"][0]()).train(training), torch.randn(3, 16, 9, 9)
    SETTINGS[setting](norms(block)[1])
    eager = copy.deepcopy(block)
    try:
        expected = torchs(eager, x)
    except ValueError:
        # Newer versions of torch refuse an eps of 0 in training.
        with pytest.raises(ValueError, match="eps"):
            block(x)
        return
    assert_close(block(x), expected)
    assert_buffers_close(block, eager)
    if "tensor" in setting:
        assert "not a number" in (ek.explain(block, x)[0].reason or "")


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_a_norm_that_is_in_a_block_twice(momentum: float | None) -> None:
    block, x = randomize(BLOCKS["kernel 7, hardswish"][0]()).train(), torch.randn(3, 16, 9, 9) * 3 + 1
    first, second = norms(block)[:2]
    first.momentum = momentum
    parent = next(m for m in block.modules() if any(child is second for child in m.children()))
    parent[1] = first
    eager = copy.deepcopy(block)
    assert_close(block(x), torchs(eager, x))
    assert_buffers_close(block, eager)


# Between forward and backward


@pytest.mark.parametrize("name", ["expand", "fused, residual", "stem", "torchvision", "efficientnet_pytorch"])
def test_biases_may_change_before_backward(name: str) -> None:
    """Two losses in flight, and a step of the biases between: torch saves none of their values."""
    make, shape = (BLOCKS | THIRD_PARTY_BLOCKS)[name]
    block, x = randomize(make()).train(), torch.randn(4, *shape[1:])
    for path, p in block.named_parameters():
        p.requires_grad_(path.endswith("bias"))
    eager, gradients = of_torch(block), []
    for model, backend in ((block, None), (eager, "torch")):
        torch.manual_seed(1)
        call = model if backend is None else lambda x: torchs(eager, x)
        losses = [call(x).square().sum(), call(2 * x).cos().sum()]
        for loss in losses:
            model.zero_grad()
            loss.backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(0.1)
    for found, right in zip(gradients[:2], gradients[2:], strict=True):
        for g, expected in zip(found, right, strict=True):
            assert_close(g, expected, 1e-4)


def test_a_second_derivative_reads_biases() -> None:
    block, x = randomize(BLOCKS["head"][0]()), torch.randn(2, 40, 5, 5, requires_grad=True)
    y = block(x).square().sum()
    with torch.no_grad():
        block.norm.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="a bias was modified by an in-place operation"):
        torch.autograd.grad(y, x, create_graph=True)


# Strides


@pytest.mark.parametrize("strides", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_images_gradient_has_its_strides(name: str, strides: torch.memory_format) -> None:
    model = NETWORKS[name]()
    x = torch.randn(2, 3, 24, 20).contiguous(memory_format=strides).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    assert grad.stride() == x.stride()
    (expected,) = torch.autograd.grad(torchs(of_torch(model), x).square().sum(), x)
    assert_close(grad, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_get_maps_in_torchs_strides(name: str, training: bool) -> None:
    """Of contiguous images: a Gram matrix by ``view``, at all blocks, at one and at each module inside of one."""
    model, x = NETWORKS[name]().train(training), torch.randn(2, 3, 24, 20)
    blocks = [m for m in model.modules() if isinstance(m, ek.modules.fused_module.FusedModule)]
    whole = model.blocks if name == "timm" else model.features
    # Of the others a stage of one block is a plain sequence, which gives what its block does.
    stages = [model.features[1]] if name == "ours" else []
    for hooked in (
        whole,
        *stages,
        blocks[1],
        *(m for m in blocks[2].modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))),
    ):
        seen: list[Tensor] = []
        handle = hooked.register_forward_hook(
            lambda _, inputs, y, seen=seen: seen.append(y.view(y.shape[0] * y.shape[1], -1))
        )
        model(x)
        handle.remove()
        assert len(seen) == 1


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_backward_hooks_on_norms_change_no_gradient(name: str, images: int) -> None:
    model, x = NETWORKS[name](), torch.randn(images, 3, 40, 40)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    eager = of_torch(model).double()
    torchs(eager, x.double())[:, 0].sum().backward()
    for norm in norms(model):
        handle = norm.register_full_backward_hook(lambda *_: None)
        model.zero_grad()
        y = model(x)
        y[:, 0].sum().backward()
        handle.remove()
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            assert_close(p.grad.double(), q.grad, 1e-3)


def test_global_hooks_see_the_networks_modules_alone() -> None:
    model, x, seen = timms(), torch.randn(1, 3, 32, 32), []
    names = {module: name for name, module in model.named_modules()}
    handle = register_module_forward_hook(lambda module, *_: seen.append(names[module]))
    try:
        model(x)
        found = list(seen)
        seen.clear()
        names |= {module: name for name, module in ek.restore(model).named_modules()}
        model(x)
    finally:
        handle.remove()
    assert found == seen


# Arguments by name


@pytest.mark.parametrize("name", ["torchvision", "timm", "timm, dense with an excitation", "efficientnet_pytorch"])
def test_blocks_take_their_arguments_by_name(name: str) -> None:
    make, shape = THIRD_PARTY_BLOCKS[name]
    block, x = make().eval(), torch.randn(shape)
    eager = of_torch(block)
    parameters = inspect.signature(type(eager).forward).parameters
    assert list(inspect.signature(type(block).forward).parameters) == list(parameters)
    first = list(parameters)[1]
    assert_close(block(**{first: x}), eager(**{first: x}))
    with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{first}'"):
        block()
    with pytest.raises(TypeError, match="unexpected keyword argument 'image'"):
        block(image=x)


def test_networks_take_their_arguments_by_name() -> None:
    package = pytest.importorskip("efficientnet_pytorch", reason="efficientnet_pytorch is not installed")
    network: Any = ek.accelerate(package.EfficientNet.from_name("efficientnet-b0")).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(network.extract_features(inputs=x), network.extract_features(x))
    assert list(network.extract_endpoints(inputs=x)) == list(network.extract_endpoints(x))
    assert list(inspect.signature(network.extract_features).parameters) == ["inputs"]
    with pytest.raises(TypeError, match=r"extract_features.*missing 1 required positional argument: 'inputs'"):
        network.extract_features()
