"""What does not fit: a clear error or torch's own behaviour, never a crash, and nothing half-written."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from conftest import TOLERANCES, assert_close, randomize, run_python
from torch import nn

import effnet_kernels as ek
from effnet_kernels import ops
from effnet_kernels.backends import select
from effnet_kernels.fusion.spec import Epilogue, Prologue

AVAILABLE = [backend for backend, reason in select.available().items() if reason is None]
BACKENDS = ["torch", "reference"]

# expand_ratio, kernel, stride, input_channels, out_channels, num_layers
ROWS = [(1, 3, 1, 8, 8, 1), (4, 3, 2, 8, 16, 2), (6, 5, 2, 16, 24, 2)]


def stages():
    return [ek.MBConvConfig(*row) for row in ROWS]


def small(**options):
    return randomize(ek.EfficientNet(stages(), 0.2, **{"num_classes": 10, **options}))


def pair():
    """The same small network of ours and torchvision's, with the same weights."""
    third_party = pytest.importorskip("torchvision.models.efficientnet", reason="compares with torchvision")
    ours = small()
    theirs = third_party.EfficientNet([third_party.MBConvConfig(*row, 1.0, 1.0) for row in ROWS], 0.2, num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def run(model, x, backend="torch"):
    torch.manual_seed(1)
    with ek.use_backend(backend):
        return model(x)


def changed(model, before):
    """The names of the tensors that differ from the state dict ``before``."""
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


pytestmark = pytest.mark.usefixtures("one_thread")


# Images


BAD_IMAGES = {
    "rank 0": (lambda: torch.tensor(1.0), r"expected images \[N, C, H, W\], got shape \(\)"),
    "rank 2": (lambda: torch.randn(3, 32), r"expected images .*, got shape \(3, 32\)$"),
    "rank 3": (lambda: torch.randn(3, 32, 32), r"got shape \(3, 32, 32\); images\[None\] is a batch of one"),
    "rank 5": (lambda: torch.randn(2, 3, 1, 32, 32), r"expected images .*, got shape \(2, 3, 1, 32, 32\)$"),
    "channels": (lambda: torch.randn(2, 4, 32, 32), "to have 3 channels, but got 4"),
    "no channels": (lambda: torch.randn(2, 0, 32, 32), "to have 3 channels, but got 0"),
    "no rows": (lambda: torch.randn(2, 3, 0, 32), "Kernel size can't be greater"),
    "no columns": (lambda: torch.randn(2, 3, 32, 0), "Kernel size can't be greater"),
    "uint8": (lambda: torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "Byte"),
    "int64": (lambda: torch.zeros(2, 3, 32, 32, dtype=torch.int64), "Long"),
    "bool": (lambda: torch.zeros(2, 3, 32, 32, dtype=torch.bool), "Bool"),
    "float16": (lambda: torch.randn(2, 3, 32, 32).half(), "Half"),
    "float64": (lambda: torch.randn(2, 3, 32, 32).double(), "Double"),
    "complex": (lambda: torch.randn(2, 3, 32, 32, dtype=torch.complex64), "Complex"),
    "another device": (lambda: torch.empty(2, 3, 32, 32, device="meta"), "expected device meta|device"),
    "sparse": (lambda: torch.randn(2, 3, 32, 32).to_sparse(), "sparse|memory format"),
    "None": (lambda: None, "expected images as a tensor .* got NoneType"),
    "a list": (lambda: [torch.randn(3, 32, 32)], "expected images as a tensor .* got list"),
    "an array": (
        lambda: np.zeros((2, 3, 32, 32), np.float32),
        "expected images as a tensor .* got ndarray; torch.as_tensor",
    ),
    "a text": (lambda: "cat.jpg", "expected images as a tensor .* got str"),
}


# What chains say where torch's convolutions say it in other words.
CHAINS_MESSAGES = (
    r"expected an input \[N, 3, H, W\], got|expected the input on cpu|expected an input in torch.float32"
    r"|a padded size of at least|the reference computes in floating point, not|must have the same dtype"
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_images_that_do_not_fit_are_refused_and_leave_no_trace(case, backend, training):
    make, message = BAD_IMAGES[case]
    if backend == "reference":
        message = f"{message}|{CHAINS_MESSAGES}"
    model = small().train(training)
    before = snapshot(model)
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError), match=message):
        run(model, make(), backend)
    traces = changed(model, before)
    if case == "another device":
        # torch counts the batch before it looks at its device.
        traces -= {"features.0.1.num_batches_tracked"}
    if case == "float16" and backend == "reference":
        # A chain takes maps of lower precision beside float32 weights; the classifier behind it does not.
        return
    assert not traces


