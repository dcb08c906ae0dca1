"""Proof by example: that two networks compute the same of a small batch of images, and where they part if not."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effnet_kernels.backends import select

# Sizes of the random images, tried in turn: a head may take only the size that it was made for.
SIZES = (64, 224)
# Parameters up to which a copy in float64 is cheap.
_MOST_IN_DOUBLE = 50_000_000
# How large a difference rounding in float32 may make: a share of the spread between images, and of the numbers' size.
_OF_SPREAD, _OF_SIZE = 2e-3, 1e-5


class Observation(NamedTuple):
    """A call of a model: the images, its outputs, and the inputs of its observed modules, in the order of the calls."""

    images: Tensor
    outputs: list[Tensor]
    inputs: list[Tensor]


class Observed:
    """A copy of a model in eval mode, in float64 where that is cheap, that notes the inputs of some of its modules.

    The model itself, its buffers and torch's random numbers stay as they are.

    Args:
        model: any module that can be copied.
        names: of these modules; where one follows another, its input is the output of the one before.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = ()) -> None:
        try:
            self.model = detached_copy(model).eval()
        except Exception as error:
            raise ValueError(
                f"the model cannot be copied to be compared ({error}); verify=False compares nothing"
            ) from error
        parameters = list(self.model.parameters())
        small = sum(p.numel() for p in parameters) <= _MOST_IN_DOUBLE
        self.dtypes = [torch.float64, torch.float32] if small else [torch.float32]
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self._inputs: list[Tensor] = []
        # A module that is in two places is called twice.
        for module in {id(m): m for m in map(self.model.get_submodule, names)}.values():
            module.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._inputs.append(arguments[0].detach().clone())

    def run(self, x: Tensor) -> Observation:
        """Calls the model on images x [N, C, H, W].

        Raises the model's own errors; ValueError for anything but images, and for outputs without a finite number.
        """
        if x.dim() != 4 or x.shape[0] == 0:
            raise ValueError(f"verify: expected images [N, C, H, W], at least one, got shape {tuple(x.shape)}")
        x = x.to(self.device)
        for dtype in self.dtypes:
            self._inputs.clear()
            try:
                with undisturbed(x.device), select.use_backend("torch"):
                    outputs = tensors_of(self.model.to(dtype)(x.to(dtype)))
                if not all(bool(y.isfinite().any()) for y in outputs):
                    raise ValueError("the model's outputs have no finite number: nothing can be compared, verify=False")
                return Observation(x, outputs, list(self._inputs))
            except Exception:
                # Modules that are quantized know one dtype.
                if dtype is self.dtypes[-1]:
                    raise
        raise AssertionError

    def run_random(self, channels: int, sizes: Sequence[int] = SIZES) -> Observation:
        """Calls the model on three random images [3, C, H, W] of the first of some sizes that it takes.

        Raises ValueError where it takes none.
        """
        failure: Exception | None = None
        for size in sizes:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(3, channels, size, size, generator=generator, dtype=torch.float32, device="cpu")
            try:
                return self.run(x)
            except Exception as error:
                failure = failure or error
        tried = " and ".join(f"{size}x{size}" for size in sizes)
        raise ValueError(
            f"the model fails on images of {tried} ({failure}); give it others to be compared on, verify=images, or "
            "verify=False"
        ) from failure


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Calls inside are without gradients, autocast and TF32, and leave torch's random numbers as they were.

    TF32 is one setting of all threads: those that compute meanwhile have float32's precision, too.
    """
    # Tensors that are only simulated to be on a GPU have no generator there.
    gpus = [device] if device.type == "cuda" and torch.cuda.is_initialized() else []
    with torch.no_grad(), torch.random.fork_rng(gpus), torch.autocast(device.type, enabled=False), without_tf32():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs not saved here
        if gpus:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """float32 as it is: TF32, torch's default for convolutions on a GPU, errs more than networks that differ may."""
    settings: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors in a model's output: one, or any nest of lists, tuples and dictionaries."""
    return [y for y in tree_leaves(outputs) if isinstance(y, Tensor)]


def detached_copy(module: nn.Module) -> Any:
    """A deep copy, also of modules that hold results of autograd, as pruning and older weight norms do."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for value in inner.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def agree(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether outputs differ by no more than rounding in float32 explains, also where all images look alike to them."""
    if len(ours) != len(theirs):
        return False
    for y, right in zip(ours, theirs, strict=True):
        if y.shape != right.shape or not torch.equal(y.isfinite(), right.isfinite()):
            return False
        finite = right.isfinite()
        exact = torch.where(finite, right.double(), 0.0)
        error = torch.where(finite, y.double(), 0.0) - exact
        spread = exact - exact.mean(dim=0, keepdim=True)
        if not error.norm() <= _OF_SPREAD * spread.norm() + _OF_SIZE * exact.norm():
            return False
    return True


def first_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor], names: Sequence[str]) -> str:
    """The name of the first map that differs; there is a name for each map."""
    for y, right, name in zip(ours, theirs, names, strict=False):
        if not agree([y], [right]):
            return name
    return f"what follows {names[min(len(ours), len(theirs), len(names)) - 1]}"
