"""Launch traces of whole networks' steps, captured on meta tensors of full size; no kernel runs."""

import collections
import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import effnet_kernels as ek
from effnet_kernels.backends.triton.launch import Launch, capture_launches

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RESOLUTIONS = {"efficientnet_b0": 224, "efficientnet_b4": 380, "efficientnet_v2_s": 384}

# Operations that move no bytes: views and allocations.
_FREE = {
    "view", "detach", "expand", "as_strided", "slice", "select", "alias", "unsqueeze", "squeeze", "_unsafe_view", "t",
    "unbind", "permute", "transpose", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "split",
    "lift_fresh", "_reshape_alias", "reshape",
}  # fmt: skip


class TorchTraffic(TorchDispatchMode):
    """Counts the bytes that torch's own operations read and write, each tensor once an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _FREE:
            inputs = tensors((args, kwargs))
            self.bytes[name] += sum(map(size, inputs)) + sum(map(size, tensors(outputs)))
            # In training BatchNorm is two kernels, one for the statistics or sums and one that applies them.
            if name == "native_batch_norm" and args[5]:
                self.bytes[name] += size(inputs[0])
            elif name == "native_batch_norm_backward":
                self.bytes[name] += size(inputs[0]) + size(inputs[1])
        return outputs


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def size(t: Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded scalar counts once."""
    elements = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        elements *= length if stride != 0 else 1
    return elements * t.element_size()


def tensor_bytes(launch: Launch) -> int:
    """Bytes of the launch's tensors, each once; running statistics are the only ones both read and written."""
    return sum(
        size(argument) * (2 if name.startswith("running_") else 1)
        for name, argument in launch.arguments.items()
        if isinstance(argument, Tensor)
    )


class Pass(NamedTuple):
    """The launches of a forward or a backward pass, and the bytes of torch's own operations in it."""

    launches: list[Launch]
    torch_bytes: collections.Counter[str]


class Step(NamedTuple):
    forward: Pass
    backward: Pass | None
    saved: int  # bytes kept for backward


def trace_step(
    model_name: str, batch: int, dtype: str, training: bool, fused: bool = True, resolution: int = 0
) -> Step:
    """The trace of a step of our network (``fused``), or of torchvision's, which runs eagerly."""
    if fused:
        model = ek.create_model(model_name)
    else:
        import torchvision

        model = getattr(torchvision.models, model_name)()
    resolution = resolution or RESOLUTIONS[model_name]
    model = _in_dtype(model.to("meta"), DTYPES[dtype], training)
    x = torch.empty(batch, 3, resolution, resolution, dtype=DTYPES[dtype], device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    saved: dict[int, int] = {}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in parameters:
            saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t) if training else contextlib.nullcontext()
    with capture_launches() as launches, TorchTraffic() as traffic, torch.set_grad_enabled(training), kept:
        y = model(x)
    forward = Pass(launches, traffic.bytes)
    if not training:
        return Step(forward, None, 0)
    grad = torch.empty_like(y)
    with capture_launches() as launches, TorchTraffic() as traffic:
        y.backward(grad)
    return Step(forward, Pass(launches, traffic.bytes), sum(saved.values()))


def _in_dtype(model: nn.Module, dtype: torch.dtype, training: bool) -> nn.Module:
    """The model as mixed precision runs it: maps, and weights that torch reads, in ``dtype``, BatchNorm in float32."""
    model.train(training).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model