# What torch's convolutions call them.
DTYPES = {
    torch.uint8: "Byte",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.float32: "Float",
    torch.float64: "Double",
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("images", "weights"), [(x, w) for x, w in itertools.permutations(DTYPES, 2) if w.is_floating_point]
)
def test_images_of_another_dtype_than_the_weights_are_refused_by_their_names(images, weights, training):
    model = small().train(training).to(weights)
    before = snapshot(model)
    both = rf"{DTYPES[images]}.*{DTYPES[weights]}|in {weights}, the dtype of the weights, got {images}"
    with pytest.raises((RuntimeError, ValueError), match=both):
        model(torch.zeros(2, 3, 32, 32, dtype=images))
    assert not changed(model, before)


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="needs the native extension")
@pytest.mark.parametrize("case", [case for case, (_, message) in BAD_IMAGES.items() if "expected images" in message])
def test_backbones_and_engines_refuse_images_alike(case):
    make, message = BAD_IMAGES[case]
    for model in (small(features_only=True), ek.freeze(small())):
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match=message):
            model(make())


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="needs the native extension")
@pytest.mark.parametrize("case", sorted(set(BAD_IMAGES) - {"float64", "float16"}))
def test_native_kernels_refuse_the_same_images(case):
    make, _ = BAD_IMAGES[case]
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        run(small().eval(), make(), "cpu")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_torchvisions_empty_result(backend, training):
    ours, theirs = (model.train(training) for model in pair())
    x = torch.randn(0, 3, 32, 32)
    y = run(ours, x, backend)
    assert y.shape == theirs(x).shape == (0, 10)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())
    for (name, ours_buffer), theirs_buffer in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(ours_buffer.nan_to_num(-1e9), theirs_buffer.nan_to_num(-1e9)), name


