"""Which backend computes what, and why.

``torch`` is a module's eager path (conv2d, batch_norm, silu as torch has them), ``reference`` the primitives in plain
PyTorch, ``cpu`` the native extension, ``triton`` the GPU kernels. ``EFFNET_KERNELS_BACKEND`` or :func:`use_backend`
forces one. A module asks at each call what its input allows (:class:`Call`); a public operator asks
:func:`operator_backend`.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from effnet_kernels.backends import cpu, triton
from effnet_kernels.backends.base import Primitives, PrimitivesBackend
from effnet_kernels.backends.scoped_value import ScopedValue

Backend = Literal["torch", "reference", "cpu", "triton"]
BACKENDS: tuple[Backend, ...] = ("torch", "reference", "cpu", "triton")

Function = TypeVar("Function", bound=Callable[..., object])

# The oldest GPUs that the Triton kernels are compiled and checked for; on older ones they run where they are forced.
OLDEST_CAPABILITY = (8, 0)
_capabilities: dict[int | None, tuple[int, int] | None] = {}
_override: ScopedValue[Backend] = ScopedValue("backend")
# The same for a tracer, which cannot look into a thread's state: of the block that was entered last in any thread.
_traced_override: Backend | None = None
_entered: list[list[Backend]] = []
# For both. A block may end anywhere in a thread, where a generator that holds one is collected.
_entering = threading.RLock()


def constant_when_traced(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which would import torch's compiler already now."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class BackendError(RuntimeError):
    """A backend that was forced, or without which the call cannot be answered, cannot run here."""


def available() -> dict[Backend, str | None]:
    """For each backend None where it can run on this machine, else why not."""
    return {
        "torch": None,
        "reference": None,
        "cpu": cpu.unavailable_reason(),
        "triton": _triton_unavailable(),
    }


def _triton_unavailable() -> str | None:
    reason = triton.unavailable_reason()
    if reason is None and not torch.cuda.is_available() and not triton.off_device():
        return "torch finds no GPU"
    return reason


def forced() -> Backend | None:
    """The backend that :func:`use_backend` or ``EFFNET_KERNELS_BACKEND`` forces, or None."""
    override = _traced_override if torch.compiler.is_compiling() else _override.get()
    name = override or os.environ.get("EFFNET_KERNELS_BACKEND")
    return _checked(name) if name else None


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Forces a backend for the calls inside the ``with`` block; raises BackendError where it cannot run at all.

    Like ``torch.autocast`` it holds for the thread of the block; torch.compile traces what runs in any other thread
    meanwhile for this backend, too. A backward pass that recomputes a forward (activation checkpointing) has to be
    started inside the block too.
    """
    global _traced_override
    with _override.bound_to(_checked(name)):
        # A list of its own, which is found among those of other threads.
        entered = [name]
        with _alone():
            _entered.append(entered)
            _traced_override = name
        try:
            yield
        finally:
            with _alone():
                _entered[:] = [other for other in _entered if other is not entered]
                _traced_override = _entered[-1][0] if _entered else None


def _alone() -> contextlib.AbstractContextManager[object]:
    """The lock of the blocks that threads are in; a tracer, which knows no locks, goes without."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _entering


@constant_when_traced
def _checked(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"expected a backend out of {', '.join(BACKENDS)}, got {name!r}")
    backend: Backend = name
    if backend not in ("torch", "reference") and (reason := available()[backend]) is not None:
        raise BackendError(f"backend {name!r} was forced but cannot run: {reason}")
    return backend


class Call(NamedTuple):
    """What a decision needs to know of a call's input; ``unusual`` is why no kernel takes an input like it, or None."""

    device: torch.device
    dtype: torch.dtype
    unusual: str | None

    @classmethod
    def of(cls, x: Tensor) -> "Call":
        """The facts of an input whose calls are not intercepted."""
        unusual = None
        if x.dim() != 4:
            unusual = f"the input has {x.dim()} dimensions, not 4"
        elif x.numel() == 0:
            unusual = "the batch is empty"
        return cls(x.device, x.dtype, unusual)

    def on_gpu(self) -> bool:
        """Whether the Triton kernels are what there is for this input's device."""
        kind = self.device.type
        return kind == "cuda" or (kind == "meta" and triton.off_device())


