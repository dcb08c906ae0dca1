"""That a finding about a module is forgotten as soon as something inside the module changes."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from effnet_kernels.fusion.cache import Snapshots


def module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.BatchNorm2d(8), nn.SiLU()))


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
}


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


def test_a_module_is_not_kept_alive() -> None:
    m, snapshots = module(), Snapshots[str]()
    snapshots.keep(m, "found")
    reference = weakref.ref(m)
    del m
    gc.collect()
    assert reference() is None