def test_an_empty_batch_on_every_backend():
    model, backbone = small().eval(), small(features_only=True, num_classes=0).eval()
    x = torch.randn(0, 3, 33, 47)
    for backend in AVAILABLE:
        with torch.no_grad():
            assert run(model, x, backend).shape == (0, 10)
            assert [tuple(y.shape) for y in run(backbone, x, backend)] == [
                (0, 8, 17, 24),
                (0, 16, 9, 12),
                (0, 24, 5, 6),
            ]


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (7, 1), (9, 9)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_images_are_torchvisions(backend, training, size):
    # In double precision, because the statistics of a handful of values magnify rounding.
    ours, theirs = (model.train(training).double() for model in pair())
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    assert_close(run(ours, x, backend), run(theirs, x))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (8, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_a_channel_cannot_train(backend, size):
    ours, theirs = (model.train() for model in pair())
    x = torch.randn(1, 3, *size)
    before = snapshot(ours)
    errors = []
    for model, name in ((ours, backend), (theirs, "torch")):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as caught:
            run(model, x, name)
        errors.append(str(caught.value))
    # The same layer complains, and no statistics are written that torch's own layers would not have written.
    assert errors[0] == errors[1]
    assert changed(ours, before) <= changed(theirs, before)
    assert all(v.isfinite().all() for v in ours.state_dict().values())


VIEWS = {
    "expanded batch": lambda: torch.randn(1, 3, 33, 47).expand(4, 3, 33, 47),
    "expanded channels": lambda: torch.randn(4, 1, 33, 47).expand(4, 3, 33, 47),
    "expanded rows": lambda: torch.randn(4, 3, 1, 47).expand(4, 3, 33, 47),
    "one value": lambda: torch.randn(1, 1, 1, 1).expand(4, 3, 33, 47),
    "every other pixel": lambda: torch.randn(4, 3, 66, 94)[:, :, ::2, ::2],
    "a crop": lambda: torch.randn(5, 3, 40, 60)[1:, :, 3:36, 7:54],
    "transposed": lambda: torch.randn(4, 3, 47, 33).transpose(2, 3),
    "some channels": lambda: torch.randn(4, 7, 33, 47)[:, 1:7:2],
    "some channels, channels last": lambda: torch.randn(4, 33, 47, 7).permute(0, 3, 1, 2)[:, 1:4],
    "batch last": lambda: torch.randn(3, 33, 47, 4).permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("view", VIEWS)
def test_views_give_what_their_copies_give(view, backend):
    model = small().eval()
    x = VIEWS[view]()
    before = x.clone()
    with torch.no_grad():
        y = run(model, x, backend)
        assert_close(y, run(model, x.clone(memory_format=torch.contiguous_format), "torch"))
    assert torch.equal(x, before)


@pytest.mark.parametrize("view", VIEWS)
def test_views_train(view):
    x = VIEWS[view]()
    model = small().train().double()
    twin = copy.deepcopy(model)
    run(model, x.double(), "reference").square().sum().backward()
    run(twin, x.contiguous().double(), "torch").square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # The largest of many errors, where the tolerance is for their root mean square.
        assert (p.grad - q.grad).abs().max() <= 10 * TOLERANCES[torch.float64] * max(float(q.grad.abs().max()), 1.0)


# Values that are no numbers


def assert_same_with_nan(actual, expected):
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite()
    if finite.any():
        assert_close(actual[finite], expected[finite])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["features.0.0", "features.2.0.block.1.0", "features.2.1.block.3.1", "classifier.1"])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_weights_that_are_no_numbers_propagate(backend, place, value):
    ours, theirs = (model.eval() for model in pair())
    for model in (ours, theirs):
        model.get_submodule(place).weight.data.flatten()[5] = value
    x = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        expected = theirs(x)
        assert not expected.isfinite().all()
        assert_same_with_nan(run(ours, x, backend), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_that_is_no_number_propagates(backend, training):
    ours, theirs = (model.train(training) for model in pair())
    x = torch.randn(3, 3, 33, 47)
    x[1, 0, 4, 4] = float("nan")
    with torch.no_grad():
        expected = run(theirs, x)
        assert_same_with_nan(run(ours, x, backend), expected)
    assert expected[1].isnan().all()
    # At inference the other images of the batch do not notice.
    assert training or expected[0].isfinite().all()
    for (name, ours_buffer), theirs_buffer in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(ours_buffer.isnan(), theirs_buffer.isnan()), name


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="needs the native extension")
def test_a_pixel_that_is_no_number_propagates_natively():
    model = small().eval()
    x = torch.randn(3, 3, 33, 47)
    x[1, 0, 4, 4] = float("nan")
    with torch.no_grad():
        assert_same_with_nan(run(model, x, "cpu"), run(model, x, "torch"))


# Constructors


BAD_NETWORKS = {
    "no stages": ({"inverted_residual_setting": []}, ValueError, "at least one stage"),
    "stages of text": ({"inverted_residual_setting": "b0"}, TypeError, "expected a sequence of .*got .*str"),
    "stages of numbers": ({"inverted_residual_setting": [3]}, TypeError, "expected a sequence of .*got .*int"),
    "one stage alone": (
        {"inverted_residual_setting": ek.MBConvConfig(*ROWS[0])},
        TypeError,
        "expected a sequence of .*got ",
    ),
    "probability": ({"stochastic_depth_prob": 5.0}, ValueError, "expected a probability between 0 and 1, got"),
    "negative probability": ({"stochastic_depth_prob": -1.0}, ValueError, "expected a probability between 0 and 1"),
    "dropout": ({"dropout": 2.0}, ValueError, "probability has to be between 0 and 1, but got 2"),
    "classes": ({"num_classes": -1}, ValueError, "num_classes: expected an integer >= 0, got -1"),
    "half a class": ({"num_classes": 1.5}, ValueError, "num_classes: expected an integer >= 0, got 1.5"),
    "classes None": ({"num_classes": None}, ValueError, "num_classes: expected an integer >= 0, got None"),
    "no image channels": ({"in_chans": 0}, ValueError, "in_chans: expected an integer >= 1, got 0"),
    "padding": ({"padding": "valid"}, ValueError, "padding: expected 'symmetric' or 'same', got 'valid'"),
    "activation": ({"activation": "gelu"}, ValueError, "activation: expected one of none, silu.*got 'gelu'"),
    "indices without maps": ({"out_indices": (0,)}, ValueError, "out_indices: expected features_only=True"),
    "index too large": ({"features_only": True, "out_indices": (0, 3)}, ValueError, "0 to 2, got .0, 3."),
    "index negative": ({"features_only": True, "out_indices": (-1,)}, ValueError, "out_indices: expected ascending"),
    "indices descend": ({"features_only": True, "out_indices": (1, 0)}, ValueError, "out_indices: expected ascending"),
    "index twice": ({"features_only": True, "out_indices": (1, 1)}, ValueError, "out_indices: expected ascending"),
    "no index": ({"features_only": True, "out_indices": ()}, ValueError, "out_indices: expected ascending"),
    "bare index": ({"features_only": True, "out_indices": 1}, (TypeError, ValueError), "out_indices: expected .*got 1"),
    "index of text": ({"features_only": True, "out_indices": "01"}, (TypeError, ValueError), "out_indices: expected"),
    "half an index": ({"features_only": True, "out_indices": (0.5,)}, (TypeError, ValueError), "out_indices: expected"),
    "unknown": ({"pretrained": True}, TypeError, "unexpected keyword argument 'pretrained'"),
}


@pytest.mark.parametrize("case", BAD_NETWORKS)
def test_arguments_that_make_no_network_are_refused(case):
    arguments, error, message = BAD_NETWORKS[case]
    with pytest.raises(error, match=message):
        ek.EfficientNet(**{"inverted_residual_setting": stages(), "dropout": 0.2, **arguments})


BAD_PARTS = {
    "stride 3": (lambda: ek.MBConv(ek.MBConvConfig(1, 3, 3, 8, 8, 1), 0.0, nn.BatchNorm2d), "expected 1 or 2, got 3"),
    "fused stride 0": (
        lambda: ek.FusedMBConv(ek.FusedMBConvConfig(4, 3, 0, 8, 8, 1), 0.0, nn.BatchNorm2d),
        "expected 1 or 2, got 0",
    ),
    "block activation": (
        lambda: ek.MBConv(ek.MBConvConfig(1, 3, 1, 8, 8, 1, activation="gelu"), 0.0, nn.BatchNorm2d),
        "expected one of none, silu.*got 'gelu'",
    ),
    "block padding": (
        lambda: ek.MBConv(ek.MBConvConfig(1, 3, 2, 8, 8, 1, padding="valid"), 0.0, nn.BatchNorm2d),
        "padding: expected 'symmetric' or 'same', got 'valid'",
    ),
    "convolution activation": (lambda: ek.ConvBnAct(3, 8, activation="tan"), "expected one of none, silu.*got 'tan'"),
    "groups": (lambda: ek.ConvBnAct(3, 8, groups=2), "divisible by groups"),
    "drop 2": (lambda: ek.StochasticDepth(2), "p: expected a probability between 0 and 1, got 2"),
    "drop nan": (lambda: ek.StochasticDepth(float("nan")), "p: expected a probability between 0 and 1, got nan"),
    "drop mode": (lambda: ek.StochasticDepth(0.5, "column"), "mode: expected 'batch' or 'row', got 'column'"),
    "variant": (lambda: ek.create_model("efficientnet_b9"), "got 'efficientnet_b9'; did you mean efficientnet_b"),
    "other network": (lambda: ek.create_model("resnet50"), "got 'resnet50'; there are efficientnet_b0"),
    "classes to reset": (lambda: small().reset_classifier(-1), "num_classes: expected an integer >= 0, got -1"),
    "reset without classifier": (
        lambda: small(features_only=True).reset_classifier(3),
        "expected a model with a classifier, got one that was built with features_only=True",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_arguments_that_make_no_part_are_refused(case):
    make, message = BAD_PARTS[case]
    with pytest.raises(ValueError, match=message):
        make()


# What an argument is called elsewhere: in timm, torchvision's layers, efficientnet_pytorch, Keras.
NAMES_ELSEWHERE = {
    "in_chans": ["in_channels"],
    "dropout": ["drop_rate", "dropout_rate"],
    "stochastic_depth_prob": ["drop_path_rate", "drop_connect_rate"],
    "activation": ["act_layer", "activation_layer"],
    "padding": ["pad_type"],
    "num_classes": ["classes"],
    "weights": ["checkpoint_path", "weights_path"],
}


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ours, name) for ours, names in NAMES_ELSEWHERE.items() for name in names]
)
@pytest.mark.parametrize(
    "make", [ek.efficientnet_b0, ek.tf_efficientnet_v2_b0, lambda **k: ek.EfficientNet.from_phi(-8, **k)]
)
def test_an_argument_by_another_packages_name_is_answered_with_ours(make, ours, theirs):
    with torch.device("meta"), pytest.raises(TypeError, match=f"expected the argument {ours}, .* got {theirs}"):
        make(**{theirs: 1})


