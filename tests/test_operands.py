"""Every address that a native kernel gets was checked, and every allocation says what it makes."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOLERANCES, relative_rms
from native_cases import needs_native
from torch import Tensor
from variations import misfits

import effnet_kernels
from effnet_kernels.backends.cpu import primitives
from effnet_kernels.backends.cpu.network import Network
from effnet_kernels.fusion.spec import Chain, Epilogue, Excitation, Layer, OutputGradient, Prologue

PACKAGE = Path(effnet_kernels.__file__).parent
FACTORIES = {
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "scalar_tensor", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "empty_strided", "normal"),
}
# Modules that run networks on input of their own: what they make is input, in torch's defaults as anybody's.
DRIVERS = {
    "bench.py",
    "bench_engines.py",
    "tune.py",
    "selftest.py",
    "cli.py",
    "arguments.py",
    "export.py",
    "preprocess.py",
    "factory.py",
    "predict.py",
}


def calls(names: set[str]) -> Iterator[tuple[Path, ast.Call | ast.Attribute]]:
    """Where a function of torch, or an attribute of any tensor, of these names is used in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
                yield path, node


def test_addresses_come_from_one_module() -> None:
    """On a CPU; on a GPU from the launchers, and from launch plans, which are for the strides they were made of."""
    found = {str(path.relative_to(PACKAGE)) for path, _ in calls({"data_ptr"})}
    assert found == {"backends/cpu/memory.py", "backends/triton/plans.py"}
    # The launchers' code is generated.
    mentioned = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "data_ptr()" in path.read_text()}
    assert mentioned == {"backends/cpu/memory.py", "backends/triton/launch.py", "backends/triton/plans.py"}


