"""Launch plans on a driver that launches nothing; ``tests/gpu/test_plans.py`` compares what they compute."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_kernels import freeze
from effnet_kernels.backends import triton
from effnet_kernels.backends.triton import plans
from effnet_kernels.modules import MBConvConfig

pytestmark = pytest.mark.skipif(triton.unavailable_reason() is not None, reason=f"{triton.unavailable_reason()}")

ADDRESSES = 1 << 20  # no scalar is larger, and every address is


@pytest.fixture
def driver() -> Iterator[Any]:
    from stub_driver import models_on

    with models_on() as driver:
        yield driver


def block() -> nn.Module:
    config = MBConvConfig(6, 3, 1, 16, 16, 1)
    return config.block(config, 0.2, nn.BatchNorm2d)


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()


def launched(driver: Any, call: Any) -> list[tuple[Any, ...]]:
    """The launches of a call: their grids and all arguments, with None for an address."""
    driver.launched.clear()
    call()
    return [
        tuple(None if isinstance(a, Tensor) or (type(a) is int and a > ADDRESSES) else a for a in (*row[:6], *row[9:]))
        for row in driver.launched
    ]


def plans_of(module: nn.Module) -> dict[Any, Any]:
    kept = module.lowered().plans._plans
    return {key: plan for key, plan in kept.items() if callable(plan)}


def test_a_plan_makes_the_launches_of_the_pass_it_was_recorded_from(driver) -> None:
    module, x = block(), image(2, 16, 14, 14)
    grad = image(2, 16, 14, 14).detach()
    first, second, third = (launched(driver, lambda: module(x).backward(grad)) for _ in range(3))
    assert len(plans_of(module)) == 2
    assert len(first) > 20
    assert first == second == third
    module.eval()
    with torch.no_grad():
        first, second, third = (launched(driver, lambda: module(x)) for _ in range(3))
    assert len(plans_of(module)) == 1
    assert first == second == third


def test_each_layout_has_its_own_plan(driver) -> None:
    module = block()
    expected = {}
    for _ in range(3):
        for size in (14, 7):
            x = image(2, 16, size, size)
            rows = launched(driver, lambda x=x: module(x))
            assert expected.setdefault(size, rows) == rows
    assert expected[14] != expected[7]
    assert len(plans_of(module)) == 2
    for size in range(8, 8 + plans.MAX_PLANS):
        module(image(1, 16, size, size))
    assert len(module.lowered().plans._plans) <= plans.MAX_PLANS


def test_a_plan_reads_parameters_where_they_are(driver) -> None:
    module, x = block(), image(2, 16, 14, 14)
    for _ in range(3):
        module(x)
    weight = next(m for m in module.modules() if isinstance(m, nn.Conv2d)).weight
    weight.data = weight.detach().clone()
    driver.launched.clear()
    module(x)
    assert any(weight.data_ptr() in row for row in driver.launched)
    assert len(plans_of(module)) == 1


@pytest.mark.parametrize("change", ["dtype", "strides", "address", "negation"])
def test_a_plan_is_for_the_tensors_that_it_fits(driver, change: str) -> None:
    module, x = block(), image(2, 16, 14, 14)
    if change == "dtype":
        # They go with weights in float32 and with those in their own dtype.
        x = x.detach().half()
    for _ in range(3):
        module(x)
    weight = module.block[0].conv.weight
    expected = launched(driver, lambda: module(x))
    if change == "dtype":
        weight.data = weight.detach().half()
    elif change == "strides":
        weight.data = torch.randn(16, 96, 1, 1).transpose(0, 1)
    elif change == "address":
        weight.data = torch.randn(96 * 16 + 1)[1:].view(96, 16, 1, 1)
    else:
        weight.data = torch.randn(96, 16, 1, 1, dtype=torch.complex64).conj().imag
        assert weight.is_neg()
    calls = []
    kept = module.lowered().plans
    for plan_key, plan in plans_of(module).items():
        kept._plans[plan_key] = lambda *given, plan=plan: calls.append(plan(*given)) or calls[-1]
    (recent,) = kept._recent.values()
    kept._recent["forward", False] = recent._replace(plan=next(iter(plans_of(module).values())))
    rows = launched(driver, lambda: module(x))
    assert len(rows) == len(expected)
    if change in ("strides", "negation"):
        # It gets a copy that fits.
        assert len(calls) == 1
        assert calls[0] is not None
    else:
        assert calls == ([None] if change == "address" else [])


def test_a_plan_that_comes_again_is_not_looked_up(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, other = block(), image(2, 16, 14, 14), image(3, 16, 14, 14)
    for given in (x, x, x, other, other, other):
        module(given)
    looked_up = []
    layouts = plans._layouts
    monkeypatch.setattr(plans, "_layouts", lambda given: looked_up.append(len(given)) or layouts(given))
    rows = launched(driver, lambda: module(other))
    assert not looked_up
    # Only the last layout is found without a look.
    assert launched(driver, lambda: module(x)) != rows
    assert len(looked_up) == 1
    module(x)
    assert len(looked_up) == 1
    # Without torch's comparison each is looked up.
    monkeypatch.setattr(plans, "TensorGuards", None)
    module.lowered().plans._recent.clear()
    assert launched(driver, lambda: module(other)) == rows
    assert launched(driver, lambda: module(other)) == rows
    assert len(looked_up) == 3


def test_a_gradient_in_other_strides_is_not_read_as_the_planned_one(driver) -> None:
    module, x, grad = block(), image(2, 16, 14, 14), image(2, 16, 14, 14).detach()
    for _ in range(3):
        module(x).backward(grad)
    y = module(x)
    driver.launched.clear()
    y.backward(grad)
    assert any(grad.data_ptr() in row for row in driver.launched)
    y, other = module(x), grad.contiguous()
    driver.launched.clear()
    y.backward(other)
    assert len(driver.launched) > 10
    assert not any(other.data_ptr() in row for row in driver.launched), "a kernel read rows of pixels as channels"


def test_nobody_who_looks_at_launches_misses_one(driver) -> None:
    from effnet_kernels.backends.triton.configs import tuned_configs
    from effnet_kernels.backends.triton.launch import capture_launches, timed_by

    module, x = block(), image(2, 16, 14, 14)
    for _ in range(3):
        module(x)
    expected = launched(driver, lambda: module(x))
    with capture_launches() as captured:
        module(x)
    timed = []
    with timed_by(lambda kernel, run: timed.append(kernel)):
        module(x)
    assert len(captured) == len(timed) == len(expected)
    with tuned_configs.override(lambda key, tile: tile | {"block_k": 64} if "gemm" in key else tile):
        assert launched(driver, lambda: module(x)) != expected
    tuned_configs.clear_caches()
    before = len(module.lowered().plans._plans)
    module(x)
    assert len(module.lowered().plans._plans) == before + 1, "another file of tuned configs may be another plan"


def test_a_pass_in_which_torch_computes_is_not_repeated(driver) -> None:
    kept, x = plans.Plans(), torch.randn(4)
    numbers = iter(range(10))
    for _ in range(4):
        (y,) = kept.run(("sum",), [x], lambda: [x + next(numbers)])
    assert torch.equal(y, x + 3)
    assert list(kept._plans.values()) == [plans._State.REFUSED]


def test_tensors_that_share_memory_are_not_planned(driver) -> None:
    from effnet_kernels.backends.triton.bn_act_add import bn_act_add
    from effnet_kernels.fusion.spec import Prologue

    kept, x = plans.Plans(), image(2, 16, 7, 7).detach()
    for _ in range(3):
        kept.run((), [x, x], lambda: [bn_act_add(x, Prologue(), x, None)])
    assert list(kept._plans.values()) == [plans._State.REFUSED]


def test_an_engine_has_plans_that_are_not_written(driver) -> None:
    import copy
    import pickle

    from effnet_kernels import EfficientNet

    model = EfficientNet([MBConvConfig(1, 3, 1, 32, 16, 1)], 0.0, num_classes=4, last_channel=32).eval()
    engine = freeze(model, verify=False)
    x = image(1, 3, 32, 32).detach()
    for _ in range(3):
        engine.folded(x)
    # The stem's convolution is torch's; all behind it is one plan.
    stem, rest = engine.folded._current().sequences[0]._runs
    assert [callable(plan) for plan in rest.plans._plans.values()] == [True]
    assert not stem.plans._plans
    assert len(rest.chains) == 2
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.folded._assembled is None


def test_parts_of_a_workspace_that_are_used_at_once_do_not_overlap() -> None:
    draw = random.Random(0)
    for _ in range(200):
        sizes = {index: draw.randint(1, 5000) for index in range(draw.randint(0, 12))}
        spans = {index: (start := draw.randint(0, 10), start + draw.randint(0, 5)) for index in sizes}
        offsets, end = plans._place(sizes, spans)
        assert all(offset % 256 == 0 and offset + sizes[index] <= end for index, offset in offsets.items())
        for one in sizes:
            for other in sizes:
                meet = spans[one][0] <= spans[other][1] and spans[other][0] <= spans[one][1]
                apart = offsets[one] + sizes[one] <= offsets[other] or offsets[other] + sizes[other] <= offsets[one]
                assert one == other or apart or not meet
    one_after_another = {index: (2 * index, 2 * index + 1) for index in range(5)}
    assert plans._place(dict.fromkeys(range(5), 1000), one_after_another)[1] == 1024
