"""What people do to networks before they freeze them: the engine computes the same, or freeze() says why not."""

import copy
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, calibrate
from native_cases import needs_native
from test_features import small
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import effnet_kernels as ek

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


def torchvision_efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    settings = [FusedMBConvConfig(2, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2, 1.0, 1.0)]
    return EfficientNet(settings, 0.0, 0.2, num_classes=5)


def torchvision_mobilenet(name: str) -> nn.Module:
    import torchvision.models

    return getattr(torchvision.models, name)(width_mult=0.25, num_classes=5)


def timm_network(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def lukemelas() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-b0", num_classes=5)
    model._blocks = model._blocks[:3]
    head = nn.Conv2d(24, 32, 1, bias=False)
    head.static_padding, head.__class__ = nn.Identity(), type(model._conv_head)
    model._conv_head, model._bn1, model._fc = head, nn.BatchNorm2d(32, 1e-3, 0.01), nn.Linear(32, 5)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: small(num_classes=5),
    "torchvision": torchvision_efficientnet,
    "mobilenet_v2": lambda: torchvision_mobilenet("mobilenet_v2"),
    "timm": lambda: timm_network("test_efficientnet", num_classes=5),
    "timm, max pooling": lambda: timm_network("test_efficientnet", num_classes=5, global_pool="catavgmax"),
    "lcnet": lambda: timm_network("lcnet_035", num_classes=5),
    "efficientnet_pytorch": lukemelas,
    "accelerated torchvision": lambda: ek.accelerate(torchvision_efficientnet()),
    "accelerated timm": lambda: ek.accelerate(timm_network("test_efficientnet", num_classes=5)),
}


