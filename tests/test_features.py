"""What users reach into: feature maps, slices, hooks, tracers, memory formats, copies."""

import copy
import io
import pickle

import pytest
import torch
from conftest import assert_buffers_close, assert_close, assert_gradients_close, randomize
from torch import nn

import effnet_kernels as ek
from effnet_kernels.backends import select

AVAILABLE = [backend for backend, reason in select.available().items() if reason is None]
BACKENDS = ["torch", "reference"]


pytestmark = pytest.mark.usefixtures("one_thread")


# expand_ratio, kernel, stride, input_channels, out_channels, num_layers
MBCONV_ROWS = [(1, 3, 1, 8, 8, 1), (4, 3, 2, 8, 16, 2), (6, 5, 2, 16, 24, 2)]


def small(**options):
    """A network of every kind of block, and its resolutions 2, 4, 8, 16 with the channels 8, 16, 24, 32."""
    padding = options.get("padding", "symmetric")
    stages = [
        ek.MBConvConfig(1, 3, 1, 8, 8, 1, padding=padding),
        ek.FusedMBConvConfig(4, 3, 2, 8, 16, 2, padding=padding),
        ek.MBConvConfig(6, 5, 2, 16, 24, 2, padding=padding),
        ek.MBConvConfig(4, 3, 2, 24, 32, 1, padding=padding, squeeze_ratio=None, activation="relu6"),
    ]
    return randomize(ek.EfficientNet(stages, 0.2, **{"num_classes": 10, "last_channel": 64, **options})).eval()


def pair():
    """The same small network of ours and torchvision's, with the same weights."""
    third_party = pytest.importorskip("torchvision.models.efficientnet", reason="compares with torchvision")
    ours = ek.EfficientNet([ek.MBConvConfig(*row) for row in MBCONV_ROWS], 0.2, num_classes=10)
    theirs = third_party.EfficientNet(
        [third_party.MBConvConfig(*row, 1.0, 1.0) for row in MBCONV_ROWS], 0.2, num_classes=10
    )
    theirs.load_state_dict(randomize(ours).state_dict())
    return ours.eval(), theirs.eval()


def walk(model, x):
    """The output of every layer of ``model.features``."""
    outputs = []
    for layer in model.features:
        x = layer(x)
        outputs.append(x)
    return outputs


# Feature maps


