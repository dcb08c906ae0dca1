"""The engine that freeze() makes of a network."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.backends import cpu, profiling, select
from effnet_kernels.backends.cpu.network import Network, StepProfile
from effnet_kernels.backends.select import BackendError
from effnet_kernels.fusion.spec import Chain
from effnet_kernels.inference.cuda_graphs import GraphCache
from effnet_kernels.inference.folded_network import FoldedNetwork
from effnet_kernels.models.features import check_images
from effnet_kernels.modules.fused_module import memory_format


class ProfileRow(NamedTuple):
    """One step of a frozen engine.

    Attributes:
        name: the layers that the step computes.
        milliseconds: of all images together, the median over the repetitions.
        gflops: 2e-9 times the multiply-adds a second.
        of_peak: gflops over the rate at which as many threads multiply and add numbers of the engine's dtype in
            registers, measured by the same call.
        share: of the whole time.
    """

    name: str
    milliseconds: float
    gflops: float
    of_peak: float
    share: float


class Profile(list[ProfileRow]):
    """The steps of a frozen engine in order; printed, it is a table."""

    def __str__(self) -> str:
        width = max(len(row.name) for row in self)
        lines = [f"{'step':{width}}  {'ms':>8}  {'GFLOP/s':>8}  {'of peak':>8}  {'of time':>8}"]
        for row in self:
            lines.append(
                f"{row.name:{width}}  {row.milliseconds:8.3f}  {row.gflops:8.1f}  {row.of_peak:8.1%}  {row.share:8.1%}"
            )
        lines.append(
            f"{'all':{width}}  {sum(row.milliseconds for row in self):8.3f}  "
            f"{sum(row.gflops * row.share for row in self):8.1f}  {sum(row.of_peak * row.share for row in self):8.1%}"
        )
        return "\n".join(lines)


class FrozenEfficientNet(nn.Module):
    """The engine that :func:`effnet_kernels.freeze` returns. Its state dict has the folded weights, and may be loaded.

    Changes of a buffer in place are not seen on the CPU, where weights are packed once.

    Args:
        chains, outputs: see :class:`FoldedNetwork`.
        tail: the module that torch applies to the output, which is pooled where a chain pools; or None.
        features_only: whether the outputs are maps.
        image_first: whether the image is returned before the maps.
        dtype: of weights, images and outputs. An engine in bfloat16 on the CPU takes float32 images too; its outputs
            are then float32 numbers, with the values of bfloat16.
        cuda_graph: whether a GPU's launches are replayed.

    Shapes: images [N, C, H, W] in any strides, to logits [N, num_classes], pooled features [N, num_features] or a list
    of feature maps in the image's memory format.
    Raises ValueError or TypeError for other images, RuntimeError for images that require gradients.
    """

    # Each with the generation of the folded network's weights that it was made of.
    _native: tuple[int, Network] | None
    _graphs: tuple[int, GraphCache] | None

    def __init__(
        self,
        chains: Sequence[Chain],
        outputs: Sequence[int],
        tail: nn.Module | None,
        features_only: bool,
        image_first: bool = False,
        dtype: torch.dtype = torch.float32,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.folded = FoldedNetwork(chains, outputs, dtype)
        self.tail = None if tail is None else tail.to(dtype)
        self.pools = any(chain.pool for chain in chains)
        self.features_only, self.image_first = features_only, image_first
        self.cuda_graph = cuda_graph
        self._forget()

    def forward(self, x: Tensor) -> Any:
        check_images(x)
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("expected an image without gradients: a frozen network only infers")
        outputs = self._outputs(x)
        if self.features_only:
            return [x, *outputs] if self.image_first else outputs
        y = outputs[0].flatten(1) if self.pools else outputs[0]
        if self.tail is None:
            return y
        # The user's own modules have weights of the engine's dtype, which the image need not have.
        dtype = self.folded.weight.dtype
        with select.without_autocast(y):
            output = self.tail(y.to(dtype))
        is_cast = x.dtype != dtype and isinstance(output, Tensor) and output.is_floating_point()
        return output.to(x.dtype) if is_cast else output

    def _outputs(self, x: Tensor) -> list[Tensor]:
        strides = memory_format(x) if self.features_only else torch.contiguous_format
        traced = torch.compiler.is_compiling() or select.interception(x) is not None
        if not traced and self._is_native() and select.forced() in (None, "cpu"):
            if profiling.enabled():
                self.folded.record_convolutions(x)
            with profiling.profiled("network"):
                return self.native().run(x, strides)
        run: Callable[[Tensor], list[Tensor]] = self.folded
        on_gpu = self.folded.weight.device.type == "cuda"
        # Inside of a capture the launches become part of the caller's graph.
        if self.cuda_graph and on_gpu and not traced and not torch.cuda.is_current_stream_capturing():
            self.folded.check(x)
            run = self.graphs()
        return [y.contiguous(memory_format=strides) if y.dim() == 4 else y for y in run(x)]

    def _is_native(self) -> bool:
        weight = self.folded.weight
        if weight.device.type != "cpu":
            return False
        return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and cpu.runs_bf16())

    def native(self) -> Network:
        """The engine of the CPU, packed at the first call.

        Raises ValueError where the weights are not float32 on the CPU, or bfloat16 where the instruction set in use has
        kernels for it; BackendError without the native extension.
        """
        if not self._is_native():
            weight = self.folded.weight
            dtypes = "float32 or bfloat16" if cpu.runs_bf16() else "float32"
            raise ValueError(f"expected an engine in {dtypes} on the CPU, got {weight.dtype} on {weight.device}")
        native, generation = self._native, self.folded.generation
        if native is None or native[0] != generation:
            if (reason := cpu.unavailable_reason()) is not None:
                raise BackendError(f"a frozen network on the CPU needs the native extension: {reason}")
            # Threads that come here at once each pack their own, and the last is kept: a lock that one of them holds
            # while another forks would never be released in the child.
            native = self._native = generation, Network(self.folded.chains(), self.folded.outputs)
        return native[1]

    def graphs(self) -> GraphCache:
        graphs, generation = self._graphs, self.folded.generation
        if graphs is None or graphs[0] != generation:
            graphs = self._graphs = generation, GraphCache(self.folded)
        return graphs[1]

    def _forget(self) -> None:
        self._native = self._graphs = None

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenEfficientNet":
        self._forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_native": None, "_graphs": None}

    def __prepare_scriptable__(self) -> "FrozenEfficientNet":
        """``torch.jit.script`` calls this first; it raises TypeError."""
        raise TypeError(
            "expected a model for torch.jit.script, got a frozen engine; script the model that was frozen, or take "
            "torch.jit.trace(engine, images) or torch.export.export(engine, (images,))"
        )

    def train(self, mode: bool = True) -> "FrozenEfficientNet":
        """Does nothing: a frozen network is always in eval mode."""
        return super().train(False)

    def profile(self, x: Tensor, repeat: int = 20) -> Profile:
        """The time of each step on the CPU for images ``x``: the median of ``repeat`` calls after a few others."""
        for _ in range(3):
            self.native().run(x)
        calls = [self.native().profile(x) for _ in range(repeat)]
        steps = [_median(list(step)) for step in zip(*calls, strict=True)]
        total = sum(step.seconds for step in steps)
        peak = cpu.fma_peak(self.folded.weight.dtype == torch.bfloat16)
        rows = Profile()
        for name, multiply_adds, seconds in steps:
            rate = 2 * multiply_adds / seconds
            rows.append(ProfileRow(name, 1e3 * seconds, 1e-9 * rate, rate / peak, seconds / total))
        return rows


def _median(steps: Sequence[StepProfile]) -> StepProfile:
    return sorted(steps, key=lambda step: step.seconds)[len(steps) // 2]