def interception(x: object) -> str | None:
    """Who else is looking at the calls on ``x`` (a tracer, a transform, a mode), so that only ATen may be called."""
    if torch.compiler.is_compiling():
        if isinstance(x, Tensor) and registered(x) and not _transformed():
            return None
        return "torch.compile or torch.export is tracing"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if torch.jit.is_tracing():
        return "torch.jit.trace is tracing"
    if _transformed():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    # Modes are also how launches are counted and simulated.
    modes = torch._C._len_torch_dispatch_stack() or (torch._C._len_torch_function_stack() and _is_watched())
    if modes and not triton.off_device():
        return "a torch dispatch or function mode is active"
    return None


# While torch.compile traces, a transform is active where the compiled function makes one.
@constant_when_traced
def _transformed() -> bool:
    """Whether torch.func's vmap, grad or another transform is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_watched() -> bool:
    """Whether a function mode is active other than the one by which torch.set_default_device chooses a device."""
    stack = range(torch._C._len_torch_function_stack())
    return any(type(torch._C._get_function_stack_at(index)) is not DeviceContext for index in stack)


def registered(x: Tensor) -> bool:
    """Whether what torch.compile traces for ``x`` are the registered operators; an export has torch's own alone."""
    return not _traces_eager_path() and forced() != "torch"


@constant_when_traced
def _traces_eager_path() -> bool:
    """Whether torch is exporting, or of a version whose tracer cannot follow the way to the registered operators."""
    # Asked in a constant function, because the tracers of torch 2.9 to 2.11 at least take this one for True always.
    if torch.compiler.is_exporting():
        return True
    # Before 2.11 a named tuple's properties cannot be traced; before 2.14 numbers have no value with dynamic=True.
    major, minor, *_ = torch.__version__.split(".")
    version = int(major), int(minor)
    return version < (2, 11) or (version < (2, 14) and not torch._dynamo.config.assume_static_by_default)


def is_in_bf16(x: object) -> bool:
    """Whether ``x`` is a tensor in bfloat16 on the CPU without autocast or a forced backend.

    Packed networks infer in it (:func:`infers_in_bf16`), and torch computes the rest, fastest in channels-last strides.
    A module asks this first: to find out more takes several times as long, which a small network in bfloat16 notices.
    """
    bfloat16 = isinstance(x, Tensor) and x.dtype is torch.bfloat16 and x.is_cpu
    return bfloat16 and not torch.is_autocast_enabled("cpu") and forced() is None


