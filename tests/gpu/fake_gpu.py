"""A pytest plugin that runs tests/gpu on tensors that only say that they are on a GPU.

    pytest -p gpu.fake_gpu tests/gpu

The simulator has all tensors in the host's memory, so that it cannot see a test, or a launch, that mixes the GPU's
tensors with the host's. Here nothing is computed, but every operation of torch and every launch checks its devices. A
value that a test looks at is made up; the first comparison of values that fails ends a test, which then counts as
passed: nothing was mixed until there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode

from effnet_kernels.backends import select
from effnet_kernels.backends.triton import configs, launch
from effnet_kernels.fusion import inspection


class ValuesNeeded(Exception):
    """A test has come to something that cannot be done without values or without a driver."""


class ValuelessMode(FakeTensorMode):
    """Fake tensors whose values, where somebody asks, are 0.0, 1 and True."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 1
        if func in (torch.ops.aten.equal.default, torch.ops.aten.allclose.default):
            if args[0].device != args[1].device:
                raise RuntimeError(f"{func} of tensors on {args[0].device} and {args[1].device}")
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)


def pytest_configure() -> None:
    """Lets torch and the package take fake tensors of the device "cuda:0" for tensors on a GPU."""
    torch.cuda.current_device = lambda: 0
    torch.Tensor.backward = _backward
    torch.autograd.backward = _autograd_backward
    torch.autograd.grad = _refuse
    torch.cuda._lazy_init = _refuse
    torch.compile = _refuse
    torch.distributed.init_process_group = _refuse
    nn.Module._apply = _apply
    FakeTensor.__deepcopy__ = _deepcopy
    interception = select.interception
    select.interception = lambda x: None if isinstance(x, FakeTensor) else interception(x)
    select._triton_unavailable = lambda: None
    select._compute_capability = lambda index: (9, 0)
    inspection.type = _type
    configs._target_of_device = lambda index: configs.H100
    launch._run = _run


@pytest.hookimpl(hookwrapper=True)
def pytest_collection_modifyitems() -> Iterator[None]:
    """Keeps the tests from being skipped for want of a GPU."""
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    yield
    torch.cuda.is_available = available


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    with ValuelessMode(allow_non_fake_inputs=True):
        outcome = yield
    if isinstance(
        outcome.exception, (AssertionError, DynamicOutputShapeException, ValuesNeeded, torch.AcceleratorError)
    ):
        outcome.force_result(True)


def _run(key: Any, kernel: Any, grid: Any, parameters: Sequence[Any], constants: Any, options: Any) -> None:
    if launch._is_empty(kernel, grid):
        return
    devices = sorted({str(p.device) for p in parameters if isinstance(p, Tensor)})
    if devices != ["cuda:0"]:
        raise RuntimeError(f"{kernel.__name__} was launched with tensors on {', '.join(devices)}")


def _type(value: object) -> type:
    """``type``, but a fake parameter's is Parameter."""
    return nn.Parameter if isinstance(value, FakeTensor) and isinstance(value, nn.Parameter) else type(value)


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``, which cannot give a fake tensor to a parameter that exists."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            moved = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
            moved.grad = None if parameter.grad is None else function(parameter.grad)
            module._parameters[name] = moved
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _deepcopy(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    copied: Tensor = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


def _backward(tensor: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    _differentiate([tensor], [gradient])


def _autograd_backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    given = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors
    _differentiate(tensors, given or [None] * len(tensors))


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise ValuesNeeded


def _differentiate(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Autograd's engine in Python; torch's own wants a GPU for tensors that say that they are on one."""
    pending: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    for output, gradient in zip(outputs, gradients, strict=True):
        gradient = torch.ones_like(output) if gradient is None else gradient
        if gradient.device != output.device:
            raise RuntimeError(f"the gradient is on {gradient.device}, its output on {output.device}")
        pending[output.grad_fn][output.output_nr] = gradient
    for node in _in_order([output.grad_fn for output in outputs]):
        received = pending.pop(node, {})
        if hasattr(node, "variable"):
            for gradient in received.values():
                _accumulate(node.variable, gradient)
            continue
        if not received:
            continue
        inputs = [received.get(index) for index in range(len(node._input_metadata))]
        with torch.no_grad():
            made, edges = _call(node, inputs)
        for (following, index), gradient in zip(edges, made, strict=True):
            if following is not None and gradient is not None:
                # An operation that broadcasts leaves the sum over the broadcast dimensions to the engine.
                gradient = gradient.sum_to_size(following._input_metadata[index].shape)
                before = pending[following].get(index)
                pending[following][index] = gradient if before is None else before + gradient


def _call(node: Any, inputs: list[Tensor | None]) -> tuple[Sequence[Tensor | None], Sequence[Any]]:
    """The gradients that a node makes of those of its outputs, and where they go."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        made = node(*inputs)
        return made if isinstance(made, tuple) else (made,), node.next_functions
    # A Function's backward has a gradient for each argument, and the node an edge for each tensor among them.
    made = node.apply(*inputs)
    made = made if isinstance(made, tuple) else (made,)
    needed = [gradient for gradient, needs in zip(made, node.needs_input_grad, strict=True) if needs]
    return needed, [edge for edge in node.next_functions if edge[0] is not None]


def _accumulate(variable: Tensor, gradient: Tensor) -> None:
    if gradient.device != variable.device:
        raise RuntimeError(f"the gradient is on {gradient.device}, its tensor on {variable.device}")
    variable.grad = gradient if variable.grad is None else variable.grad + gradient


def _in_order(roots: Sequence[Any]) -> list[Any]:
    """The nodes of a graph, each before those that it hands gradients to."""
    done: list[Any] = []
    seen = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, left = stack.pop()
        if left:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((following, False) for following, _ in node.next_functions if following is not None)
    return done[::-1]
