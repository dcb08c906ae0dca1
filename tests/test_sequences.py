"""Networks whose modules are computed together at inference, against the same modules called one by one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_close, calibrate, randomize, relative_rms
from native_cases import needs_native
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels import EfficientNet
from effnet_kernels.backends import cpu, triton
from effnet_kernels.backends.cpu.network import Network
from effnet_kernels.fusion import packing, sequence
from effnet_kernels.fusion.sequence import ChainSequence
from effnet_kernels.modules import FusedMBConvConfig, MBConvConfig, fused_sequence

pytestmark = needs_native

SETTINGS = [
    MBConvConfig(1, 3, 1, 16, 8, 2),
    FusedMBConvConfig(2, 3, 2, 8, 16, 2),
    MBConvConfig(2, 5, 2, 16, 24, 2),
    MBConvConfig(2, 3, 1, 24, 24, 2, squeeze_ratio=None),
]


OWNERS = ("ours", "torchvision")


def network(owner: str = "ours") -> Any:
    """A network of ours, or one of torchvision that is accelerated."""
    torch.manual_seed(0)
    if owner == "ours":
        return randomize(EfficientNet(SETTINGS, 0.0, num_classes=5, last_channel=40)).eval()
    theirs = pytest.importorskip("torchvision.models.efficientnet", reason="torchvision is not installed")
    settings = [
        theirs.MBConvConfig(1, 3, 1, 16, 8, 2),
        theirs.FusedMBConvConfig(2, 3, 2, 8, 16, 2),
        theirs.MBConvConfig(2, 5, 2, 16, 24, 2),
        theirs.MBConvConfig(2, 3, 1, 24, 24, 2),
    ]
    model = theirs.EfficientNet(settings, 0.0, num_classes=5, last_channel=40)
    return ek.accelerate(randomize(model).eval())


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 33, 46))


def by_torch(model: nn.Module, x: Tensor) -> Tensor:
    with ek.use_backend("torch"), torch.no_grad():
        return model(x)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of each native call."""
    numbers: list[int] = []
    make, run = Network.__init__, Network.run

    def made(self: Network, chains, *arguments, **named) -> None:
        self.layers = sum(len(chain.layers) for chain in chains)
        make(self, chains, *arguments, **named)

    monkeypatch.setattr(Network, "__init__", made)
    monkeypatch.setattr(Network, "run", lambda self, *rest: numbers.append(self.layers) or run(self, *rest))
    return numbers


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("strides", [torch.contiguous_format, torch.channels_last])
def test_a_network_is_one_native_call(calls, monkeypatch, strides, owner: str) -> None:
    model, x = network(owner), image().contiguous(memory_format=strides)
    with torch.no_grad():
        logits, maps = model(x), model.features(x)
        assert len(calls) == 2
        assert calls[0] == calls[1] > 15
        calls.clear()
        monkeypatch.setattr(fused_sequence, "infer", lambda *arguments, **named: None)
        one_by_one = model(x), model.features(x)
        assert len(calls) == 20
    assert torch.equal(logits, one_by_one[0])
    assert torch.equal(maps, one_by_one[1])
    assert maps.is_contiguous(memory_format=strides if owner == "ours" else torch.channels_last)
    assert_close(logits, by_torch(model, x), 1e-5)


@pytest.mark.parametrize("owner", OWNERS)
def test_a_part_of_a_network_is_one_call_too(calls, owner: str) -> None:
    model, x = network(owner), image()
    part = model.features[:3]
    with torch.no_grad():
        # A slice is a new module, in train mode with a stem and two stages in eval mode.
        assert_close(part(x), by_torch(part, x), 1e-5)
        assert len(calls) == 3
        calls.clear()
        assert_close(part.eval()(x), by_torch(part, x), 1e-5)
        assert len(calls) == 1


def test_the_stages_of_maps_are_one_call_each(calls) -> None:
    torch.manual_seed(0)
    model = randomize(ek.efficientnet_b0(features_only=True)).eval()
    x = image()
    with torch.no_grad():
        maps = model(x)
    assert len(calls) == 8, "the stem and seven stages"
    for y, right in zip(maps, by_torch(model, x), strict=True):
        assert_close(y, right, 1e-5)


@pytest.mark.parametrize("features", [False, True])
def test_timms_blocks_are_one_call(calls, features: bool) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = ek.accelerate(randomize(timm.create_model("efficientnet_b0", features_only=features)).eval())
    x = image()
    with torch.no_grad():
        found = model(x)
    # The blocks between stem and head, or the stem and seven stages.
    assert len(calls) == (8 if features else 3)
    for y, right in zip(found, by_torch(model, x), strict=True):
        assert_close(y, right, 1e-5)


