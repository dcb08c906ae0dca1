"""Launch plans: what a chain's pass launches, recorded once and repeated without the Python that decided it.

To choose tiles, build arguments and look up a binary costs the host more than the launch itself, and a training step
makes hundreds of launches. All of that depends on the settings of a pass and on the layout of its tensors, not on their
values or addresses. So a pass that comes again is recorded, and from then on its plan allocates, adds offsets to
addresses, and launches (:mod:`.plan_launches`).
"""

import enum
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_kernels.backends.triton.plan_launches import Parameter, PlannedLaunch, run_of

try:
    # torch's own comparison of tensors' layouts, in C++, for which there is no public name.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

Tensors = list[Tensor | None]
Plan = Callable[..., Tensors | None]
"""From the tensors that a pass reads, without those that are None, to its outputs; None where an address is not a
multiple of 16, which the binaries expect."""

# The most plans that a chain keeps: with more layouts than this, say of image sizes, it starts again.
MAX_PLANS = 32
# Of addresses that binaries are compiled for, and of parts of a workspace.
_ALIGNMENT, _WORKSPACE_ALIGNMENT = 16, 256
# Operations that read and write no values.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_VIEWS = {
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t", "transpose"),
    *("unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias"),
}


class _State(enum.Enum):
    """Of a pass without a plan."""

    NEW = enum.auto()
    CAME_ONCE = enum.auto()
    REFUSED = enum.auto()


class _Recent(NamedTuple):
    """The last plan that a pass with some settings took, and what tells quickly whether it takes that one again."""

    circumstances: tuple[Any, ...]
    absent: list[bool]  # which of the tensors are None
    have_their_layouts: Callable[..., bool]  # of the others, of which there must be as many
    plan: Plan


class Plans:
    """The launch plans of one chain, by the settings of a pass and the layout of its tensors."""

    def __init__(self) -> None:
        self._plans: dict[tuple[Any, ...], Plan | _State] = {}
        self._recent: dict[tuple[Any, ...], _Recent] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied or pickled without its plans, which hold kernels that were loaded in this process."""
        return Plans, ()

    def run(
        self, settings: tuple[Any, ...], tensors: Sequence[Tensor | None], compute: Callable[[], Tensors]
    ) -> Tensors:
        """What ``compute()`` returns, by its plan where there is one.

        Args:
            settings: all that ``compute`` depends on beside the tensors and what the chain is.
            tensors: all that it reads, and those that it writes in place.
            compute: launches kernels that depend on no tensor's values.
        """
        given = [t for t in tensors if t is not None]
        circumstances = _circumstances(given[0])
        if circumstances is None:
            return compute()
        absent = [t is None for t in tensors]
        recent = self._recent.get(settings)
        if recent is not None and recent[:2] == (circumstances, absent) and recent.have_their_layouts(*given):
            return _repeat(recent.plan, given, compute)
        if any(map(Tensor.is_neg, given)) or any(map(Tensor._is_zerotensor, given)):
            return compute()
        key = (settings, circumstances, tuple(absent), *_layouts(given))
        plan = self._plans.get(key, _State.NEW)
        if callable(plan):
            have_their_layouts = _comparison_with(given)
            if have_their_layouts is not None:
                self._recent[settings] = _Recent(circumstances, absent, have_their_layouts, plan)
            return _repeat(plan, given, compute)
        if plan is _State.CAME_ONCE:
            outputs, made = _record(given, compute)
            self._plans[key] = made or _State.REFUSED
            return outputs
        if plan is _State.NEW:
            # A layout that never comes again is not worth a plan, and kernels are compiled in the first pass.
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = _State.CAME_ONCE
        return compute()


def _comparison_with(given: list[Tensor]) -> Callable[..., bool] | None:
    """Whether as many tensors have the layouts of these, as a function, or None where torch has none."""
    if TensorGuards is None:
        return None
    try:
        # For the classes, dispatch keys, dtypes, devices, sizes and strides, and for whether they require gradients.
        return TensorGuards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except TypeError:
        # Its arguments are no promise of torch's.
        return None


def _repeat(plan: Plan, given: list[Tensor], compute: Callable[[], Tensors]) -> Tensors:
    outputs = plan(*given)
    return compute() if outputs is None else outputs


def _circumstances(x: Tensor) -> tuple[Any, ...] | None:
    """What decides a pass's launches beside layouts, or None where they are not plain ones on the current device."""
    launch, target_of, tuned_configs = _modules()
    if not launch.runs_plainly() or tuned_configs.is_overridden() or x.get_device() != torch.cuda.current_device():
        return None
    return target_of(x), tuned_configs.generation(), launch.dot_precision(x.dtype)