class Scaled(nn.Module):
    """A layer of the user's own around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.inner(x)


class GeM(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.clamp_min(1e-4).pow(3), 1).pow(1 / 3)


def scaled_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *arguments, **named: 1.5 * original(*arguments, **named)


def replace(model: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    parent._modules[leaf] = make(parent._modules[leaf])


AT_A_MODULE: dict[str, Callable[[nn.Module, str], object]] = {
    "forward hook": lambda m, n: m.get_submodule(n).register_forward_hook(lambda _, a, y: 1.5 * y),
    "forward pre-hook": lambda m, n: m.get_submodule(n).register_forward_pre_hook(lambda _, a: (1.5 * a[0], *a[1:])),
    "instance forward": lambda m, n: scaled_forward(m.get_submodule(n)),
    "another module": lambda m, n: replace(m, n, Scaled),
    "another module behind": lambda m, n: replace(m, n, lambda inner: nn.Sequential(inner, nn.Softplus())),
    "no module": lambda m, n: replace(m, n, lambda inner: nn.Identity()),
    "twice": lambda m, n: replace(m, n, lambda inner: nn.Sequential(inner, inner)),
}


def places(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and type(module) is not nn.ModuleList]


def evaluate(model: nn.Module, x: Tensor) -> Tensor | Exception:
    try:
        with torch.no_grad(), ek.use_backend("torch"):
            return model.eval()(x)
    except Exception as error:
        return error


def outcome(model: nn.Module, x: Tensor, verify: bool) -> str:
    """What freeze() makes of the model: "same", "refused", or what is wrong."""
    try:
        y = ek.freeze(model, verify=verify)(x)
    except (ValueError, TypeError) as error:
        return "refused" if str(error) else "an empty message"
    except Exception as error:
        return "refused" if isinstance(evaluate(model, x), Exception) else f"{type(error).__name__}: {error}"
    expected = evaluate(model, x)
    if isinstance(expected, Exception):
        return f"no error, where torch has {expected}"
    if y.shape != expected.shape:
        return f"shape {tuple(y.shape)} for {tuple(expected.shape)}"
    # Relative to the spread between the images, of which rounding is a larger part than of the outputs.
    error = float((y - expected).norm() / (expected - expected.mean(dim=0)).norm().clamp_min(1e-6))
    return "same" if error < 1e-3 else f"silently different by {error:.1e}"


def calibrated(name: str) -> nn.Module:
    torch.manual_seed(0)
    return calibrate(NETWORKS[name]())


IMAGES = torch.randn(3, 3, 48, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("change", AT_A_MODULE)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_change_at_any_module(name: str, change: str) -> None:
    """By structure alone: with the proof by example these would be found a second time."""
    model = calibrated(name)
    assert outcome(copy.deepcopy(model), IMAGES, verify=False) == "same"
    seen = []
    for place in places(model):
        changed = copy.deepcopy(model)
        AT_A_MODULE[change](changed, place)
        found = outcome(changed, IMAGES, verify=False)
        assert found in ("same", "refused"), f"{change} at {place}: {found}"
        seen.append(found)
    assert "refused" in seen


def prune(module: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(module, "weight", 0.5)


def old_weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module)
    module.weight_g.data *= 1.5


def new_weight_norm(module: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data *= 1.5


REPARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": prune,
    "weight_norm of old": old_weight_norm,
    "weight_norm": new_weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "spectral_norm of old": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("change", REPARAMETRIZED)
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_are_computed(name: str, change: str) -> None:
    model = calibrated(name)
    weighted = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for place in [*weighted[:3], *weighted[-4:]]:
        changed = copy.deepcopy(model)
        REPARAMETRIZED[change](changed.get_submodule(place))
        found = outcome(changed, IMAGES, verify=False)
        assert found in ("same", "refused"), f"{change} at {place}: {found}"
        if isinstance(changed.get_submodule(place), nn.Linear):
            assert found == "same", "a classifier stays what it is"


def tails(name: str) -> Iterator[tuple[str, Callable[[nn.Module], object]]]:
    """Other pooling, dropout and classifiers, by the names that they have in a network."""
    pool = {"timm": "global_pool", "lcnet": "global_pool", "efficientnet_pytorch": "_avg_pooling"}
    kind = name.removeprefix("accelerated ").partition(",")[0]
    if kind != "mobilenet_v2" and name != "timm, max pooling":
        where = pool.get(kind, "avgpool")
        flat = kind == "timm"
        for make in (GeM, lambda: nn.AdaptiveMaxPool2d(1), lambda: nn.AdaptiveAvgPool2d((1, 1))):
            pooling = nn.Sequential(make(), nn.Flatten(1)) if flat else make()
            yield "pooling", lambda m, pooling=pooling: replace(m, where, lambda _: pooling)
        yield "hook on pooling", lambda m: m.get_submodule(where).register_forward_hook(lambda _, a, y: y.exp())
        yield "instance forward of pooling", lambda m: scaled_forward(m.get_submodule(where))
    classifier = {"efficientnet_pytorch": "_fc"}.get(kind, "classifier")
    named = NETWORKS[name]().named_modules()
    linear = next(n for n, m in named if n.startswith(classifier) and isinstance(m, nn.Linear))
    yield "hook on the classifier", lambda m: m.get_submodule(linear).register_forward_hook(lambda _, a, y: y.tanh())
    yield "no classifier", lambda m: replace(m, linear, lambda _: nn.Identity())
    yield "no bias", lambda m: setattr(m.get_submodule(linear), "bias", None)
    yield "two layers", lambda m: replace(m, linear, lambda old: nn.Sequential(old, nn.GELU(), nn.Linear(5, 2)))
    yield (
        "quantized",
        lambda m: replace(
            m, linear, lambda old: torch.ao.quantization.quantize_dynamic(nn.Sequential(old), {nn.Linear})[0]
        ),
    )
    yield "classifier of the user's", lambda m: replace(m, linear, Scaled)
    dropout = {"efficientnet_pytorch": "_dropout", "timm": None, "lcnet": None}.get(kind, "classifier.0")
    if dropout is not None:
        yield "a layer as dropout", lambda m: replace(m, dropout, lambda _: nn.Softplus())


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_pooling_and_what_follows_may_be_the_users_own(name: str, verify: bool) -> None:
    model = calibrated(name)
    for what, change in tails(name):
        changed = copy.deepcopy(model)
        change(changed)
        assert outcome(changed, IMAGES, verify) == "same", what


METHODS = ["forward", "_forward_impl", "forward_features", "forward_head", "extract_features", "maps"]


@pytest.mark.parametrize("of_class", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_replaced_methods_are_refused_by_name(name: str, of_class: bool) -> None:
    model = calibrated(name)
    replaced = [method for method in METHODS if hasattr(model, method)]
    assert replaced
    for method in replaced:
        if method == "extract_features" and "torchvision" in name:
            continue
        changed = copy.deepcopy(model)
        own = getattr(type(changed), method)

        def other(self: nn.Module, *arguments: object, own: Callable = own) -> object:
            y = own(self, *arguments)
            return [1.5 * x for x in y] if isinstance(y, list) else 1.5 * y

        if of_class:
            changed.__class__ = type("Mine", (type(changed),), {method: other})
        else:
            setattr(changed, method, types.MethodType(other, changed))
        with pytest.raises(ValueError, match=method):
            ek.freeze(changed, verify=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_on_the_model_and_on_all_modules_are_refused(name: str) -> None:
    model = calibrated(name)
    handle = model.register_forward_hook(lambda _, a, y: 2 * y)
    with pytest.raises(ValueError, match="the model has a hook"):
        ek.freeze(model)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        with pytest.raises(ValueError, match="global module hook"):
            ek.freeze(model)
    finally:
        handle.remove()
    assert outcome(model, IMAGES, verify=True) == "same"


def patched(own: Callable, other: Callable) -> Callable:
    """Another function in the place of a class's own, from where nothing shows that it is one."""
    other.__module__ = own.__module__
    return other


