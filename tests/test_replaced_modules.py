"""Networks whose modules were replaced, hooked or given another forward compute what their modules say."""

import copy
import random
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCES, assert_close, calibrate
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import effnet_kernels as ek
from effnet_kernels.backends import select
from effnet_kernels.fusion import inspection

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
]

AVAILABLE = [backend for backend, reason in select.available().items() if reason is None]
X = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))

Change = Callable[[nn.Module], None]


def network() -> nn.Module:
    torch.manual_seed(0)
    stages = [
        ek.MBConvConfig(1, 3, 1, 8, 8, 1),
        ek.FusedMBConvConfig(4, 3, 2, 8, 16, 2),
        ek.MBConvConfig(6, 5, 2, 16, 24, 2),
    ]
    return calibrate(ek.EfficientNet(stages, 0.0, 0.0, num_classes=0, last_channel=64))


NETWORK = network()


def changed(change: Change) -> nn.Module:
    model = copy.deepcopy(NETWORK)
    change(model)
    return model.eval()


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The network as a loop over its modules."""
    with ek.use_backend("torch"):
        return model.classifier(torch.flatten(model.avgpool(model.features(x)), 1))


def assert_computes_its_modules(change: Change, backend: str) -> None:
    try:
        expected = plain(changed(change).double(), X.double())
    except (RuntimeError, TypeError):
        with ek.use_backend(backend), pytest.raises((RuntimeError, TypeError, ValueError)):
            changed(change)(X)
        return
    with ek.use_backend(backend):
        assert_close(changed(change)(X).double(), expected, TOLERANCES[torch.float32])


# Poolings


class GeM(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.clamp(min=1e-6).pow(3), x.shape[-2:]).pow(1 / 3)


class Own(nn.AdaptiveAvgPool2d):
    """A pooling of the user's that inherits from torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x * x)


SIZES = [1, 2, 3, (1, 1), [1, 1], (1, 2), (2, 1), [2, 2], None, (None, None), (1, None), (None, 1)]
POOLINGS = {
    **{f"mean to {size}": lambda size=size: nn.AdaptiveAvgPool2d(size) for size in SIZES},
    **{f"maximum to {size}": lambda size=size: nn.AdaptiveMaxPool2d(size) for size in (1, 2, (1, 1))},
    "GeM": GeM,
    "a class of its own": lambda: Own(1),
    "mean of windows": lambda: nn.AvgPool2d(2),
    "nothing": nn.Identity,
    "a sequence": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1)),
    "mean and dropout": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.9)),
}


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("size_is_assigned", [False, True])
@pytest.mark.parametrize("name", POOLINGS)
def test_poolings(name: str, size_is_assigned: bool, backend: str) -> None:
    pooling = POOLINGS[name]()

    def change(model: nn.Module) -> None:
        if size_is_assigned and type(pooling) is nn.AdaptiveAvgPool2d:
            model.avgpool.output_size = pooling.output_size
        else:
            model.avgpool = pooling

    assert_computes_its_modules(change, backend)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("package", ["effnet_kernels", "torchvision.ops"])
@pytest.mark.parametrize("size", [1, (1, 1), [1, 1], 2, (1, 2)])
def test_poolings_of_squeeze_and_excitation(size: object, package: str, backend: str) -> None:
    layer = pytest.importorskip(package, reason="compares with torchvision").SqueezeExcitation
    models = pytest.importorskip("torchvision.models.efficientnet", reason="compares with torchvision")
    if package == "effnet_kernels":
        block = ek.MBConv(ek.MBConvConfig(4, 3, 2, 8, 16, 1), 0.0, nn.BatchNorm2d)
    else:
        block = models.MBConv(models.MBConvConfig(4, 3, 2, 8, 16, 1, 1.0, 1.0), 0.0, nn.BatchNorm2d)
    [excitation] = [module for module in block.modules() if isinstance(module, layer)]
    block = ek.accelerate(block).eval()
    # Maps of 2x2 pixels, to which a gate of 2x2 or 1x2 can be multiplied.
    x = torch.randn(2, 8, 4, 4)
    block(x)
    excitation.avgpool = nn.AdaptiveAvgPool2d(size)
    with torch.no_grad(), ek.use_backend("torch"):
        expected = block(x)
    with torch.no_grad(), ek.use_backend(backend):
        assert_close(block(x), expected)


# Hooks and forwards


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, inputs, output: output * 1.5)


def hook_with_arguments(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, args, kwargs, output: output + 0.5, with_kwargs=True, prepend=True)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 1.5,))


