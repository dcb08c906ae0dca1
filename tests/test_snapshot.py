"""That a finding about a module is forgotten as soon as something inside the module changes."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels.fusion.cache import Snapshots


def module() -> nn.Module:
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.BatchNorm2d(8), nn.SiLU()), nn.Sequential())
    m[0].noted, m[0].numbers = Unaskable(), [([2],)]
    m[1][0].eps = 1.0
    return m


def replace_parameter(m: nn.Module) -> None:
    m[0].weight = nn.Parameter(torch.zeros_like(m[0].weight))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "train or eval": lambda m: m.eval(),
    "train or eval of an inner module": lambda m: m[1][0].eval(),
    "attribute": lambda m: setattr(m[1][0], "eps", 1e-3),
    "parameter": replace_parameter,
    "buffer": lambda m: setattr(m[1][0], "running_mean", torch.zeros(8)),
    "child": lambda m: m[1].__setitem__(1, nn.ReLU()),
    "class of a child": lambda m: setattr(m[1][1], "__class__", nn.ReLU),
    "hook": lambda m: m[1][1].register_forward_hook(lambda *_: None),
    "forward": lambda m: setattr(m[0], "forward", lambda x: x),
    "child of a module without children": lambda m: m[2].append(nn.ReLU()),
    "parameter of a module without any": lambda m: m[1][1].register_parameter("p", nn.Parameter(torch.ones(1))),
    "buffer of a module without any": lambda m: m[0].register_buffer("b", torch.ones(1)),
    "list in place": lambda m: m[0].numbers.append(1),
    "list in a tuple in place": lambda m: m[0].numbers[0][0].append(1),
    "object": lambda m: setattr(m[0], "noted", Unaskable()),
}


class Unaskable:
    """Not to be compared, as arrays are not."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.SiLU])
def test_a_patched_class_is_noticed(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    m, snapshots = module(), Snapshots[str]()
    snapshots.keep(m, "found")
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, x: x)
        assert snapshots.get(m) is None
    assert snapshots.get(m) == "found"


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    m, snapshots = module(), Snapshots[str]()
    assert snapshots.get(m) is None
    snapshots.keep(m, "found")
    assert snapshots.get(m) == "found"
    CHANGES[name](m)
    assert snapshots.get(m) is None


def test_steps_of_training_are_no_change() -> None:
    m, snapshots = module(), Snapshots[str]()
    snapshots.keep(m, "found")
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    m(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert snapshots.get(m) == "found"


def test_a_list_that_holds_itself() -> None:
    m, snapshots = module(), Snapshots[str]()
    m[0].numbers.append(m[0].numbers)
    m[1].numbers = list(range(10000))
    snapshots.keep(m, "found")
    assert snapshots.get(m) == "found"


def test_a_whole_model_is_loaded_as_before_it_was_called(tmp_path) -> None:
    model = used(ek.efficientnet_b0(num_classes=2))
    torch.save(model, tmp_path / "model.pt")
    with torch.serialization.safe_globals([*map(type, model.modules()), set]):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_an_equal_setting_is_no_change() -> None:
    m, snapshots = module(), Snapshots[str]()
    snapshots.keep(m, "found")
    m[0].padding, m[1][0].eps = (0, 0), 2.0 / 2
    for _ in range(2):
        assert snapshots.get(m) == "found"
    m[0].padding = (0, 1)
    assert snapshots.get(m) is None


def hook_of(m: nn.Module) -> None:
    m.register_forward_hook(lambda *_: m)


# How something inside of a module leads back to it.
WAYS_BACK: dict[str, Callable[[nn.Module], object]] = {
    "none": lambda m: None,
    "hook": hook_of,
    "hook of an inner module": lambda m: m[1][1].register_forward_hook(lambda *_: m),
    "attribute": lambda m: m[1][0].__dict__.update(owner=m),
    "attribute in a list": lambda m: setattr(m[1][0], "owner", [m]),
    "compiled": lambda m: m.compile(),
}


@pytest.mark.parametrize("way", WAYS_BACK)
@pytest.mark.parametrize("before", [True, False])
def test_a_module_is_not_kept_alive(way: str, before: bool) -> None:
    m, snapshots = module(), Snapshots[object]()
    if before:
        WAYS_BACK[way](m)
    snapshots.keep(m, list(m.parameters()))
    if not before:
        WAYS_BACK[way](m)
    reference = weakref.ref(m)
    del m
    gc.collect()
    assert reference() is None


def used(model: nn.Module) -> nn.Module:
    x = torch.randn(2, 3, 32, 32)
    y = model.train()(x)
    (y if isinstance(y, torch.Tensor) else y[-1]).sum().backward()
    with torch.no_grad():
        for _ in range(2):
            model.eval()(x)
    return model


def of_timm(**settings: bool) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return ek.accelerate(timm.create_model("test_efficientnet", **settings))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ours": ek.efficientnet_b0,
    "our maps": lambda: ek.efficientnet_b0(features_only=True),
    "timm's": of_timm,
    "timm's maps": lambda: of_timm(features_only=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_freed_as_soon_as_it_is_deleted(name: str) -> None:
    model = used(MODELS[name]())
    references = [weakref.ref(module) for module in model.modules()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_begins_anew(copied: Callable[[nn.Module], nn.Module]) -> None:
    m, snapshots = nn.Sequential(nn.Conv2d(3, 8, 3)), Snapshots[str]()
    snapshots.keep(m, "found")
    other = copied(m)
    assert snapshots.get(other) is None
    snapshots.keep(other, "another")
    assert (snapshots.get(m), snapshots.get(other)) == ("found", "another")
