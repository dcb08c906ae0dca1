"""Checkpoints as people have them: wrapped, prefixed, with other heads and stems, with a tensor that does not fit."""

import contextlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize
from torch import Tensor

import effnet_kernels as ek
from effnet_kernels.models.efficientnet import EfficientNet
from effnet_kernels.models.factory import build
from effnet_kernels.models.variants import VARIANTS
from effnet_kernels.models.weights.convert import convert_state_dict, load_checkpoint
from effnet_kernels.models.weights.formats import FORMATS
from effnet_kernels.models.weights.wrappers import unwrap

pytestmark = pytest.mark.usefixtures("one_thread")

ENTRIES = ["state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module"]
ENTRIES += ["state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"]
PREFIXES = ["", "module.", "model.", "net.", "network.", "backbone.", "encoder.", "base.", "base_model.", "timm_model."]
PREFIXES += ["_orig_mod.", "module.module.", "_orig_mod.module.", "module._orig_mod.", "model.backbone.", "net.module."]
OTHERS: dict[str, Any] = {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, "loss": torch.tensor(0.5)}


@pytest.fixture(autouse=True)
def narrow_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network that builders know by the name ``narrow``."""
    first, second, third = VARIANTS["efficientnet_b0"].stages[:3]
    stages = (
        first._replace(out_channels=8),
        second._replace(input_channels=8, out_channels=16, num_layers=1),
        third._replace(input_channels=16, out_channels=24, num_layers=2),
    )
    variant = replace(VARIANTS["efficientnet_b0"], name="narrow", stages=stages, last_channel=16)
    monkeypatch.setitem(VARIANTS, "narrow", variant)


def narrow(seed: int = 0, **options: Any) -> EfficientNet:
    torch.manual_seed(seed)
    return randomize(build(VARIANTS["narrow"], **{"num_classes": 3, **options}), seed)  # type: ignore[return-value]


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model: torch.nn.Module, expected: Mapping[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def prefixed(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state_dict.items()}


def save(path: Path, contents: Any) -> Path:
    torch.save(contents, path)
    return path


# Wrappers and prefixes


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_entry_and_prefix_is_unwrapped(form: Any, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    source = convert_state_dict(narrow().state_dict(), form)
    inner = prefixed(source, prefix)
    wrapped: list[dict[str, Any]] = [inner]
    for entry in ENTRIES:
        wrapped += [{entry: inner}, {**OTHERS, entry: inner}, {"state_dict": {entry: inner}}, {"model": {entry: inner}}]
        if "ema" in entry:
            # Averaged weights are preferred, unless the entry holds something else.
            wrapped += [{"model": {"junk": torch.zeros(1)}, entry: inner}, {"model": inner, entry: {"decay": 0.99}}]
    caplog.set_level(logging.INFO, "effnet_kernels")
    for checkpoint in wrapped:
        caplog.clear()
        found = unwrap(checkpoint)
        assert list(found) == list(source)
        assert all(found[key] is source[key] for key in source)
        left_out = prefix.replace("_orig_mod.", "")
        assert (repr(left_out) in caplog.text) == (left_out != "")
    target = narrow(seed=1)
    load_checkpoint(target, {**OTHERS, "model_state_dict": {"n_averaged": torch.tensor(2), **inner}})
    assert_same(target, narrow().state_dict())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prefix", PREFIXES[1:])
def test_two_keys_for_one_tensor_are_named(form: Any, prefix: str) -> None:
    source = convert_state_dict(narrow().state_dict(), form)
    model = narrow(seed=1)
    before = snapshot(model)
    for outer in ("", "module."):
        for key in list(source)[::7]:
            given = {outer + prefix + key: torch.zeros_like(source[key]), **prefixed(source, outer)}
            with pytest.raises(ValueError, match="expected one tensor for") as caught:
                load_checkpoint(model, given)
            assert repr(outer + key) in str(caught.value)
            assert repr(outer + prefix + key) in str(caught.value)
    assert_same(model, before)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prefix", [prefix for prefix in PREFIXES[1:] if "_orig_mod" not in prefix])
def test_a_network_beside_something_else_is_named(form: Any, prefix: str) -> None:
    given = {**prefixed(convert_state_dict(narrow().state_dict(), form), prefix), "criterion.weight": torch.ones(3)}
    outer = prefix.split(".")[0] + "."
    with pytest.raises(ValueError, match=rf"got 'criterion.weight' beside \d+ under '{outer}'"):
        load_checkpoint(narrow(), given)


def test_other_entries_are_named() -> None:
    with pytest.raises(ValueError, match=r"under one of .*model_state_dict.*got OrderedDict under the key 'student'"):
        unwrap({"student": narrow().state_dict(), "epoch": 3})
    with pytest.raises(ValueError, match="got a sparse one under the key 'a'"):
        unwrap({"a": torch.zeros(2, 2).to_sparse()})


# All or nothing


class Uncopyable(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            raise RuntimeError("these numbers stay here")
        return super().__torch_function__(func, types, args, kwargs)


BAD_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "scalar": lambda x: x.flatten()[0],
    "longer": lambda x: torch.cat([x, x]),
    "another rank": lambda x: x[None],
    "empty": lambda x: x[:0],
    "meta": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "integers": lambda x: x.to(torch.int8),
    "booleans": lambda x: x.to(torch.bool),
    "nested": lambda x: torch.nested.nested_tensor([x.float(), x.float()]),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    "uncopyable": lambda x: x.clone().as_subclass(Uncopyable),
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
}


@pytest.mark.filterwarnings("ignore:.*(prototype|deprecated|quantiz).*")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_bad_tensor_anywhere_leaves_the_model_untouched(form: Any, kind: str) -> None:
    good = convert_state_dict(narrow().state_dict(), form)
    model = narrow(seed=1)
    before = snapshot(model)
    for key, value in good.items():
        if value.dim() == 0:
            continue
        with pytest.raises(ValueError, match=re.escape(repr(key))):
            load_checkpoint(model, {**good, key: BAD_TENSORS[kind](value)})
        assert_same(model, before)
    load_checkpoint(model, good)
    assert_same(model, narrow().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_converted(dtype: torch.dtype) -> None:
    source, model = narrow(), narrow(seed=1)
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in source.state_dict().items()}
    load_checkpoint(model, given)
    assert_same(model, {key: value.to(source.state_dict()[key].dtype) for key, value in given.items()})


# Heads


HEADS = {"torchvision": "classifier.1.", "timm": "classifier.", "lukemelas": "_fc.", "transformers": "classifier."}
PLACES = {**HEADS, "torchvision": "classifier."}


@pytest.mark.filterwarnings("ignore:the checkpoint is in")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("asked", [None, 0, 1, 3, 7])
@pytest.mark.parametrize("strict", [False, True])
def test_heads_of_every_width(tmp_path: Path, form: Any, asked: int | None, strict: bool) -> None:
    options = {} if asked is None else {"num_classes": asked}
    for classes in (0, 1, 3, 5):
        source = narrow(num_classes=classes)
        path = save(tmp_path / "a.pth", {"net": prefixed(convert_state_dict(source.state_dict(), form), "module.")})
        fits = asked in (None, 0, classes)
        if strict and not fits:
            with pytest.raises(ValueError, match=f"num_classes: expected {classes}, which the weights have, or 0, got"):
                ek.create_model("narrow", weights=path, strict=True, **options)
            continue
        torch.manual_seed(4)
        fresh = build(VARIANTS["narrow"], **options)
        torch.manual_seed(4)
        said = f"num_classes is {asked}: the backbone is loaded"
        with contextlib.nullcontext() if fits else pytest.warns(UserWarning, match=said):
            model = ek.create_model("narrow", weights=path, strict=strict, **options)
        assert model.num_classes == (classes if asked is None else asked)
        for key, value in model.state_dict().items():
            expected = fresh if not fits and key.startswith("classifier.") else source
            assert torch.equal(value, expected.state_dict()[key]), key


def other_heads(form: Any) -> dict[str, dict[str, Tensor]]:
    """Tensors of classifiers that are not one layer with a bias, or not in its place, by the keys of a format."""
    head, place = HEADS[form], PLACES[form]
    heads = {
        "no bias": {f"{head}weight": torch.ones(5, 16)},
        "no weight": {f"{head}bias": torch.ones(5)},
        "two layers": {f"{place}1.weight": torch.ones(5, 16), f"{place}4.weight": torch.ones(2, 5)},
        "a scalar": {f"{head}weight": torch.tensor(1.0), f"{head}bias": torch.tensor(1.0)},
        "other features": {f"{head}weight": torch.ones(5, 99), f"{head}bias": torch.ones(5)},
        "deep": {f"{place}fc.linear.weight": torch.ones(5, 16)},
    }
    if form == "torchvision":
        heads["a bare layer"] = {"classifier.weight": torch.ones(5, 16), "classifier.bias": torch.ones(5)}
    return heads


@pytest.mark.filterwarnings("ignore:the checkpoint is in")
@pytest.mark.parametrize("form", FORMATS)
def test_other_heads_are_never_left_out_silently(tmp_path: Path, form: Any) -> None:
    source = narrow(num_classes=0)
    for name, head in other_heads(form).items():
        path = save(tmp_path / "a.pth", {**convert_state_dict(source.state_dict(), form), **head})
        with pytest.raises(ValueError, match="only the classifier differs") as caught:
            ek.create_model("narrow", weights=path)
        assert PLACES[form] in str(caught.value), name
        with pytest.raises(ValueError, match="num_classes"):
            ek.create_model("narrow", weights=path, num_classes=8, strict=True)
        with pytest.warns(UserWarning, match="num_classes is 8: the backbone is loaded"):
            model = ek.create_model("narrow", weights=path, num_classes=8)
        pooled = ek.create_model("narrow", weights=path, num_classes=0)
        for built in (model, pooled):
            backbone = {key: value for key, value in built.state_dict().items() if key.startswith("features")}
            assert all(torch.equal(value, source.state_dict()[key]) for key, value in backbone.items())


# Stems


@pytest.mark.filterwarnings("ignore:the checkpoint is in")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("given", [1, 2, 3, 4, 5, 13])
def test_stems_of_every_width(tmp_path: Path, form: Any, given: int) -> None:
    source = narrow(in_chans=given)
    path = save(tmp_path / "a.pth", convert_state_dict(source.state_dict(), form))
    for asked in (1, 2, 3, 4, 5, 13):
        if given in (3, asked):
            model = ek.create_model("narrow", weights=path, in_chans=asked)
            assert model.in_chans == asked
            if given == asked:
                assert_same(model, source.state_dict())
        else:
            message = rf"for images of {given} channels, the model \(in_chans\) of {asked}"
            with pytest.raises(ValueError, match=message):
                ek.create_model("narrow", weights=path, in_chans=asked)


@pytest.mark.filterwarnings("ignore:the checkpoint is in")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_a_stem_that_is_none_is_named(tmp_path: Path, form: Any, in_chans: int) -> None:
    good = convert_state_dict(narrow().state_dict(), form)
    stem = next(iter(good))
    for bad in (None, torch.tensor(1.0), torch.ones(32), good[stem].flatten(1)):
        given = {**good, stem: bad} if bad is not None else {key: good[key] for key in list(good)[1:]}
        with pytest.raises(ValueError, match=re.escape(repr(stem))):
            ek.create_model("narrow", weights=save(tmp_path / "a.pth", given), in_chans=in_chans)