@pytest.mark.parametrize(
    ("name", "timm_name"),
    [
        ("efficientnet_b0", "efficientnet_b0"),
        ("tf_efficientnet_b0", "tf_efficientnet_b0"),
        ("efficientnet_lite0", "efficientnet_lite0"),
        ("tf_efficientnet_v2_s", "tf_efficientnetv2_s"),
        ("tf_efficientnet_v2_b1", "tf_efficientnetv2_b1"),
    ],
)
def test_feature_maps_are_timms(name, timm_name):
    timm = pytest.importorskip("timm", reason="compares with timm")
    with torch.device("meta"):
        ours = ek.create_model(name, features_only=True).eval()
        theirs = timm.create_model(timm_name, features_only=True).eval()
        x = torch.empty(1, 3, 96, 64)
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        assert ours.feature_info.reduction() == theirs.feature_info.reduction()
        assert [y.shape for y in ours(x)] == [y.shape for y in theirs(x)]
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_indices", [None, (0,), (3,), (1, 2), [0, 1, 3]])
def test_features_only_gives_the_full_models_maps(out_indices, backend):
    model = small()
    backbone = small(features_only=True, out_indices=out_indices)
    backbone.load_state_dict({k: v for k, v in model.state_dict().items() if k in backbone.state_dict()})
    x = torch.randn(2, 3, 33, 47)
    with ek.use_backend(backend):
        maps = backbone(x)
        layers = walk(model, x)
    info = backbone.feature_info
    chosen = out_indices if out_indices is not None else range(4)
    assert info.channels() == [[8, 16, 24, 32][i] for i in chosen]
    assert info.reduction() == [[2, 4, 8, 16][i] for i in chosen]
    assert [y.shape[1] for y in maps] == info.channels()
    assert [y.shape[2] for y in maps] == [-(-33 // r) for r in info.reduction()]
    for y, layer in zip(maps, info.layers(), strict=True):
        assert_close(y, layers[layer])
    # Nothing beyond the last map is kept.
    assert len(backbone.features) == info.layers()[-1] + 1


def test_feature_maps_train():
    backbone = small(features_only=True).train()
    sum(y.square().mean() for y in backbone(torch.randn(2, 3, 32, 32))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize("backend", AVAILABLE)
def test_features_and_their_slices_compose(backend):
    model = small()
    x = torch.randn(2, 3, 33, 47)
    with torch.no_grad(), ek.use_backend(backend):
        layers = walk(model, x)
        whole = model.features(x)
        assert_close(whole, layers[-1])
        for cut in (1, 2, 4):
            head, tail = model.features[:cut], model.features[cut:]
            assert_close(head(x), layers[cut - 1])
            assert_close(tail(head(x)), whole)
        assert torch.equal(model.features[:0](x), x)
        assert_close(model.classifier(model.avgpool(whole).flatten(1)), model(x))


# Hooks and extraction see activated tensors


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["features.0", "features.1", "features.2.1", "features.3.0.block.1", "features.4"])
def test_hooks_see_torchvisions_tensors(place, backend, training):
    ours, theirs = (model.train(training) for model in pair())
    seen = {}
    for model in (ours, theirs):
        # A copy, because the residual is added in place.
        model.get_submodule(place).register_forward_hook(lambda m, i, o, k=model: seen.update({k: o.clone()}))
    x = torch.randn(2, 3, 33, 47)
    torch.manual_seed(1)
    with ek.use_backend(backend):
        ours(x)
    torch.manual_seed(1)
    theirs(x)
    assert_close(seen[ours], seen[theirs])
    assert_buffers_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["features.4", "features.3.0"])
def test_grad_cam_is_torchvisions(place, backend):
    x = torch.randn(2, 3, 64, 48)

    def grad_cam(model):
        kept = {}

        def keep(module, inputs, output):
            output.retain_grad()
            kept["map"] = output

        model.get_submodule(place).register_forward_hook(keep)
        model(x)[:, 3].sum().backward()
        activation = kept["map"]
        return (activation.grad.mean((2, 3), keepdim=True) * activation).sum(1)

    ours, theirs = pair()
    with ek.use_backend(backend):
        cam = grad_cam(ours)
    expected = grad_cam(theirs)
    assert expected.abs().max() > 0
    assert_close(cam, expected)


def test_a_backward_hook_sees_torchvisions_gradients():
    x = torch.randn(2, 3, 33, 47)
    seen = []
    for model in pair():
        with ek.use_backend("reference"):
            model.features[2][1].register_full_backward_hook(lambda m, grad_in, grad_out: seen.extend([*grad_in]))
            model(x).square().sum().backward()
    assert_close(seen[0], seen[1])


@pytest.mark.filterwarnings("ignore:NOTE")
def test_feature_extractor_sees_torchvisions_tensors():
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="compares with torchvision")
    ours, theirs = pair()
    x = torch.randn(2, 3, 33, 47)
    nodes = ["features.0", "features.2.1", "features.3.0.block.1", "features.4", "avgpool"]
    expected = extraction.create_feature_extractor(theirs, nodes)(x)
    for name, value in extraction.create_feature_extractor(ours, nodes)(x).items():
        assert_close(value, expected[name])