def _layouts(given: list[Tensor]) -> tuple[tuple[Any, ...], ...]:
    return (
        tuple(map(Tensor.size, given)),
        tuple(map(Tensor.stride, given)),
        tuple([t.dtype for t in given]),
        tuple(map(Tensor.get_device, given)),
    )


@functools.cache
def _modules() -> tuple[Any, Any, Any]:
    """What imports Triton, which machines without a GPU need not have."""
    from effnet_kernels.backends.triton import launch
    from effnet_kernels.backends.triton.configs import target_of, tuned_configs

    return launch, target_of, tuned_configs


class _Watch(TorchDispatchMode):
    """Notes allocations, and whether torch computes anything itself."""

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[Tensor] = []
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _ALLOCATIONS:
            self.allocations.append(result)
        elif name not in _VIEWS and not (name == "fill_" and self._is_new(args[0])):
            self.computes = True
        return result

    def _is_new(self, t: Tensor) -> bool:
        """Whether a tensor has just been allocated: with deterministic algorithms torch fills it then."""
        return bool(self.allocations) and t.data_ptr() == self.allocations[-1].data_ptr() and _fills_memory()


def _fills_memory() -> bool:
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return torch.are_deterministic_algorithms_enabled() and fills


class _Place(NamedTuple):
    """An address: an offset in bytes from the start of a tensor that is read, or of an allocation."""

    base: str
    number: int
    offset: int


class _Memory:
    """Where the addresses of a recorded pass point to."""

    def __init__(self, given: Sequence[Tensor], allocations: Sequence[Tensor]) -> None:
        self.ranges: list[tuple[int, int, str, int]] = []
        for index, t in enumerate(given):
            extent = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
            self.ranges.append((t.data_ptr(), t.data_ptr() + extent * t.element_size(), "t", index))
        for index, t in enumerate(allocations):
            start = t.untyped_storage().data_ptr()
            self.ranges.append((start, start + t.untyped_storage().nbytes(), "a", index))
        self.ranges.sort()

    def is_clear(self) -> bool:
        """Whether no two ranges overlap and all begin at an aligned address."""
        pairs = zip(self.ranges, self.ranges[1:], strict=False)
        return all(start % _ALIGNMENT == 0 for start, *_ in self.ranges) and all(a[1] <= b[0] for a, b in pairs)

    def find(self, address: int) -> _Place | None:
        for start, end, base, index in self.ranges:
            if start <= address < end:
                return _Place(base, index, address - start)
        return None


def _record(given: list[Tensor], compute: Callable[[], Tensors]) -> tuple[Tensors, Plan | None]:
    """What ``compute()`` returns, and its plan; None where it does more than allocate and launch."""
    launch, *_ = _modules()
    with launch.record_launches() as launches, _Watch() as watch:
        outputs = compute()
    handles = launches.handles()
    if watch.computes or None in handles:
        return outputs, None
    memory = _Memory(given, watch.allocations)
    if not memory.is_clear():
        return outputs, None
    # The allocator has given no address to two tensors, because all of the pass are still held.
    return outputs, _plan(given, watch.allocations, list(zip(launches, handles, strict=True)), memory, outputs)