def test_a_class_of_the_users_may_call_its_arguments_so():
    class Own(ek.EfficientNet):
        def __init__(self, *arguments, drop_rate, **options):
            super().__init__(*arguments, **{**options, "dropout": drop_rate})

    with torch.device("meta"):
        assert Own.from_phi(-8, drop_rate=0.3).classifier[0].p == 0.3


@pytest.mark.parametrize("weights", ["imagenet", "ImageNet", "default", "noisy-student", "imagenet1k_v1", "weights"])
def test_names_of_weights_that_there_are_none_of(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"expected one of IMAGENET1K_V1, DEFAULT, a URL or .* got '{weights}'"):
        ek.efficientnet_b0(weights=weights)
    with pytest.raises(ValueError, match=f"weights: expected a URL or the path of a file .* got '{weights}'"):
        ek.efficientnet_l2(weights=weights)
    # A file may have that name.
    with torch.device("meta"):
        torch.save(ek.efficientnet_b0().to_empty(device="cpu").state_dict(), weights)
    ek.efficientnet_b0(weights=weights)


def test_weights_and_pretrained_are_one_too_many():
    with pytest.raises(TypeError, match="pretrained: expected it or weights, got both"):
        ek.efficientnet_b0(weights="DEFAULT", pretrained=True)