@pytest.mark.filterwarnings("ignore:NOTE")
@pytest.mark.parametrize("training", [False, True])
def test_every_node_of_torchvisions_traces_is_one_of_ours(training):
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="compares with torchvision")
    ours, theirs = (model.train(training) for model in pair())
    drops = [
        [node.args[1:] for node in torch.fx.symbolic_trace(model).graph.nodes if "stochastic" in str(node.target)]
        for model in (ours, theirs)
    ]
    assert drops[0] == drops[1] != []
    counts = [len(torch.fx.symbolic_trace(model).graph.nodes) for model in (ours, theirs)]
    assert counts[0] == counts[1]
    # Modules that torchvision does not look into are named there, and stand for their last node here.
    nodes = extraction.get_graph_node_names(theirs)[not training][1:]
    x = torch.randn(2, 3, 33, 47)
    seen = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        extractor = extraction.create_feature_extractor(model, nodes).train(training)
        seen.append(extractor(x))
    for name in nodes:
        assert_close(seen[0][name], seen[1][name])


# Memory formats


@pytest.mark.parametrize("model_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_maps_come_in_the_inputs_format(backend, input_format, model_format):
    model = small().to(memory_format=model_format)
    backbone = small(features_only=True).to(memory_format=model_format)
    x = torch.randn(2, 3, 64, 48).to(memory_format=input_format)
    with torch.no_grad(), ek.use_backend(backend):
        maps = [model.features(x), model.features[:3](x), *backbone(x)]
    for y in maps:
        assert y.shape[2] > 1
        assert y.is_contiguous(memory_format=input_format)
        assert y.is_contiguous() == (input_format is torch.contiguous_format)


@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("model_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
def test_formats_change_neither_outputs_nor_gradients(backend, input_format, model_format):
    reference = small().double()
    model = copy.deepcopy(reference).to(memory_format=model_format)
    x = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    with ek.use_backend(backend):
        reference(x).square().sum().backward()
        y = x.to(memory_format=input_format).requires_grad_()
        output = model(y)
        output.square().sum().backward()
    assert_close(output, reference(x))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(p.grad, q.grad)
    assert y.grad.stride() == y.stride()


# Constructor options


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_classes_the_pooled_features_come_out(backend):
    model = small()
    headless = small(num_classes=0)
    assert headless.num_classes == 0
    assert set(model.state_dict()) - set(headless.state_dict()) == {"classifier.1.weight", "classifier.1.bias"}
    headless.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(2, 3, 33, 47)
    with ek.use_backend(backend):
        pooled = headless(x)
        assert pooled.shape == (2, headless.num_features) == (2, 64)
        assert_close(model.classifier(pooled), model(x))


def test_reset_classifier():
    model = small().double().requires_grad_(False)
    before = {k: v.clone() for k, v in model.features.state_dict().items()}
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    pooled = model.avgpool(model.features(x)).flatten(1)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    assert model(x).dtype == torch.float64
    assert not model.classifier[1].training
    assert all(p.requires_grad for p in model.classifier.parameters())
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert_close(model(x), pooled)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert all(torch.equal(v, before[k]) for k, v in model.features.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_chans", [1, 4])
def test_image_channels(in_chans, backend):
    model = small(in_chans=in_chans)
    assert model.features[0][0].weight.shape == (8, in_chans, 3, 3)
    x = torch.randn(2, in_chans, 33, 47)
    with ek.use_backend(backend):
        y = model(x)
    # The channels beyond the third contribute: a stem with theirs zeroed answers differently.
    model.features[0][0].weight.data[:, -1] = 0
    assert y.shape == (2, 10)
    assert (model(x) - y).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "channels"),
    [("efficientnet_b0", [24, 40, 112, 320]), ("efficientnet_v2_s", [48, 64, 160, 256])],
)
def test_low_resolution(name, channels):
    with torch.device("meta"):
        normal = ek.create_model(name).eval()
        low = ek.create_model(name, low_resolution=True).eval()
        backbone = ek.create_model(name, low_resolution=True, features_only=True).eval()
        x = torch.empty(2, 3, 32, 32)
        assert low.features(x).shape == (2, 1280, 4, 4)
        assert normal.features(x).shape == (2, 1280, 1, 1)
        assert low(x).shape == (2, 1000)
        assert [tuple(y.shape[1:]) for y in backbone(x)] == [
            (c, 32 // r, 32 // r) for c, r in zip(channels, (1, 2, 4, 8), strict=True)
        ]
    assert backbone.feature_info.channels() == channels
    assert backbone.feature_info.reduction() == [1, 2, 4, 8]
    shapes = {k: v.shape for k, v in normal.state_dict().items()}
    assert list(low.state_dict()) == list(shapes)
    assert all(v.shape == shapes[k] for k, v in low.state_dict().items())


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_resolution_trains(backend, padding):
    model = small(low_resolution=True, padding=padding).train()
    with ek.use_backend(backend):
        y = model(torch.randn(2, 3, 32, 32))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Tracers, copies


# The second one exercises padding that depends on the input's size.
NETWORKS = {
    "classifier": lambda: small(),
    "same padding": lambda: small(padding="same"),
    "features": lambda: small(features_only=True),
}


def outputs(y):
    return list(y) if isinstance(y, list | tuple) else [y]


def assert_same_outputs(actual, expected):
    for a, b in zip(outputs(actual), outputs(expected), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_fx_trace(name):
    model = NETWORKS[name]()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 33, 47)
    assert_same_outputs(traced(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_jit_trace(name):
    model = NETWORKS[name]().requires_grad_(False)
    x = torch.randn(2, 3, 33, 47)
    traced = torch.jit.trace(model, x)
    y = torch.randn(2, 3, 33, 47)
    assert_same_outputs(traced(y), model(y))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_jit_script(name, training):
    model = NETWORKS[name]().train(training)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    for size in ((33, 47), (64, 32)):
        x = torch.randn(2, 3, *size)
        torch.manual_seed(1)
        actual = scripted(x)
        torch.manual_seed(1)
        assert_same_outputs(actual, model(x))
    assert_buffers_close(scripted, model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_compile_fullgraph(name, training):
    torch.compiler.reset()
    model = NETWORKS[name]().train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 33, 47)
    torch.manual_seed(1)
    actual = compiled(x)
    torch.manual_seed(1)
    expected = model(x)
    assert_same_outputs(actual, expected)
    assert_buffers_close(twin, model)
    sum(y.square().mean() for y in outputs(actual)).backward()
    sum(y.square().mean() for y in outputs(expected)).backward()
    assert_gradients_close(twin, model)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_export(name, strict):
    model = NETWORKS[name]()
    x = torch.randn(2, 3, 33, 47)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    y = torch.randn(5, 3, 33, 47)
    assert_same_outputs(program.module()(y), model(y))
    # Standard operators only, so that other runtimes read the program.
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)} == {"aten"}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: copy.deepcopy(torch.compile(model, backend="eager"))._orig_mod,
    ],
    ids=["deepcopy", "pickle", "deepcopy of a compiled one"],
)
def test_copies_compute_the_same_and_share_nothing(duplicate, name):
    model = NETWORKS[name]()
    x = torch.randn(2, 3, 33, 47)
    expected = [y.clone() for y in outputs(model(x))]
    twin = duplicate(model)
    assert_same_outputs(twin(x), expected)
    for p in twin.parameters():
        p.data.zero_()
    assert_same_outputs(model(x), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_round_trip(name, tmp_path):
    model = NETWORKS[name]()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = NETWORKS[name]()
    with torch.no_grad():
        for t in other.state_dict().values():
            t.add_(1)
    loaded = other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    x = torch.randn(2, 3, 33, 47)
    assert_same_outputs(other(x), model(x))


def test_modules_can_be_replaced():
    model = small()
    model.features[0][2] = nn.GELU()
    model.classifier = nn.Identity()
    x = torch.randn(2, 3, 33, 47)
    with ek.use_backend("torch"):
        expected = model(x)
    with ek.use_backend("reference"):
        assert_close(model(x), expected)
    assert next(iter(ek.explain(model, x))).backend == "torch"