def test_the_proof_names_the_first_block_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of torch's that computes something else is what no look at a module can see."""
    model, own = calibrated("torchvision"), F.adaptive_avg_pool2d
    # Squeeze-and-excitation calls it first.
    monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda x, size: 1.1 * own(x, size))
    with pytest.raises(ValueError, match=r"features\.2\.0: the engine would compute something else"):
        ek.freeze(model)
    y = ek.freeze(model, verify=False)(IMAGES)
    assert float((y - evaluate(model, IMAGES)).norm()) > 1e-3
    monkeypatch.setattr(F, "adaptive_avg_pool2d", own)
    monkeypatch.setattr(torch, "flatten", lambda x, start: 1.1 * x.reshape(len(x), -1))
    with pytest.raises(ValueError, match=r"what follows features\.2\.1: the engine would compute"):
        ek.freeze(model)


@pytest.mark.parametrize("patched", ["forward", "_conv_forward"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d])
def test_a_patched_class_is_refused(kind: type[nn.Module], patched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = patched if hasattr(kind, patched) else "forward"
    model, own = calibrated("torchvision"), getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, x, *more: own(self, x, *more))
    with pytest.raises(ValueError, match=rf"features\.0: the class of .* had its {method} replaced"):
        ek.freeze(model, verify=False)


@pytest.mark.parametrize("features", [True, False])
def test_the_proof_looks_at_feature_maps_and_at_the_users_images(features: bool, monkeypatch) -> None:
    model, own = calibrated("torchvision"), F.adaptive_avg_pool2d
    ek.freeze(model, features_only=features, verify=torch.randn(2, 3, 31, 70))
    # Wrong for images over a certain size alone.
    monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda x, size: own(x, size) * (1.1 if x.shape[3] > 17 else 1))
    ek.freeze(model, features_only=features)
    with pytest.raises(ValueError, match=r"features\.2\.0: the engine .* images of shape \(2, 3, 31, 70\)"):
        ek.freeze(model, features_only=features, verify=torch.randn(2, 3, 31, 70))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_proof_has_no_side_effect(name: str) -> None:
    model = calibrated(name).train()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    ek.freeze(model)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(m._forward_pre_hooks for m in model.modules())


