"""What a pickle can reach through the names of accelerated classes: those classes, and nothing else."""

import importlib
import inspect
import io
import pickle
import sys
from types import ModuleType

import pytest
from conftest import run_python
from torch import nn

from effnet_kernels.fusion.accelerated_class import is_accelerated
from effnet_kernels.interop import accelerated_classes, blocks

KNOWN = sorted({*blocks.ADAPTERS, *accelerated_classes._NETWORKS, "torch.nn.modules.container.Sequential"})
IMPORTED = ["subprocess", "os", "builtins", "shutil", "pickle", "importlib", "torch", "torch.nn", "torch.hub", "sys"]
IMPORTED += [
    "effnet_kernels",
    "effnet_kernels.interop.accelerated_classes",
    "effnet_kernels.tools.cli",
    "effnet_kernels.modules",
    "runpy",
]


def name_in(module: str, qualified: str) -> str:
    return f"{module}:{qualified}".replace(".", "/")


class OnlyOurs(pickle.Unpickler):
    """An application's unpickler that trusts this package's names."""

    def find_class(self, module: str, name: str) -> object:
        if module.partition(".")[0] != "effnet_kernels":
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def reach(name: str) -> object:
    """What a pickle gets from the acceleration module under a name."""
    code = pickle.PROTO + b"\x04"
    for text in ("effnet_kernels.interop.accelerated_classes", name):
        data = text.encode("utf-8", "surrogatepass")
        code += pickle.BINUNICODE + len(data).to_bytes(4, "little") + data
    return OnlyOurs(io.BytesIO(code + pickle.STACK_GLOBAL + pickle.STOP)).load()


@pytest.mark.parametrize("module", IMPORTED)
def test_nothing_is_found_in_modules_that_are_imported(module: str) -> None:
    importlib.import_module(module)
    for attribute, value in list(vars(sys.modules[module]).items()):
        inner = list(vars(value))[:20] if inspect.isclass(value) else []
        for qualified in (attribute, *(f"{attribute}.{name}" for name in inner)):
            if value not in (blocks.Pair, nn.Sequential):
                with pytest.raises(AttributeError):
                    reach(name_in(module, qualified))


def test_nothing_is_imported_to_look_for_a_name() -> None:
    code = f"""
import sys, effnet_kernels
from effnet_kernels.interop import accelerated_classes
before, known = set(sys.modules), {{name.partition(".")[0] for name in {KNOWN!r}}}
names = sorted(set(sys.stdlib_module_names) - {{"this", "antigravity"}})
tried = 0
others = ["torchvision.io", "timm.data", "torch.utils.cpp_extension", "effnet_kernels.tools.tune", "", "."]
for module in [*names, *others]:
    for qualified in ("main", "Popen", "__builtins__", "__loader__.load_module", ""):
        try:
            getattr(accelerated_classes, f"{{module}}:{{qualified}}".replace(".", "/"))
        except AttributeError:
            tried += 1
        else:
            raise SystemExit(f"found {{module}}:{{qualified}}")
assert set(sys.modules) == before, set(sys.modules) - before
print(tried)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


@pytest.mark.parametrize("name", ["", ":", "::", "/", "a", "subprocess", "subprocess/Popen", "subprocess:Popen:x"])
@pytest.mark.parametrize("suffix", ["", ":", "/:", ":/", ":\x00", ":\udcff", ":__class__/__subclasses__"])
def test_names_of_no_form_are_refused(name: str, suffix: str) -> None:
    with pytest.raises(AttributeError):
        reach(name + suffix)


def test_a_modules_own_lookup_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_anything(name: str) -> object:
        raise SystemExit(f"{name} was looked up")

    lazy = ModuleType("lazy")
    lazy.__getattr__ = import_anything  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    with pytest.raises(AttributeError):
        reach("lazy:Popen")


@pytest.mark.parametrize("known", KNOWN)
def test_every_class_of_the_tables_is_found(known: str) -> None:
    path, _, name = known.rpartition(".")
    pytest.importorskip(path.partition(".")[0], reason="a package of known classes is not installed")
    found = reach(name_in(path, name))
    assert is_accelerated(found)
    assert found.original is getattr(importlib.import_module(path), name)
    assert pickle.loads(pickle.dumps(found)) is found


def test_a_derived_class_is_found_once_its_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    mbconv = pytest.importorskip("torchvision.models.efficientnet", reason="torchvision is not installed").MBConv
    module = ModuleType("blocks_of_mine")
    module.Tagged = type("Tagged", (mbconv,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    module.Other = type("Other", (nn.Module,), {"forward": lambda self, x: x})  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        reach("blocks_of_mine:Tagged")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert reach("blocks_of_mine:Tagged").original is module.Tagged  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        reach("blocks_of_mine:Other")


def test_an_accelerated_class_is_not_accelerated_again() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    found = reach(name_in("torchvision.models.efficientnet", "MBConv"))
    with pytest.raises(AttributeError):
        reach(name_in(found.__module__, found.__qualname__))