def _plan(
    given: list[Tensor], allocations: list[Tensor], launches: list[tuple[Any, Any]], memory: _Memory, outputs: Tensors
) -> Plan | None:
    """The plan of a recorded pass, whose ``launches`` are pairs of a launch and its handle."""
    owned = _owned(given, allocations, memory, outputs)
    used = _uses(launches, memory)
    if owned is None or used is None:
        return None
    sizes = {index: allocations[index].untyped_storage().nbytes() for index in used if index not in owned}
    offsets, workspace = _place(sizes, used)
    # The addresses that a call has: of what is given, of the outputs, and of the workspace.
    numbers = {index: len(given) + k for k, index in enumerate(owned)}

    def parameter(argument: Any) -> Parameter:
        if not isinstance(argument, Tensor):
            return Parameter(argument)
        place = memory.find(argument.data_ptr())
        assert place is not None
        if place.base == "t":
            return Parameter(place.offset, place.number)
        if place.number in owned:
            return Parameter(place.offset, numbers[place.number])
        return Parameter(offsets[place.number] + place.offset, len(given) + len(owned))

    planned = [
        PlannedLaunch(launch, handle, {name: parameter(value) for name, value in launch.arguments.items()})
        for launch, handle in launches
    ]
    run = run_of(planned)
    made = [(tuple(t.shape), tuple(t.stride()), t.dtype) for t in owned.values()]
    sources = [_source(output, given, owned, numbers) for output in outputs]
    device, index = given[0].device, given[0].get_device()
    empty_strided, empty, raw_stream = torch.empty_strided, torch.empty, torch._C._cuda_getCurrentRawStream

    def plan(*given: Tensor) -> Tensors | None:
        used = [*given]
        for shape, strides, dtype in made:
            used.append(empty_strided(shape, strides, dtype=dtype, device=device))
        if workspace:
            used.append(empty(workspace, dtype=torch.uint8, device=device))
        addresses = [t.data_ptr() for t in used]
        if functools.reduce(operator.or_, addresses) & (_ALIGNMENT - 1):
            return None
        run(raw_stream(index), addresses)
        return [None if source is None else used[source] for source in sources]

    return plan


def _owned(
    given: list[Tensor], allocations: list[Tensor], memory: _Memory, outputs: Tensors
) -> dict[int, Tensor] | None:
    """Which allocations are outputs, and these outputs; None where an output is only a part of one."""
    owned: dict[int, Tensor] = {}
    for output in outputs:
        if output is None or any(output is t for t in given):
            continue
        place = memory.find(output.data_ptr())
        if place is None or place.base != "a" or place.offset or place.number in owned:
            return None
        if output.numel() * output.element_size() != allocations[place.number].untyped_storage().nbytes():
            return None
        owned[place.number] = output
    return owned


def _source(
    output: Tensor | None, given: list[Tensor], owned: dict[int, Tensor], numbers: dict[int, int]
) -> int | None:
    """The number of an output among the tensors that a call of the plan has."""
    if output is None:
        return None
    same = [number for number, t in enumerate(given) if t is output]
    return same[0] if same else next(numbers[index] for index, t in owned.items() if t is output)


def _uses(launches: list[tuple[Any, Any]], memory: _Memory) -> dict[int, tuple[int, int]] | None:
    """The first and the last launch between which each allocation holds values; None with other memory."""
    spans: dict[int, tuple[int, int]] = {}
    for number, (launch, _) in enumerate(launches):
        for argument in launch.arguments.values():
            if not isinstance(argument, Tensor):
                continue
            place = memory.find(argument.data_ptr())
            if place is None:
                return None
            if place.base == "a":
                spans[place.number] = spans.get(place.number, (number, 0))[0], number
    return spans


def _place(sizes: dict[int, int], spans: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """An offset in one workspace for each allocation, and the workspace's size.

    Those whose spans do not meet share memory. The largest are placed first, each where it fits lowest.
    """
    offsets: dict[int, int] = {}
    end = 0
    for index in sorted(sizes, key=lambda index: -sizes[index]):
        first, last = spans[index]
        size = -(-sizes[index] // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if spans[other][0] <= last and first <= spans[other][1]
        )
        offset = 0
        for start, stop in taken:
            if offset + size <= start:
                break
            offset = max(offset, -(-stop // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT)
        offsets[index] = offset
        end = max(end, offset + size)
    return offsets, end