class Drawing(nn.Module):
    """A classifier that draws, as dropout that stays on does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * torch.rand(3).to(x).sum()


def test_the_proof_leaves_random_numbers_alone() -> None:
    model = calibrated("torchvision")
    model.classifier = nn.Sequential(Drawing(), nn.Linear(64, 5))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    ek.freeze(model)
    assert torch.equal(torch.rand(3), expected)


HEADS: dict[str, Callable[[Tensor], object]] = {
    "tuple": lambda y: (y, y[:, :1]),
    "list of one": lambda y: [y],
    "dictionary": lambda y: {"logits": y, "more": [y.exp()]},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_heads_may_return_anything_and_autocast_changes_nothing(head: str, autocast: bool) -> None:
    class Head(nn.Linear):
        def forward(self, x: Tensor) -> object:
            return HEADS[head](super().forward(x))

    model = calibrated("torchvision")
    model.classifier = Head(64, 5)
    expected = evaluate(model, IMAGES)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ek.freeze(model)(IMAGES)
    assert type(y) is type(expected)
    for ours, right in zip(tree_leaves(y), tree_leaves(expected), strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, right)


@pytest.mark.parametrize("images", [torch.empty(0, 3, 64, 64), torch.randn(3, 64, 64), torch.randn(5)])
def test_images_that_prove_nothing_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="verify: expected images"):
        ek.freeze(calibrated("torchvision"), verify=images)


def test_outputs_that_prove_nothing_are_refused() -> None:
    model = calibrated("torchvision")
    model.features[0][1].running_var.fill_(-1.0)
    with pytest.raises(ValueError, match="no finite number"):
        ek.freeze(model)


def test_names_of_a_tail_may_be_alike() -> None:
    model = calibrated("torchvision")
    model.classifier = nn.Sequential()
    model.classifier.add_module("fc", nn.Sequential())
    model.classifier.fc.add_module("1", nn.Linear(64, 5))
    model.classifier.add_module("fc_1", Scaled(nn.Softplus()))
    assert outcome(model, IMAGES, verify=False) == "same"


def test_modules_that_a_class_does_not_call_are_left_out() -> None:
    model = calibrated("mobilenet_v2")
    model.avgpool = nn.AdaptiveMaxPool2d(1)
    assert outcome(model, IMAGES, verify=False) == "same"


def test_a_head_that_wants_one_size() -> None:
    model = calibrated("torchvision")
    model.avgpool, model.classifier = nn.Identity(), nn.Sequential(nn.Flatten(1), nn.Linear(64 * 3 * 2, 4))
    assert evaluate(model, IMAGES[:, :, :11, :7]).shape == (3, 4)
    with pytest.raises(ValueError, match=r"fails on images of 64x64 and 224x224 .*verify=images"):
        ek.freeze(model)
    x = IMAGES[:, :, :11, :7].contiguous()
    assert_close(ek.freeze(model, verify=x)(x), evaluate(model, x))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "torch.compile": torch.compile,
    "compiled average": lambda m: torch.compile(torch.optim.swa_utils.AveragedModel(m)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_wrappers_are_taken_off(name: str, wrapper: str) -> None:
    model = calibrated(name)
    y = ek.freeze(WRAPPERS[wrapper](model))(IMAGES)
    assert torch.equal(y, ek.freeze(model)(IMAGES))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_hooks_on_wrappers_are_refused(wrapper: str) -> None:
    wrapped = WRAPPERS[wrapper](calibrated("torchvision"))
    wrapped.register_forward_hook(lambda _, a, y: 2 * y)
    with pytest.raises(ValueError, match=r"the \w+ has a hook"):
        ek.freeze(wrapped)


def test_images_to_compare_on_are_tensors() -> None:
    with pytest.raises(TypeError, match=r"verify: expected a bool or images .*, got ndarray"):
        ek.freeze(calibrated("torchvision"), verify=IMAGES.numpy())


def test_a_network_inside_of_another_model_is_named() -> None:
    inside = nn.Sequential(nn.Identity(), calibrated("torchvision"))
    with pytest.raises(TypeError, match=r"got torch.*Sequential; freeze its part model\.get_submodule\('1'\)"):
        ek.freeze(inside)


@pytest.mark.parametrize("depth", [5, 4, 3])
def test_an_encoder_of_segmentation_models_pytorch(depth: int) -> None:
    package = pytest.importorskip("segmentation_models_pytorch", reason="freezes its encoder")
    channels = (64, 32, 16, 8, 4)[:depth]
    options = {"encoder_weights": None, "encoder_depth": depth, "decoder_channels": channels}
    model = package.Unet("efficientnet-b0", **options)
    x = torch.randn(3, 3, 64, 96)
    calibrate(model, 64)
    with pytest.raises(TypeError, match=r"freeze its part model\.get_submodule\('encoder'\), which is one"):
        ek.freeze(model)
    expected = evaluate(model, x)
    for features in (True, False):
        model.encoder = ek.freeze(model.encoder, features_only=features) if features else model.encoder
        # The decoder magnifies rounding: of five stages torch's own outputs are 1e-5 off those in float64.
        assert_close(evaluate(model, x), expected, 1e-4)
    assert torch.equal(model.encoder(x)[0], x)


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "lcnet_050", "fbnetv3_b", "hardcorenas_a", "tf_mobilenetv3_small_075"]
)
@pytest.mark.parametrize("features", [True, False])
def test_timms_mobile_networks(name: str, features: bool) -> None:
    model = calibrate(timm_network(name, num_classes=7))
    engine = ek.freeze(model, features_only=features)
    if features:
        maps = timm_network(name, features_only=True)
        maps.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            expected = maps.eval()(IMAGES)
        for ours, right in zip(engine(IMAGES), expected, strict=True):
            assert_close(ours, right)
        assert len(ek.freeze(maps)(IMAGES)) == len(expected)
    else:
        assert_close(engine(IMAGES), evaluate(model, IMAGES))


def test_tensors_that_the_engine_does_not_read_are_no_reason_to_fail() -> None:
    model = calibrated("torchvision")
    model.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
    model.features.register_buffer("unused", torch.zeros(2, device="meta"))
    model.extra = nn.Linear(2, 2).double()
    model.extra.get_extra_state = lambda: {"step": 3}
    assert outcome(model, IMAGES, verify=True) == "same"


def test_engines_have_state_dicts() -> None:
    one, other = calibrated("torchvision"), calibrate(torchvision_efficientnet())
    engines = [ek.freeze(model) for model in (one, other)]
    before = engines[1](IMAGES)
    assert not torch.equal(engines[0](IMAGES), before)
    state = engines[1].state_dict()
    assert state
    engines[0].load_state_dict(state)
    assert torch.equal(engines[0](IMAGES), before)
    part = ek.freeze(one)
    part(IMAGES)
    part.folded.load_state_dict({key.removeprefix("folded."): value for key, value in state.items()})
    assert torch.equal(part(IMAGES), before)
    inside = nn.ModuleDict({"engine": ek.freeze(one)})
    inside.load_state_dict({f"engine.{key}": value for key, value in state.items()})
    assert torch.equal(inside["engine"](IMAGES), before)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        engines[0].load_state_dict(one.state_dict())


@pytest.mark.parametrize("backend", ["torch", "reference", "cpu"])
def test_engines_run_on_the_backend_that_is_forced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated("torchvision")
    engine = ek.freeze(model)
    expected = engine(IMAGES)
    monkeypatch.setenv("EFFNET_KERNELS_BACKEND", backend)
    packed = engine._native
    engine._native = None
    y = engine(IMAGES)
    assert (engine._native is not None) == (backend == "cpu")
    assert_close(y, expected)
    assert packed is not None