@pytest.mark.parametrize("name", ["crop_size", "resize_size"])
def test_sizes_of_the_preprocessing(name):
    transforms = ek.EfficientNet_B0_Weights.DEFAULT.transforms
    for size in (300, [300], (300,), np.int64(300), transforms(crop_size=300).crop_size):
        preprocess = transforms(**{"resize_size": 320, name: size})
        for twin in (preprocess, copy.deepcopy(preprocess), pickle.loads(pickle.dumps(preprocess))):
            got = getattr(twin, name)
            assert got == got[0] == 300
            assert list(got) == [300]
        assert preprocess(torch.rand(3, 40, 50)).shape == (3, *2 * (preprocess.crop_size,))
    for size, error in (
        ([300, 320], TypeError),
        ("300", TypeError),
        (2.5, TypeError),
        (None, TypeError),
        (0, ValueError),
    ):
        with pytest.raises(error, match=f"{name}: expected .* pixel.*, got "):
            transforms(**{name: size})


@pytest.mark.parametrize("name", [None, 3, []], ids=str)
def test_a_variants_name_is_text(name):
    with pytest.raises((TypeError, ValueError), match="expected the name of a variant, got"):
        ek.create_model(name)


def test_a_refused_classifier_leaves_the_old_one():
    model = small()
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-3)
    assert model.num_classes == 10


# Operators


X = torch.randn(2, 4, 5, 6)
DEPTHWISE = torch.randn(4, 1, 3, 3)
POINTWISE = torch.randn(8, 4, 1, 1)
VECTOR = torch.randn(4)


def depthwise(x=X, weight=DEPTHWISE, **options):
    return ops.depthwise_conv(x, weight, **options)


def pointwise(x=X, weight=POINTWISE, **options):
    return ops.pointwise_conv(x, weight, **options)


POOLED, REDUCE, EXPAND = torch.randn(2, 4), torch.randn(2, 4), torch.randn(4, 2)
META = VECTOR.to("meta")


def excite(pooled=POOLED, w1=REDUCE, b1=None, w2=EXPAND, b2=None, **options):
    return ops.excite(pooled, w1, b1, w2, b2, **options)


