"""Code written for `efficientnet_pytorch`: its methods, the names of its parts, its own tests."""

import copy
import operator
from collections import OrderedDict

import pytest
import torch
from conftest import assert_close, calibrate, copies, relative_rms
from test_compat import CHEAP, image, third_party
from torch import nn

import effnet_kernels as ek
from effnet_kernels.backends import select
from effnet_kernels.models.weights.convert import load_checkpoint

AVAILABLE = [backend for backend, reason in select.available().items() if reason is None]


# That package's own tests, whose networks here are small


SIZES = [64, 96, 100]


@pytest.fixture(params=["efficientnet-b0", "efficientnet-b1", "efficientnet-b2", "efficientnet-b3"])
def net(request):
    return ek.EfficientNet.from_name(request.param, **CHEAP)


@pytest.mark.parametrize("size", SIZES)
def test_their_forward(net, size):
    assert not net(torch.zeros(2, 3, size, size)).isnan().any()


def test_their_dropout_training(net):
    for training in (True, False, True):
        assert net.train(training)._dropout.training is training


@pytest.mark.parametrize("size", SIZES)
def test_their_modified_dropout(net, size):
    channels, rate = net._bn1.num_features, net._global_params.dropout_rate
    net._dropout = nn.Sequential(
        OrderedDict(
            _bn2=nn.BatchNorm1d(channels),
            _drop1=nn.Dropout(rate),
            _linear1=nn.Linear(channels, 512),
            _relu=nn.ReLU(),
            _bn3=nn.BatchNorm1d(512),
            _drop2=nn.Dropout(rate / 2),
        )
    )
    net._fc = nn.Linear(512, net._global_params.num_classes)
    y = net(torch.zeros(2, 3, size, size))
    assert y.shape == (2, 1000)
    assert not y.isnan().any()


class MeanAndMaximum(nn.Module):
    def forward(self, x):
        return torch.cat([x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)], 1)


@pytest.mark.parametrize("size", SIZES)
def test_their_modified_pool(net, size):
    net._avg_pooling = MeanAndMaximum()
    net._fc = nn.Linear(net._fc.in_features * 2, net._global_params.num_classes)
    assert not net(torch.zeros(2, 3, size, size)).isnan().any()


@pytest.mark.parametrize("size", SIZES)
def test_their_endpoints(net, size):
    endpoints = net.extract_endpoints(torch.zeros(2, 3, size, size))
    assert list(endpoints) == [f"reduction_{index}" for index in range(1, 7)]
    for index in range(1, 6):
        x = endpoints[f"reduction_{index}"]
        assert not x.isnan().any()
        assert x.shape[2] == -(-size // 2**index)


# The same networks in both packages


def both(size=64, **overrides):
    theirs = calibrate(third_party().from_name("efficientnet-b0", image_size=size, **{**CHEAP, **overrides}), size)
    ours = ek.EfficientNet.from_name("efficientnet-b0", image_size=size, **{**CHEAP, **overrides}).eval()
    load_checkpoint(ours, theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("size", [8, 17, 33, 64, 100])
def test_features_and_endpoints_are_theirs(size, backend):
    ours, theirs = both(size)
    x = image(size=size)
    with torch.no_grad(), ek.use_backend(backend):
        assert_close(ours.extract_features(x), theirs.extract_features(x))
        actual, expected = ours.extract_endpoints(x), theirs.extract_endpoints(x)
        assert list(actual) == list(expected)
        for name, y in expected.items():
            assert_close(actual[name], y)


@pytest.mark.parametrize("overrides", [{}, {"num_classes": 7, "dropout_rate": 0.4, "drop_connect_rate": 0.1}], ids=str)
def test_global_params_are_theirs(overrides):
    ours, theirs = both(**overrides)
    assert ours._global_params._asdict() == pytest.approx(theirs._global_params._asdict())


@pytest.mark.parametrize("name", [f"efficientnet-{number}" for number in ("b0", "b3", "b7", "b8", "l2")])
def test_image_sizes_are_theirs(name):
    assert ek.EfficientNet.get_image_size(name) == third_party().get_image_size(name)


@pytest.mark.parametrize("name", ["efficientnet-b9", "resnet50", None])
def test_image_sizes_of_unknown_names(name):
    with pytest.raises(ValueError, match="expected the name of a variant, got"):
        ek.EfficientNet.get_image_size(name)


def test_swish_may_be_set():
    ours, theirs = both()
    x = image(size=64)
    for memory_efficient in (False, True):
        for model in (ours, theirs):
            model.set_swish(memory_efficient)
        assert_close(ours(x), theirs(x))


# Their names for our modules, the name in ours, and a module to put there.
ALIASES = {
    "_conv_stem": ("features.0.0", lambda: nn.Conv2d(3, 16, 3, 2, 1, bias=False)),
    "_bn0": ("features.0.1", lambda: nn.GroupNorm(2, 16)),
    "_conv_head": ("features.8.0", lambda: nn.Conv2d(160, 640, 3, 2, 1)),
    "_bn1": ("features.8.1", lambda: nn.GroupNorm(4, 640)),
    "_swish": ("features.0.2", nn.GELU),
    "_avg_pooling": ("avgpool", lambda: nn.AdaptiveMaxPool2d(1)),
    "_dropout": ("classifier.0", lambda: nn.Sequential(nn.Dropout(0.5), nn.LayerNorm(640))),
    "_fc": ("classifier.1", lambda: nn.Linear(640, 2)),
}


def half(**overrides):
    torch.manual_seed(0)
    return calibrate(ek.EfficientNet.from_name("efficientnet-b0", **{**CHEAP, **overrides}))


def test_their_names_are_attributes_of_theirs():
    ours, theirs = both()
    for name in ALIASES:
        assert hasattr(theirs, name)
        assert ours.get_submodule(ALIASES[name][0]) is getattr(ours, name) is ours.get_submodule(name)
    for name in ("_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc"):
        ours_state, theirs_state = (getattr(model, name).state_dict() for model in (ours, theirs))
        assert ours_state.keys() == theirs_state.keys()
        assert all(torch.equal(ours_state[key], value) for key, value in theirs_state.items())
    assert [type(block) for block in ours._blocks] == [ek.MBConv] * len(theirs._blocks)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("through_theirs", [True, False])
@pytest.mark.parametrize("name", ALIASES)
def test_assignment_through_either_name_takes_effect(name, through_theirs, backend):
    place, make = ALIASES[name]
    model, module = half(), make().eval()
    names = [key for key, _ in half().named_modules()]
    if through_theirs:
        setattr(model, name, module)
    else:
        model.set_submodule(place, module)
    assert getattr(model, name) is module is model.get_submodule(place)
    assert not set(ALIASES) & set(model._modules)
    inside = f"{place}."
    assert [key for key, _ in model.named_modules(remove_duplicate=False) if not key.startswith(inside)] == names
    assert all("_" not in key.partition(".")[0] for key in model.state_dict())
    if name == "_swish" and through_theirs:
        assert model.features[8][2] is module
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), ek.use_backend("torch"):
        before, expected = half()(x), model.classifier(model.avgpool(model.features(x)).flatten(1))
    assert expected.shape != before.shape or relative_rms(expected, before) > 1e-2
    for twin in (model, *copies(model)):
        assert type(getattr(twin, name)) is type(module)
        assert getattr(twin, name) is twin.get_submodule(place)
        with torch.no_grad(), ek.use_backend(backend):
            assert_close(twin(x), expected)


def test_a_block_may_be_replaced():
    model, twin = half(), half()
    blocks = [block for stage in twin.features[1:-1] for block in stage]
    assert len(model._blocks) == len(blocks)
    for index in (0, 3, -1):
        block = copy.deepcopy(model._blocks[index])
        model._blocks[index] = block
        assert model._blocks[index] is block
        assert sum(module is block for module in model.features.modules()) == 1
    assert list(model.state_dict()) == list(twin.state_dict())
    for block in model._blocks[:4]:
        block.requires_grad_(False)
    assert sum(not p.requires_grad for p in model.parameters()) == sum(
        len(list(block.parameters())) for block in blocks[:4]
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda blocks: blocks.append(nn.Identity()),
        lambda blocks: blocks.extend([nn.Identity()]),
        lambda blocks: blocks.insert(0, nn.Identity()),
        lambda blocks: blocks.pop(0),
        lambda blocks: operator.delitem(blocks, -1),
        lambda blocks: operator.delitem(blocks, slice(3, None)),
        lambda blocks: operator.iadd(blocks, [nn.Identity()]),
    ],
)
def test_another_number_of_blocks_is_refused(change):
    model = half()
    with pytest.raises(TypeError, match="_blocks: expected as many blocks as there are"):
        change(model._blocks)
    with pytest.raises(AttributeError, match="_blocks"):
        model._blocks = nn.ModuleList()
    assert list(model.state_dict()) == list(half().state_dict())