def instance_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda input: forward(input) - 0.5


def subclass(module: nn.Module) -> None:
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, input: kind.forward(self, input) * 1.5})


def compiled(module: nn.Module) -> None:
    # What ``module.compile()`` leaves in a module; numbers that it changes show whether it was called.
    call = module._call_impl
    module._compiled_call_impl = lambda input: call(input) * 1.5


def scripted(module: nn.Module) -> None:
    """A child that answers no questions about its class."""
    names = [name for name, child in module.named_modules() if isinstance(child, nn.SiLU)]
    for name in names:
        module.set_submodule(name, torch.jit.script(nn.SiLU()))


def traced(module: nn.Module) -> None:
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.SiLU):
            module.set_submodule(name, torch.jit.trace(child, torch.ones(1, dtype=torch.float64)))


class WithAName(nn.SiLU):
    """A class of the user's with an attribute that has a meaning elsewhere in this package."""

    original = "SiLU"
    scripted = method = pairs = property(lambda self: 1 / 0)


def with_a_name(module: nn.Module) -> None:
    for child in module.modules():
        if type(child) is nn.SiLU:
            child.__class__ = WithAName


CHANGES = (scripted, traced, with_a_name, hook, hook_with_arguments, pre_hook, instance_forward, subclass, compiled)
PLACES = ["features", "features.0", "features.2", "features.3.1", "features.4", "avgpool", "classifier"]


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules(change: Change, place: str, backend: str) -> None:
    assert_computes_its_modules(lambda model: change(model.get_submodule(place)), backend)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("seed", range(60))
def test_several_changes_at_once(seed: int, backend: str) -> None:
    def change(model: nn.Module) -> None:
        choose = random.Random(seed)
        if choose.random() < 0.5:
            model.avgpool = POOLINGS[choose.choice(list(POOLINGS))]()
        for place in choose.sample(PLACES, 2):
            choose.choice(CHANGES)(model.get_submodule(place))

    assert_computes_its_modules(change, backend)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("place", PLACES)
def test_backward_hooks_fire(place: str, backend: str) -> None:
    model, fired = changed(lambda model: None), []
    model.get_submodule(place).register_full_backward_hook(lambda *arguments: fired.append(place))
    with ek.use_backend(backend):
        model(X.clone().requires_grad_()).sum().backward()
    assert fired == [place]


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_global_hooks_fire_for_every_module(register: Callable, backend: str) -> None:
    model, called = changed(lambda model: None), []
    handle = register(lambda module, *arguments: called.append(module))
    try:
        with ek.use_backend(backend):
            model(X)
    finally:
        handle.remove()
    # Stochastic depth is called where there is a residual.
    expected = [module for module in model.modules() if not isinstance(module, ek.StochasticDepth)]
    assert {module for module in expected if module not in called} == set()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("cut", [slice(1, None), slice(0, 0), slice(-1), slice(None, 3), slice(None, None, 2)], ids=str)
def test_cut_features(cut: slice, backend: str) -> None:
    def change(model: nn.Module) -> None:
        model.features = model.features[cut]

    assert_computes_its_modules(change, backend)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_sequence_of_the_users_is_walked(backend: str) -> None:
    def change(model: nn.Module) -> None:
        model.features = nn.Sequential(OrderedDict((f"layer{i}", layer) for i, layer in enumerate(model.features)))

    assert_computes_its_modules(change, backend)
    backbone = ek.efficientnet_b0(features_only=True).eval()
    with torch.no_grad(), ek.use_backend(backend):
        expected = backbone(X)
        change(backbone)
        for actual, y in zip(backbone(X), expected, strict=True):
            assert_close(actual, y)


def test_activations_with_other_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a class that is taken for an activation of the kernels later, whose settings nobody listed."""
    monkeypatch.setitem(inspection.ACTIVATIONS_OF, nn.ELU, "silu")
    monkeypatch.setattr(inspection, "ELEMENTWISE", {*inspection.ELEMENTWISE, nn.ELU})
    for kind, setting in ((nn.ReLU6, "max_val"), (nn.ReLU6, "min_val"), (nn.ELU, "alpha")):
        usual, other = kind(), kind()
        setattr(other, setting, 0.5)
        assert inspection.deviation("it", usual) is None
        assert inspection.deviation("it", other) == f"it has the {setting} 0.5, which no kernel computes"
        # What does not change the computation may differ.
        usual.inplace, usual.note = True, "mine"
        assert inspection.deviation("it", usual) is None