def looping_network(name: str) -> Any:
    """A network that calls its blocks in a loop, from a list."""
    torch.manual_seed(0)
    if name == "efficientnet_pytorch":
        package: Any = pytest.importorskip("efficientnet_pytorch", reason="efficientnet_pytorch is not installed")
        made = package.EfficientNet.from_name("efficientnet-b0", num_classes=5)
    else:
        package = pytest.importorskip("segmentation_models_pytorch", reason="accelerates an encoder of its")
        encoder, depth = name.split()
        made = package.encoders.get_encoder(encoder, weights=None, depth=int(depth))
    return ek.accelerate(calibrate(made))


def listed(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The stem, the blocks, the head.
        ("efficientnet_pytorch", 3),
        # The stem, and the blocks up to each map.
        ("efficientnet-b0 5", 5),
        # It computes one map more than it returns.
        ("efficientnet-b0 3", 4),
        # Stages are sequences, of which two maps have two.
        ("timm-efficientnet-b0 5", 8),
    ],
)
def test_blocks_that_a_loop_calls_are_one_call(calls, monkeypatch, name: str, expected: int) -> None:
    model, x = looping_network(name), image()
    with torch.no_grad():
        found = listed(model(x))
        assert len(calls) == expected
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(fused_sequence, "infer", lambda *arguments, **named: None)
            one_by_one = listed(model(x))
        assert len(calls) > 7
        assert all(map(torch.equal, found, one_by_one))
        for y, right in zip(found, listed(ek.restore(copy.deepcopy(model))(x)), strict=True):
            assert_close(y, right, 1e-5)
        assert all(map(torch.equal, found, listed(copy.deepcopy(model)(x))))


@pytest.mark.parametrize(("name", "fewest"), [("efficientnet_pytorch", 3), ("efficientnet-b0 5", 5)])
def test_a_loop_calls_blocks_that_are_observed_or_changed(calls, name: str, fewest: int) -> None:
    model, x = looping_network(name), image()
    fired: list[int] = []

    def check(together: bool) -> None:
        calls.clear()
        fired.clear()
        with torch.no_grad():
            found = listed(model(x))
            for y, right in zip(found, listed(by_torch(ek.restore(copy.deepcopy(model)), x)), strict=True):
                assert_close(y, right, 1e-5)
        assert (len(calls) <= fewest) == together

    check(True)
    handle = model._blocks[4].register_forward_hook(lambda *_: fired.append(4))
    check(False)
    assert fired
    handle.remove()
    check(True)
    model._blocks[9], model._blocks[10] = copy.deepcopy(model._blocks[10]), model._blocks[9]
    model._blocks[10]._bn1.eps = 0.5
    check(True)
    model._blocks[5].register_module("_swish", nn.Softplus())
    check(False)
    model._blocks = nn.ModuleList()
    if name == "efficientnet_pytorch":
        model._conv_head, model._bn1 = nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8).eval()
        model._fc = nn.Linear(8, 5)
    check(True)


def test_a_loop_of_blocks_trains() -> None:
    """Stochastic depth's rates are those of each block."""
    model, x = looping_network("efficientnet_pytorch").train(), torch.randn(4, 3, 64, 64)
    eager = ek.restore(copy.deepcopy(model))
    outputs = []
    for each in (model, eager):
        torch.manual_seed(1)
        outputs.append(each(x))
        outputs[-1].square().sum().backward()
    assert_close(*outputs, 1e-4)
    assert relative_rms(model._conv_stem.weight.grad, eager._conv_stem.weight.grad) < 1e-3


@pytest.mark.parametrize("owner", OWNERS)
def test_a_change_of_a_parameter_is_seen(calls, owner: str) -> None:
    model, x = network(owner), image()
    with torch.no_grad():
        model(x)
        for change in (
            lambda: model.features[2][1].block[0][0].weight.data.mul_(1.5),
            lambda: model.features[-1][1].running_var.data.add_(1.0),
            lambda: model.load_state_dict(network(owner).state_dict()),
            lambda: setattr(model.features[1][0].block[0][1], "eps", 0.5),
        ):
            change()
            assert_close(model(x), by_torch(model, x), 1e-5)
    assert len(calls) == 5


def add_hook(module: nn.Module) -> None:
    module.fired = 0

    def hook(*arguments: object) -> None:
        module.fired += 1

    module.register_forward_hook(hook)