BAD_OPERANDS = {
    "map of rank 3": (lambda: depthwise(X[0]), ValueError, r"x: expected 4 dimensions .*got shape \(4, 5, 6\)"),
    "map of integers": (lambda: depthwise(X.int()), TypeError, "x: expected float32, .*got torch.int32"),
    "complex map": (lambda: pointwise(X.to(torch.complex64)), TypeError, "x: expected float32, .*got torch.complex64"),
    "map that is no tensor": (lambda: pointwise([1.0]), TypeError, "x: expected a Tensor .*got list"),
    "weight None": (lambda: depthwise(weight=None), TypeError, "weight: expected a Tensor.*got NoneType"),
    "weight list": (lambda: depthwise(weight=[1.0]), TypeError, "weight: expected a Tensor.*got list"),
    "weight scalar": (lambda: depthwise(weight=torch.tensor(1.0)), ValueError, r"weight: expected .*got .*\(\)"),
    "weight of integers": (lambda: depthwise(weight=DEPTHWISE.int()), TypeError, "weight: expected .*got torch.int32"),
    "complex weight": (
        lambda: depthwise(weight=DEPTHWISE.to(torch.complex64).requires_grad_()),
        TypeError,
        "weight: expected .*got torch.complex64",
    ),
    "weight's channels": (
        lambda: depthwise(weight=torch.randn(5, 1, 3, 3)),
        ValueError,
        r"weight: expected shape \(4, 1, 3, 3\), got \(5, 1, 3, 3\)",
    ),
    "rectangular": (lambda: depthwise(weight=torch.randn(4, 1, 5, 3)), ValueError, "weight: expected shape"),
    "even kernel": (lambda: depthwise(weight=torch.randn(4, 1, 4, 4)), ValueError, "an odd kernel size, got 4"),
    "weight elsewhere": (
        lambda: depthwise(weight=DEPTHWISE.to("meta")),
        ValueError,
        "weight: expected device cpu, where the input is, got meta",
    ),
    "map elsewhere": (lambda: depthwise(X.to("meta")), ValueError, "weight: expected device meta.*got cpu"),
    "stride 0": (lambda: depthwise(stride=0), ValueError, "stride: expected an integer >= 1, got 0"),
    "stride 1.5": (lambda: depthwise(stride=1.5), ValueError, "stride: expected an integer >= 1, got 1.5"),
    "stride pair": (lambda: depthwise(stride=(1, 1)), ValueError, "stride: expected an integer >= 1, got .1, 1."),
    "negative padding": (lambda: depthwise(padding=-1), ValueError, "padding: expected an integer >= 0.*got -1"),
    "valid padding": (lambda: depthwise(padding="valid"), ValueError, "padding: expected .*got 'valid'"),
    "padding pair": (lambda: depthwise(padding=(1, 1)), ValueError, "padding: expected .*got .1, 1."),
    "one side negative": (lambda: depthwise(padding=(1, 1, -1, 1)), ValueError, "padding: expected .*-1"),
    "padding None": (lambda: depthwise(padding=None), ValueError, "padding: expected .*got None"),
    "map too small": (lambda: depthwise(torch.randn(2, 4, 2, 2)), ValueError, "at least the kernel's 3, got 2"),
    "map without rows": (lambda: depthwise(torch.randn(2, 4, 0, 5), padding=1), ValueError, "kernel's 3, got 2"),
    "prologue scale": (
        lambda: depthwise(prologue=Prologue(VECTOR[:3])),
        ValueError,
        r"prologue.scale: expected shape \(4,\), got \(3,\)",
    ),
    "prologue number": (lambda: depthwise(prologue=Prologue(1.0)), TypeError, "prologue.scale: expected .*got float"),
    "prologue gate": (
        lambda: depthwise(prologue=Prologue(gate=VECTOR)),
        ValueError,
        r"prologue.gate: expected shape \(2, 4\), got \(4,\)",
    ),
    "prologue activation": (lambda: depthwise(prologue=Prologue(act="gelu")), ValueError, "act: .*got 'gelu'"),
    "prologue elsewhere": (lambda: depthwise(prologue=Prologue(META)), ValueError, "expected device cpu.*got meta"),
    "epilogue scale": (lambda: depthwise(epilogue=Epilogue(VECTOR[:3])), ValueError, r"epilogue.scale.*got \(3,\)"),
    "epilogue activation": (lambda: depthwise(epilogue=Epilogue(act=None)), ValueError, "act: .*got None"),
    "epilogue residual": (
        lambda: depthwise(epilogue=Epilogue(residual=X)),
        ValueError,
        r"epilogue.residual: expected shape \(2, 4, 3, 4\), got \(2, 4, 5, 6\)",
    ),
    "reduction": (lambda: depthwise(reduction="sum"), ValueError, "reduction: expected one of none.*got 'sum'"),
    "pointwise reduction": (lambda: pointwise(reduction="mean"), ValueError, "reduction: expected .*got 'mean'"),
    "pointwise weight None": (lambda: pointwise(weight=None), TypeError, "weight: expected a Tensor.*got NoneType"),
    "pointwise weight scalar": (lambda: pointwise(weight=torch.tensor(1.0)), ValueError, "weight: expected"),
    "pointwise weight of rank 2": (
        lambda: pointwise(weight=torch.randn(8, 4)),
        ValueError,
        r"weight: .*got .*\(8, 4\)",
    ),
    "pointwise kernel": (lambda: pointwise(weight=torch.randn(8, 4, 3, 3)), ValueError, r"got \(8, 4, 3, 3\)"),
    "pointwise channels": (lambda: pointwise(weight=torch.randn(8, 5, 1, 1)), ValueError, r"got \(8, 5, 1, 1\)"),
    "pointwise bias": (lambda: pointwise(bias=VECTOR), ValueError, r"bias: expected shape \(8,\), got \(4,\)"),
    "statistics of integers": (lambda: ops.channel_statistics(X.int()), TypeError, "got torch.int32"),
    "squeeze rank": (lambda: ops.squeeze(X[0]), ValueError, "x: expected 4 dimensions"),
    "squeeze gate": (lambda: ops.squeeze(X, Prologue(gate=torch.ones(4, 2))), ValueError, "prologue.gate"),
    "excite rank": (lambda: excite(X), ValueError, "pooled: expected 2 dimensions"),
    "excite None": (lambda: excite(None), TypeError, "pooled: expected a Tensor.*got NoneType"),
    "excite w1": (lambda: excite(w1=torch.randn(2, 5)), ValueError, r"w1: expected shape \(2, 4\), got \(2, 5\)"),
    "excite w1 None": (lambda: excite(w1=None), TypeError, "w1: expected a Tensor.*got NoneType"),
    "excite w2": (lambda: excite(w2=torch.randn(2, 4)), ValueError, r"w2: expected shape \(4, 2\), got \(2, 4\)"),
    "excite w2 None": (lambda: excite(w2=None), TypeError, "w2: expected a Tensor.*got NoneType"),
    "excite b1": (lambda: excite(b1=VECTOR), ValueError, r"b1: expected shape \(2,\), got \(4,\)"),
    "excite activation": (lambda: excite(act="gelu"), ValueError, "act: expected one of none.*got 'gelu'"),
    "excite gate": (lambda: excite(gate="tanh"), ValueError, "gate: expected one of sigmoid, hardsigmoid, got 'tanh'"),
    "excite of integers": (lambda: excite(torch.ones(2, 4, dtype=torch.int32)), TypeError, "pooled: .*torch.int32"),
    "fold nothing": (lambda: ops.finalize_batch_norm(None, None, None), ValueError, "expected stats, or running_mean"),
    "fold a list": (
        lambda: ops.finalize_batch_norm([1.0], None, None),
        TypeError,
        "stats: expected a Tensor.*got list",
    ),
    "fold shape": (lambda: ops.finalize_batch_norm(torch.randn(2, 4), None, None), ValueError, r"stats: .*\(2, 4\)"),
    "fold weight": (
        lambda: ops.finalize_batch_norm(torch.ones(3, 4), VECTOR[:3], None),
        ValueError,
        "weight: expected",
    ),
    "fold one running vector": (
        lambda: ops.finalize_batch_norm(torch.ones(3, 4), None, None, VECTOR),
        ValueError,
        "running_mean and running_var",
    ),
    "fold elsewhere": (
        lambda: ops.finalize_batch_norm(None, None, None, VECTOR, META),
        ValueError,
        "running_var.*meta",
    ),
    "bn_act_add rank": (lambda: ops.bn_act_add(X[0]), ValueError, "x: expected 4 dimensions"),
    "bn_act_add residual": (
        lambda: ops.bn_act_add(X, residual=X[:, :3]),
        ValueError,
        r"residual: .*got \(2, 3, 5, 6\)",
    ),
    "bn_act_add drop_path_scale": (
        lambda: ops.bn_act_add(X, drop_path_scale=VECTOR),
        ValueError,
        r"drop_path_scale: expected shape \(2,\), got \(4,\)",
    ),
    "bn_act_add drop_path_scale list": (
        lambda: ops.bn_act_add(X, drop_path_scale=[0, 1]),
        TypeError,
        "drop_path_scale: expected a Tensor.*got list",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_operands_that_do_not_fit_are_refused(case):
    call, error, message = BAD_OPERANDS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("operator", [depthwise, pointwise])
def test_a_weight_of_another_dtype_is_treated_alike_with_and_without_gradients(operator, dtype):
    weight = (DEPTHWISE if operator is depthwise else POINTWISE).to(dtype)
    recorded = operator(weight=weight.clone().requires_grad_())[0]
    assert_close(operator(weight=weight)[0], recorded)


@pytest.mark.parametrize("reduction", ["none", "statistics", "pool"])
def test_operators_take_an_empty_batch(reduction):
    x = torch.randn(0, 4, 5, 6)
    y, reduced = depthwise(x, padding=1, reduction=reduction)
    assert y.shape == x.shape
    assert reduced is None or reduced.shape == {"statistics": (3, 4), "pool": (0, 4)}[reduction]
    y, reduced = pointwise(x, reduction=reduction)
    assert y.shape == ((0, 8) if reduction == "pool" else (0, 8, 5, 6))
    assert reduced is None or reduced.shape == (3, 8)
    mean, var = torch.zeros(4), torch.ones(4)
    ops.finalize_batch_norm(ops.channel_statistics(x), None, None, mean, var)
    assert torch.equal(mean, torch.zeros(4))
    assert torch.equal(var, torch.ones(4))
    assert ops.squeeze(x).shape == (0, 4)
    assert excite(torch.randn(0, 4)).shape == (0, 4)
    assert ops.bn_act_add(x, Prologue(VECTOR, VECTOR, "silu"), x, torch.ones(0)).shape == x.shape


def test_statistics_of_no_channels_are_empty():
    assert ops.channel_statistics(torch.randn(2, 0, 5, 5)).shape == (3, 0)


@pytest.mark.parametrize("view", VIEWS)
def test_operators_take_views(view):
    x = VIEWS[view]()
    weight = torch.randn(6, 2, 3, 3)[::2, 1:].transpose(2, 3)
    scale, shift = torch.randn(3, 2).unbind(1)
    epilogue = Epilogue(scale, shift, "silu")
    y, pooled = ops.depthwise_conv(x, weight, 2, "same", None, epilogue, "pool")
    with ek.use_backend("reference"):
        arguments = (x.contiguous(), weight.contiguous(), 2, "same", None, epilogue, "pool")
        expected, expected_pooled = ops.depthwise_conv(*arguments)
    assert_close(y, expected)
    assert_close(pooled, expected_pooled)
    y, _ = ops.pointwise_conv(x, torch.randn(1, 3, 1, 1).expand(5, 3, 1, 1), epilogue=Epilogue(act="silu"))
    assert_close(y, y[:, :1].expand_as(y))
    assert_close(ops.bn_act_add(x, Prologue(scale, shift)), x * scale[:, None, None] + shift[:, None, None])


def test_running_statistics_are_untouched_by_a_refused_fold():
    mean, var = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match="bias: expected shape"):
        ops.finalize_batch_norm(torch.ones(3, 4), None, torch.ones(5), mean, var)
    assert torch.equal(mean, torch.zeros(4))
    assert torch.equal(var, torch.ones(4))


# Backends


def test_an_unknown_backend_is_refused(monkeypatch):
    model, x = small().eval(), torch.randn(1, 3, 32, 32)
    expected = r"expected a backend out of torch, reference, cpu, triton, got 'cudnn'"
    with pytest.raises(ValueError, match=expected), ek.use_backend("cudnn"):
        pass
    monkeypatch.setenv("EFFNET_KERNELS_BACKEND", "cudnn")
    for call in (lambda: model(x), lambda: ek.explain(model, x), lambda: depthwise()):
        with pytest.raises(ValueError, match=expected):
            call()
    # The innermost choice wins.
    with ek.use_backend("torch"):
        model(x)


def test_a_backend_that_is_not_there_is_refused_with_the_reason(monkeypatch):
    model, x = small().eval(), torch.randn(1, 3, 32, 32)
    monkeypatch.setattr(select.cpu, "unavailable_reason", lambda: "no compiler was found")
    expected = r"backend 'cpu' was forced but cannot run: no compiler was found"
    with pytest.raises(ek.BackendError, match=expected), ek.use_backend("cpu"):
        pass
    monkeypatch.setenv("EFFNET_KERNELS_BACKEND", "cpu")
    with pytest.raises(ek.BackendError, match=expected):
        model(x)


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="needs the native extension")
def test_a_forced_backend_that_cannot_run_this_call_is_refused_with_the_reason(monkeypatch):
    model, x = small().train(), torch.randn(2, 3, 32, 32)
    before = snapshot(model)
    monkeypatch.setenv("EFFNET_KERNELS_BACKEND", "cpu")
    with torch.no_grad(), pytest.raises(ek.BackendError, match=r"'cpu' was forced but cannot run .*float64"):
        copy.deepcopy(model).double()(x.double())
    assert not changed(model, before)


def test_the_choice_ends_with_its_block_even_after_an_error():
    model = small()
    with ek.use_backend("reference"):
        with pytest.raises(ValueError, match="expected images"), ek.use_backend("torch"):
            model(torch.randn(3, 3))
        assert select.forced() == "reference"
    assert select.forced() is None


# Import


BARE_IMPORT = """
import importlib.abc, sys

OPTIONAL = {names!r}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import effnet_kernels as ek
assert not OPTIONAL & {{name.partition(".")[0] for name in sys.modules}}
model = ek.EfficientNet.from_phi(-8, num_classes=3).eval()
with torch.no_grad():
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
assert not torch.cuda.is_initialized()
print(len(ek.explain(model, torch.randn(1, 3, 32, 32))))
"""


def test_import_needs_torch_alone():
    names = {
        "torchvision",
        "timm",
        "efficientnet_pytorch",
        "PIL",
        "triton",
        "tqdm",
        "safetensors",
        "skimage",
        "huggingface_hub",
    }
    code = BARE_IMPORT.format(names=names)
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
