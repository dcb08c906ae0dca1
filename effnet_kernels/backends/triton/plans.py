"""Launch plans: what a chain's pass launches, recorded once and repeated without the Python that decided it.

To choose tiles, build arguments and look up a binary costs the host more than the launch itself, and a training step
makes hundreds of launches. All of that depends on the settings of a pass and on the layout of its tensors, not on their
values or addresses. So a pass that comes again is recorded, and from then on a function is called that has been
generated for it: it allocates, adds offsets to addresses, and launches.
"""

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class Plans:
    """The launch plans of one chain, by the settings of a pass and the layout of its tensors."""

    def __init__(self) -> None:
        self._plans: dict[tuple[Any, ...], Plan | _State] = {}

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
        key = _key(settings, tensors, given)
        if key is None:
            return compute()
        plan = self._plans.get(key, _State.NEW)
        if callable(plan):
            outputs = plan(*given)
            return compute() if outputs is None else outputs
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


def _key(settings: tuple[Any, ...], tensors: Sequence[Tensor | None], given: list[Tensor]) -> tuple[Any, ...] | None:
    """What decides a pass's launches, or None where they are not the plain ones of the current device."""
    launch, target_of, tuned_configs = _modules()
    x = given[0]
    if not launch.runs_plainly() or tuned_configs.is_overridden() or x.get_device() != torch.cuda.current_device():
        return None
    if any(map(Tensor.is_neg, given)) or any(map(Tensor._is_zerotensor, given)):
        return None
    return (
        settings,
        target_of(x),
        tuned_configs.generation(),
        launch.dot_precision(x.dtype),
        tuple([t is None for t in tensors]),
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
    # Allocations and launches refer to all memory of the pass, so that no address in it was used twice.
    return outputs, _Writer(given, watch.allocations, list(zip(launches, handles, strict=True)), memory).plan(outputs)


class _Writer:
    """Writes a plan as a function in Python."""

    def __init__(
        self, given: list[Tensor], allocations: list[Tensor], launches: list[tuple[Any, Any]], memory: _Memory
    ) -> None:
        """``launches`` are pairs of a launch and its handle."""
        self.given, self.allocations, self.launches, self.memory = given, allocations, launches, memory
        self.names: dict[str, Any] = {
            "empty_strided": torch.empty_strided,
            "empty": torch.empty,
            "uint8": torch.uint8,
            "device": given[0].device,
            "index": given[0].get_device(),
            "bindings": torch._C,
        }

    def plan(self, outputs: Tensors) -> Plan | None:
        returned = self._outputs(outputs)
        used = self._uses()
        if returned is None or used is None:
            return None
        results, owned = returned
        workspace = {index: span for index, span in used.items() if index not in owned}
        offsets, size = _pack({index: self._bytes(index) for index in workspace}, workspace)
        lines = [f"a{index} = o{index}.data_ptr()" for index in owned]
        if size:
            lines.append(f"w = empty({size}, dtype=uint8, device=device)")
            lines.append("w_address = w.data_ptr()")
        lines += [f"t{index}_address = t{index}.data_ptr()" for index in range(len(self.given))]
        addresses = [f"t{index}_address" for index in range(len(self.given))]
        addresses += [f"a{index}" for index in owned] + (["w_address"] if size else [])
        lines.append(f"if ({' | '.join(addresses)}) & {_ALIGNMENT - 1}: return None")
        lines.append("stream = bindings._cuda_getCurrentRawStream(index)")
        lines += [self._call(number, *pair, offsets) for number, pair in enumerate(self.launches)]
        made = [f"o{index} = {self._made(index, outputs[at])}" for index, at in owned.items()]
        body = "\n    ".join([*made, *lines, f"return [{', '.join(results)}]"])
        parameters = ", ".join(f"t{index}" for index in range(len(self.given)))
        exec(compile(f"def plan({parameters}):\n    {body}\n", "<launch plan>", "exec"), self.names)
        return cast(Plan, self.names["plan"])

    def _outputs(self, outputs: Tensors) -> tuple[list[str], dict[int, int]] | None:
        """The outputs as expressions, and which allocations are outputs, with the number of the output."""
        results: list[str] = []
        owned: dict[int, int] = {}
        for number, output in enumerate(outputs):
            if output is None:
                results.append("None")
                continue
            same = [index for index, t in enumerate(self.given) if t is output]
            if same:
                results.append(f"t{same[0]}")
                continue
            place = self.memory.find(output.data_ptr())
            whole = place is not None and place.base == "a" and place.offset == 0 and place.number not in owned
            if place is None or not whole or output.numel() * output.element_size() != self._bytes(place.number):
                return None
            owned[place.number] = number
            results.append(f"o{place.number}")
        return results, owned

    def _uses(self) -> dict[int, tuple[int, int]] | None:
        """The first and the last launch between which each allocation holds values."""
        spans: dict[int, tuple[int, int]] = {}
        for number, (launch, _) in enumerate(self.launches):
            for argument in launch.arguments.values():
                if not isinstance(argument, Tensor):
                    continue
                place = self.memory.find(argument.data_ptr())
                if place is None:
                    return None
                if place.base == "a":
                    spans[place.number] = spans.get(place.number, (number, 0))[0], number
        return spans

    def _bytes(self, index: int) -> int:
        return self.allocations[index].untyped_storage().nbytes()

    def _made(self, index: int, output: Tensor | None) -> str:
        assert output is not None
        self.names[f"dtype{index}"] = output.dtype
        shape, strides = tuple(output.shape), tuple(output.stride())
        return f"empty_strided({shape}, {strides}, dtype=dtype{index}, device=device)"

    def _call(self, number: int, launch: Any, handle: Any, offsets: dict[int, int]) -> str:
        """A launch as a call of Triton's own launcher."""
        _, execute, binary, metadata, kept = handle
        names = {f"execute{number}": execute, f"binary{number}": binary, f"metadata{number}": metadata}
        self.names |= names | {f"kept{number}": kept}
        arguments = [
            self._argument(f"{name}{number}", value, offsets)
            for name, value in [*launch.arguments.items(), *launch.constants.items()]
        ]
        grid = ", ".join(map(str, launch.grid))
        return (
            f"execute{number}({grid}, stream, binary{number}, metadata{number}, None, None, None, "
            f"{', '.join(arguments)})"
        )

    def _argument(self, name: str, value: Any, offsets: dict[int, int]) -> str:
        if isinstance(value, Tensor):
            place = self.memory.find(value.data_ptr())
            assert place is not None
            if place.base == "t":
                start, offset = f"t{place.number}_address", place.offset
            elif place.number in offsets:
                start, offset = "w_address", offsets[place.number] + place.offset
            else:
                start, offset = f"a{place.number}", place.offset
            return f"{start} + {offset}" if offset else start
        if value is None or type(value) in (int, bool):
            return repr(value)
        self.names[name] = value
        return name


def _pack(sizes: dict[int, int], spans: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
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