class Scaled(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda input: 2 * forward(input)


def scale_stage(model: Any) -> None:
    model.features[2] = Scaled(*model.features[2])


def subclass_block(model: Any) -> None:
    kind = type(model.features[3][0])
    made = type("Doubled", (kind,), {"forward": lambda self, input: 2 * kind.forward(self, input)})
    model.features[3][0].__class__ = made


def call_block_otherwise(model: Any) -> None:
    kind = type(model.features[3][0])
    made = type("Called", (kind,), {"__call__": lambda self, input: 2 * kind.__call__(self, input)})
    model.features[3][0].__class__ = made


def without_statistics(model: Any) -> None:
    norm = model.features[2][0].block[0][1]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


def compile_part(part: nn.Module) -> None:
    """As ``part.compile()`` does, with something that is seen in the output."""
    part._compiled_call_impl = lambda input: 2 * part._call_impl(input)


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook on a stage": lambda model: add_hook(model.features[2]),
    "hook on a block": lambda model: add_hook(model.features[2][1]),
    "hook in a block": lambda model: add_hook(model.features[3][0].block[1]),
    "hook on the head": lambda model: add_hook(model.features[-1]),
    "forward of a stage": lambda model: replace_forward(model.features[1]),
    "forward of a block": lambda model: replace_forward(model.features[1][0]),
    "class of a stage": scale_stage,
    "class of a block": subclass_block,
    "call of a block": call_block_otherwise,
    "a compiled block": lambda model: compile_part(model.features[3][1]),
    "a compiled stage": lambda model: compile_part(model.features[3]),
    "another module": lambda model: model.features.insert(2, nn.ReLU()),
    "another activation": lambda model: setattr(model.features[3][0].block[0], "2", nn.GELU()),
    "batch statistics": without_statistics,
}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [True, False], ids=["before the first call", "after it"])
def test_what_has_to_be_called_is_called(calls, change: str, before: bool, owner: str) -> None:
    model, x = network(owner), image()
    with torch.no_grad():
        if not before:
            model(x)
            model.features(x)
        CHANGES[change](model)
        calls.clear()
        y, maps = model(x), model.features(x)
        fired = [module.fired for module in model.modules() if hasattr(module, "fired")]
        assert fired == [2] * change.startswith("hook")
        assert len(calls) > 2
        assert_close(y, by_torch(model, x), 1e-5)
        assert_close(maps, by_torch(model.features, x), 1e-5)


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("before", [True, False], ids=["before the first call", "after it"])
def test_a_hook_on_a_whole_sequence_changes_nothing(calls, owner: str, before: bool) -> None:
    model, x = network(owner), image()
    with torch.no_grad():
        if not before:
            model.features(x)
        add_hook(model.features)
        calls.clear()
        assert_close(model.features(x), by_torch(model.features, x), 1e-5)
        assert len(calls) == 1
        assert model.features.fired == 2


@pytest.mark.parametrize("owner", OWNERS)
def test_an_attribute_that_changes_at_each_call_packs_nothing_again(calls, monkeypatch, owner: str) -> None:
    model, x = network(owner), image()
    made: list[object] = []
    pack = packing.Network
    monkeypatch.setattr(packing, "Network", lambda *rest, **named: made.append(rest) or pack(*rest, **named))
    with torch.no_grad():
        for count in range(4):
            model.features.count = model.features[2][0].count = float(count)
            model.features(x)
            model.features[2][0](torch.randn(1, 8, 9, 9))
        assert len(made) == 2
        model.features[2][0].block[0][1].eps = 0.5
        assert_close(model.features(x), by_torch(model.features, x), 1e-5)
        assert len(made) == 3


METHODS = [(nn.Sequential, "forward"), (nn.Module, "__call__"), (nn.Module, "_call_impl")]


@pytest.mark.parametrize(("kind", "method"), METHODS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("before", [True, False], ids=["before the first call", "after it"])
def test_torchs_own_methods_that_were_patched_are_called(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], method: str, before: bool
) -> None:
    blocks = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm is not installed")
    torch.manual_seed(0)
    theirs = randomize(nn.Sequential(blocks.InvertedResidual(8, 8), blocks.InvertedResidual(8, 8))).eval()
    model, x = ek.accelerate(copy.deepcopy(theirs)), torch.randn(2, 8, 9, 9)
    own = getattr(kind, method)
    with torch.no_grad():
        if not before:
            model(x)
        monkeypatch.setattr(kind, method, lambda self, input: own(self, input) + 0.25)
        assert_close(model(x), theirs(x), 1e-5)