@pytest.mark.parametrize("name", ["_dropout", "_fc"])
@pytest.mark.parametrize(
    "classifier",
    [nn.Linear(640, 2), nn.Identity(), nn.Sequential(nn.Linear(640, 9), nn.ReLU(), nn.Linear(9, 2))],
    ids=str,
)
def test_a_classifier_of_the_users_has_no_parts_of_theirs(classifier, name):
    model = half()
    model.classifier = classifier
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=r"expected a sequence of two as classifier, .* got"):
        setattr(model, name, nn.Identity())
    assert model.classifier is classifier


def test_a_backbone_has_no_head_of_theirs():
    model = ek.efficientnet_b0(features_only=True)
    assert isinstance(model._conv_stem, nn.Conv2d)
    assert len(model._blocks) == 16
    for name in ("_conv_head", "_bn1", "_avg_pooling", "_dropout", "_fc"):
        assert not hasattr(model, name)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("by_instance", [False, True])
def test_forward_calls_a_users_extract_features(by_instance, backend):
    class Own(ek.EfficientNet):
        def extract_features(self, inputs):
            return 2 * super().extract_features(inputs)

    torch.manual_seed(0)
    model = half() if by_instance else calibrate(Own.from_name("efficientnet-b0", **CHEAP))
    if by_instance:
        model.extract_features = lambda inputs: 2 * model.features(inputs)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), ek.use_backend("torch"):
        expected = model.classifier((2 * model.features(x)).mean((2, 3)))
    with torch.no_grad(), ek.use_backend(backend):
        assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tracer",
    [
        torch.jit.script,
        lambda model: torch.jit.trace(model, torch.randn(2, 3, 40, 40)),
        torch.fx.symbolic_trace,
        lambda model: torch.compile(model, backend="eager", fullgraph=True),
        lambda model: torch.export.export(model, (torch.randn(2, 3, 64, 64),)).module(),
    ],
    ids=["script", "trace", "fx", "compile", "export"],
)
def test_tracers_see_the_assigned_modules(tracer):
    torch.compiler.reset()
    model = half()
    model._fc = nn.Linear(640, 2)
    model._avg_pooling = nn.AdaptiveMaxPool2d(1)
    calibrate(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == (2, 2)
        assert_close(tracer(model)(x), expected)


def test_a_frozen_engine_has_the_assigned_classifier():
    if "cpu" not in AVAILABLE:
        pytest.skip("needs the native extension")
    model = half()
    model._fc = nn.Linear(640, 2)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(ek.freeze(model)(x), model(x))