def infers_in_bf16() -> bool:
    """Whether packed networks compute in bfloat16 on this CPU, and autograd does not record what they would not."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and cpu.runs_bf16()


def prefers_channels_last(x: Tensor) -> bool:
    """Whether modules should get ``x`` in channels-last strides: operators may run, or torch is faster in them too."""
    if interception(x) is not None or x.dim() != 4:
        return False
    force = forced()
    if force is not None:
        return force != "torch"
    if is_in_bf16(x):
        return True
    call = Call.of(x)
    return fallback_reason(backend_for(call, None), call) is None


def global_hook() -> str | None:
    """Why no module may be left out of a call, or None: a global hook fires for each, which only its own call does."""
    return "a global module hook is registered" if _has_any_global_hook() else None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of a convolution's operands on a device, or None where it is off."""
    kind = "cuda" if device.type == "meta" else device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def chain_dtypes(backend: PrimitivesBackend, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype in which a backend computes a chain of ``x``, and that of the output.

    Both are the dtype of ``x``, or what autocast makes of it. The native kernels compute in float32 under autocast too,
    which is more exact and, on most processors, faster than torch in 16 bits. There are two exceptions: packed
    networks, and the input of :func:`effnet_kernels.fusion.forward.dtype_of_input`.
    """
    autocast = autocast_dtype(x.device)
    if autocast is None:
        return x.dtype, x.dtype
    return torch.float32 if backend == "cpu" else autocast, autocast


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off, for the device of ``x``, where it is on."""
    if autocast_dtype(x.device) is None:
        return contextlib.nullcontext()
    return torch.autocast("cuda" if x.is_meta else x.device.type, enabled=False)


def operator_backend(x: Tensor) -> PrimitivesBackend:
    """The backend that computes a public operator on the map or vector ``x``: the reference where no kernels may.

    Traced, none may: the chains alone are registered. An operator casts no maps, not even under autocast, so
    that the native kernels are for those in float32.
    """
    backend = None if torch.compiler.is_compiling() else chain_backend(x)
    if backend is None or (backend == "cpu" and x.dtype is not torch.float32):
        return "reference"
    return backend


def chain_backend(x: Tensor) -> PrimitivesBackend | None:
    """The backend that computes a chain of convolutions of ``x``, called or traced; None where torch's modules do."""
    if interception(x) is not None or x.numel() == 0:
        return None
    call, force = Call(x.device, x.dtype, None), forced()
    if force == "torch":
        return None
    backend = backend_for(call, force)
    return backend if fallback_reason(backend, call) is None else None


def primitives_of(backend: PrimitivesBackend) -> Primitives:
    """The primitives of a backend, which is imported here, as Triton's kernels want Triton."""
    if backend == "cpu":
        from effnet_kernels.backends.cpu import primitives as native

        return native
    if backend == "triton":
        from effnet_kernels.backends.triton import primitives as gpu

        return gpu
    from effnet_kernels.backends.reference import primitives as reference

    return reference


def backend_for(call: Call, force: Backend | None) -> PrimitivesBackend:
    """The backend whose primitives a call would run on: the one that is forced, or that of the input's device."""
    if force in ("reference", "cpu", "triton"):
        return force
    return "triton" if call.on_gpu() else "cpu"


def fallback_reason(backend: PrimitivesBackend, call: Call) -> str | None:
    """Why a backend's primitives cannot compute a call, or None."""
    return _FALLBACK_REASONS[backend](call)


def _reference_fallback_reason(call: Call) -> str | None:
    if call.unusual is None and not call.dtype.is_floating_point:
        return f"the reference computes in floating point, not {str(call.dtype).removeprefix('torch.')}"
    return call.unusual


def _triton_fallback_reason(call: Call) -> str | None:
    if call.unusual is not None:
        return call.unusual
    if not call.on_gpu():
        return f"no Triton kernels for {call.device.type} tensors"
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast and call.dtype == torch.float32 else call.dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels compute in float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    reason = _missing("triton")
    if reason is None and call.device.type == "cuda" and forced() != "triton":
        capability = _compute_capability(call.device.index)
        if capability is not None and capability < OLDEST_CAPABILITY:
            ours, oldest = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
            return f"the GPU has compute capability {ours}, and the Triton kernels are for {oldest} and newer"
    return reason


# Devices do not change between compiled calls, and a tracer cannot ask a driver.
@constant_when_traced
def _compute_capability(index: int | None) -> tuple[int, int] | None:
    """An NVIDIA GPU's; None of another maker's, and where launches are simulated."""
    if index not in _capabilities:
        from effnet_kernels.backends.triton import launch

        unknown = torch.version.hip is not None or launch.simulated()
        _capabilities[index] = None if unknown else torch.cuda.get_device_capability(index)
    return _capabilities[index]


def _cpu_fallback_reason(call: Call) -> str | None:
    if call.unusual is not None:
        return call.unusual
    if call.device.type != "cpu":
        return f"no kernels for {call.device.type} tensors in this version"
    # Under autocast a chain's input is cast to float32, and the parameters are in float32.
    casts = torch.is_autocast_enabled("cpu") and call.dtype in (torch.float16, torch.bfloat16)
    if call.dtype != torch.float32 and not casts:
        return f"the native kernels compute in float32, not {str(call.dtype).removeprefix('torch.')}"
    reason = _missing("cpu")
    return None if reason is None else f"the native extension is missing: {reason.splitlines()[0]}"


def bf16_fallback_reason(call: Call) -> str | None:
    """Why packed networks cannot infer a call in bfloat16, or None: they take what the primitives take in float32."""
    return _cpu_fallback_reason(call._replace(dtype=torch.float32) if infers_in_bf16() else call)


_FALLBACK_REASONS: dict[PrimitivesBackend, Callable[[Call], str | None]] = {
    "reference": _reference_fallback_reason,
    "cpu": _cpu_fallback_reason,
    "triton": _triton_fallback_reason,
}


# What is installed does not change between compiled calls, and a tracer cannot follow an import.
@constant_when_traced
def _missing(backend: Literal["cpu", "triton"]) -> str | None:
    """Why a backend's kernels cannot run on this installation, or None; it warns of it once."""
    kernels = cpu if backend == "cpu" else triton
    kernels.warn_if_unavailable()
    return kernels.unavailable_reason()