@pytest.mark.parametrize("owner", OWNERS)
def test_weights_of_another_dtype_are_an_error_as_in_torch(owner: str) -> None:
    model, x = network(owner), image()
    with torch.no_grad():
        model.features(x)
        with pytest.raises((RuntimeError, ValueError), match="type"):
            model.features(x.bfloat16())
        model.bfloat16()
        assert model.features(x.bfloat16()).dtype == torch.bfloat16
        for inner in (model.features[3][1].block[0][0], model.features[3][0].block[2].fc1):
            inner.float()
            with pytest.raises((RuntimeError, ValueError), match="type"):
                model.features(x.bfloat16())
            inner.bfloat16()


def test_what_is_no_tensor_is_torchs_error() -> None:
    model = network("torchvision")
    with torch.no_grad():
        for other in (None, [image()], "image"):
            with pytest.raises(TypeError):
                model.features(other)


@pytest.mark.parametrize("owner", OWNERS)
def test_a_global_hook_fires_for_each_module(calls, owner: str) -> None:
    model, x, seen = network(owner), image(), []
    with torch.no_grad():
        model(x)
        handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(module))
        try:
            model(x)
        finally:
            handle.remove()
    assert {model.features, *model.features} <= set(seen)


@pytest.mark.parametrize("owner", OWNERS)
def test_a_block_in_train_mode_trains(owner: str) -> None:
    model, x = network(owner), image()
    with torch.no_grad():
        model(x)
        block = model.features[2][0].train()
        before = copy.deepcopy(block.state_dict())
        model(x)
    changed = [key for key, value in block.state_dict().items() if not torch.equal(value, before[key])]
    assert any("running_mean" in key for key in changed)


@pytest.mark.parametrize("owner", OWNERS)
def test_gradients_are_recorded_where_they_are_wanted(owner: str) -> None:
    model, x = network(owner), image().requires_grad_()
    with torch.no_grad():
        model(x)
    model(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("owner", OWNERS)
def test_another_dtype(owner: str) -> None:
    model, x = network(owner), image()
    with torch.no_grad():
        right = by_torch(model.double(), x.double())
        assert_close(model(x.double()), right, 1e-12)
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            y = model.features(x)
            assert y.dtype == torch.bfloat16
        assert_close(y.double(), by_torch(model.double().features, x.double()), 5e-2)
        model.bfloat16()
        y = model.features(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert not cpu.runs_bf16() or isinstance(fused_sequence._sequences.get(model.features), ChainSequence)


def test_what_does_not_fit_is_refused() -> None:
    model = network()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"expected an input \[N, 3, H, W\]"):
            model(image(2, 4, 33, 33))
        other = SETTINGS[3]
        model.features[4][0] = other.block(MBConvConfig(2, 3, 1, 16, 24, 1), 0.0, nn.BatchNorm2d).eval()
        with pytest.raises(ValueError, match=r"expected an input \[N, 16, H, W\], got shape"):
            model(image())


@pytest.mark.parametrize("owner", OWNERS)
def test_an_empty_batch(owner: str) -> None:
    model = network(owner)
    with torch.no_grad():
        model(image())
        assert model(image(0, 3, 33, 33)).shape == (0, 5)


@pytest.mark.skipif(triton.unavailable_reason() is not None, reason=f"{triton.unavailable_reason()}")
def test_what_does_not_fit_the_memory_together_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from stub_driver import models_on

    model, engine, x = network(), ek.freeze(network()), image(1, 3, 33, 33)
    together = []
    planned = sequence._infer_by_plans

    def infer(runs: list[Any], *arguments: Any) -> Tensor:
        if len(runs[-1].chains) > 1:
            together.append(runs)
            if len(together) % 2 == 0:
                raise torch.OutOfMemoryError("no memory")
        return planned(runs, *arguments)

    monkeypatch.setattr(sequence, "_infer_by_plans", infer)
    with models_on() as driver, torch.no_grad():
        for call in (lambda: model(x), lambda: engine.folded(x)):
            together.clear()
            launches = []
            for _ in range(4):
                driver.launched.clear()
                call()
                launches.append(len(driver.launched))
            assert len(together) == 2, "what failed is not tried again"
            assert launches[0] > 20
            assert set(launches) == {launches[0]}
            ek.release_memory()
            call()
            assert len(together) == 3, "until memory is released"