def test_allocations_name_dtype_and_device() -> None:
    for path, call in calls(FACTORIES):
        function = call.func
        if path.name in DRIVERS or not isinstance(function.value, ast.Name) or function.value.id != "torch":
            continue
        given = {keyword.arg for keyword in call.keywords}
        assert {"dtype", "device"} <= given, f"{path.relative_to(PACKAGE)}:{call.lineno}: torch.{function.attr}"


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def primitive_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every primitive, with every operand that it can have. The first tensor says the sizes."""
    x, y, grad = channels_last(3, 8, 5, 6), channels_last(3, 16, 5, 6), channels_last(3, 16, 5, 6)
    of_8, of_16 = (torch.rand(8) + 0.5, torch.randn(8)), (torch.rand(16) + 0.5, torch.randn(16))
    gate, drop_path_scale, weight = torch.rand(3, 8), torch.rand(3), torch.randn(16, 8, 1, 1)
    bias, mean, taps = torch.randn(16), torch.randn(8), torch.randn(8, 1, 3, 3)
    prologue = Prologue(*of_8, "silu", gate)
    gradient = OutputGradient(
        grad, y, torch.randn(3, 16), torch.rand(3, 16), drop_path_scale, torch.rand(3, 16), *of_16, "silu"
    )
    own = OutputGradient(
        channels_last(3, 8, 5, 6), x, torch.randn(3, 8), gate, drop_path_scale, torch.rand(3, 8), *of_8, "relu6"
    )
    w1, b1, w2, b2 = torch.randn(4, 8), torch.randn(4), torch.randn(8, 4), torch.randn(8)
    partials, five = torch.rand(2, 3, 8) + 0.5, torch.randn(3, 2, 5, 8)
    stem, image = torch.randn(16, 3, 3, 3), channels_last(3, 3, 9, 8)
    of_stem = OutputGradient(channels_last(3, 16, 5, 4), channels_last(3, 16, 5, 4), torch.randn(3, 16))
    residual = channels_last(3, 8, 5, 6)
    return {
        "pointwise_conv": (x, weight, bias, prologue, Epilogue(*of_16, "silu"), "statistics"),
        "pointwise_conv, residual": (x, weight, bias, prologue, Epilogue(*of_16, "relu", y), "none"),
        "pointwise_conv, pool": (x, weight, bias, prologue, Epilogue(*of_16, "relu"), "pool"),
        "pointwise_conv_backward": (gradient, weight, x, prologue, mean, residual, True, True, True),
        "depthwise_conv": (x, taps, 1, (1,) * 4, prologue._replace(gate=None), Epilogue(*of_8, "silu"), "statistics"),
        "depthwise_conv_backward": (own, x, taps, 1, (1,) * 4, prologue._replace(gate=None), mean, residual),
        "dense_conv": (image, stem, bias, 2, (1,) * 4, "statistics"),
        "dense_conv_backward": (of_stem, image, stem, 2, (1,) * 4, None, False, True),
        "channel_statistics": (x,),
        "merge_statistics": (partials,),
        "gradient_sums": (own, mean),
        "apply_gradient": (own, residual),
        "finalize_batch_norm": (partials, *of_8, mean.clone(), torch.rand(8), 0.1, 1e-5, False),
        "finalize_batch_norm_backward": (torch.randn(2, 2, 8), 90, of_8[0], mean, of_8[1], True),
        "squeeze": (x, prologue, residual),
        "squeeze_for_backward": (x, prologue, mean),
        "mean_of_sums": (torch.randn(3, 2, 8), 30),
        "excite": (torch.randn(3, 2, 8), 30, w1, b1, w2, b2, "silu", "sigmoid"),
        "excite_backward": (five, 30, gate, torch.randn(3, 4), w1, w2, "silu", "sigmoid"),
        "excite_backward_weight": (torch.randn(3, 8), torch.randn(3, 4), torch.randn(3, 4), gate, "silu"),
        "bn_act_add": (x, prologue, residual, drop_path_scale),
    }


def test_every_primitive_is_called() -> None:
    assert {name.split(",")[0] for name in primitive_calls()} == set(primitives.__all__)


def operands(arguments: tuple[Any, ...], path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    for index, value in enumerate(arguments):
        if isinstance(value, Tensor):
            yield (*path, index), value
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            yield from operands(value, (*path, index))


def replaced(arguments: tuple[Any, ...], path: tuple[int, ...], t: Tensor) -> tuple[Any, ...]:
    index, *rest = path
    value = replaced(arguments[index], tuple(rest), t) if rest else t
    changed = (*arguments[:index], value, *arguments[index + 1 :])
    return type(arguments)(*changed) if hasattr(arguments, "_fields") else changed


def function_of(name: str) -> Callable[..., Any]:
    return getattr(primitives, name.split(",")[0])


def flat(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


# Dimensions that may have any size: of partial results, and of what a weight's gradient is taken of.
FREE = {
    "mean_of_sums": {(0,)},
    "excite": {(0,), (2,)},
    "excite_backward": {(0,)},
    "excite_backward_weight": {(0,), (1,)},
    "finalize_batch_norm_backward": {(0,)},
}


def is_map(operand: Tensor) -> bool:
    return operand.dim() == 4 and not operand.is_contiguous()


# Those that begin with operators of torch, which crash on freed memory themselves.
TORCHS_OWN = {"dense_conv", "dense_conv_backward"}


@needs_native
@pytest.mark.parametrize("name", primitive_calls())
def test_a_primitive_refuses_operands_that_do_not_fit(name: str) -> None:
    torch.manual_seed(0)
    arguments = primitive_calls()[name]
    function = function_of(name)
    # What is updated in place is put back before each call.
    kept = [t.clone() for _, t in operands(arguments)]
    expected = [t.clone() for t in flat(function(*arguments))]
    for number, (path, operand) in enumerate(operands(arguments)):
        for what, wrong in misfits(operand):
            for (_, t), before in zip(operands(arguments), kept, strict=True):
                t.copy_(before)
            if what == "freed" and name.split(",")[0] in TORCHS_OWN:
                continue
            # Who calls a primitive gives it parameters and vectors in memory; of maps it is asked once more.
            if what == "negated lazily" and not is_map(operand):
                continue
            defines_sizes = number == 0 or path in FREE.get(name, set())
            if defines_sizes and wrong.shape != operand.shape:
                continue
            case = f"{name}: operand {path} of shape {tuple(operand.shape)}, {what}"
            try:
                actual = flat(function(*replaced(arguments, path, wrong)))
            except (ValueError, RuntimeError):
                continue
            right_values = expected
            if what == "a lazy zero":
                right_values = flat(function(*replaced(arguments, path, torch.zeros_like(operand))))
            for ours, right in zip(actual, right_values, strict=True):
                assert ours.dtype == right.dtype, case
                assert ours.shape == right.shape, case
                assert relative_rms(ours, right) <= TOLERANCES[right.dtype], case


def layers() -> list[Layer]:
    w1, w2 = torch.randn(4, 16, 1, 1), torch.randn(16, 4, 1, 1)
    excitation = Excitation(w1, torch.randn(4), w2, torch.randn(16), "silu")
    around = (1, 1, 1, 1)
    return [
        Layer("dense", torch.randn(16, 3, 3, 3), torch.randn(16), 2, around, act="silu"),
        Layer("depthwise", torch.randn(16, 1, 3, 3), torch.randn(16), 1, around, act="silu", excitation=excitation),
        Layer("pointwise", torch.randn(16, 16, 1, 1), torch.randn(16)),
    ]


def network_of(layers: list[Layer]) -> Network:
    """The first layer, and the others with a residual around them."""
    return Network([Chain((layers[0],)), Chain(tuple(layers[1:]), residual=True)], [1])


@needs_native
def test_a_network_refuses_weights_that_do_not_fit() -> None:
    made = layers()
    for index, layer in enumerate(made):
        for path, operand in operands(tuple(layer)):
            for what, wrong in misfits(operand):
                # Weights are converted as they are packed.
                if wrong.shape == operand.shape or (index == 0 and path == (1,) and "dimension 1 " in what):
                    continue
                changed = list(made)
                changed[index] = Layer(*replaced(tuple(layer), path, wrong))
                with pytest.raises((ValueError, IndexError)):
                    network_of(changed)


@needs_native
def test_a_network_refuses_images_that_do_not_fit() -> None:
    network, x = network_of(layers()), torch.randn(2, 3, 9, 8)
    (expected,) = network.run(x)
    for what, wrong in misfits(x):
        # Images may have any batch and size.
        if what.startswith("dimension") and "dimension 1" not in what:
            continue
        if what in ("a lazy zero", "negated lazily"):
            right = torch.zeros_like(x) if what == "a lazy zero" else x
            assert torch.equal(network.run(wrong)[0], network.run(right)[0]), what
            continue
        with pytest.raises(ValueError, match="expected"):
            network.run(wrong)
    assert torch.equal(network.run(x)[0], expected)
