"""Proof by example: that two networks compute the same of a small batch of images, and where they part if not."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effnet_kernels import dispatch

# Sizes of the images that are made, tried in turn: a head may want what it was made for.
SIZES = (64, 224)
# Parameters up to which a copy in float64 is cheap.
_MOST_IN_DOUBLE = 50_000_000
# What rounding in float32 may make of a difference: a share of what tells the images apart, and of the numbers' size.
_OF_SPREAD, _OF_SIZE = 2e-3, 1e-5


class Observed:
    """A copy of a model in eval mode, in float64 where that is cheap, that notes what some of its modules are given.

    The model itself, its buffers and torch's random numbers stay as they are.

    Args:
        model: any module that can be copied.
        names: of its modules; those behind each other get what the one before returned.
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

    @torch.no_grad()
    def run(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs for images x, and what the observed modules were given, in the order of the calls.

        Raises what the model raises.
        """
        x = x.to(self.device)
        for dtype in self.dtypes:
            self._inputs.clear()
            try:
                return self._run(x.to(dtype), dtype), list(self._inputs)
            except Exception:
                # Modules that are quantized know one dtype.
                if dtype is self.dtypes[-1]:
                    raise
        raise AssertionError

    def _run(self, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        gpus = [x.device] if x.device.type == "cuda" else []
        with (
            torch.random.fork_rng(gpus),
            torch.autocast(x.device.type, enabled=False),
            dispatch.use_backend("torch"),
        ):
            y = self.model.to(dtype)(x)
        return [y] if isinstance(y, Tensor) else list(y)


def detached_copy(module: nn.Module) -> Any:
    """A deep copy, also of modules that hold results of autograd, as pruning and older weight norms do."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for value in inner.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def make_images(model: Observed, channels: int, sizes: Sequence[int] = SIZES) -> Tensor:
    """Three random images [3, C, H, W] that the model takes, float32, of the first of some sizes that it takes."""
    failure: Exception | None = None
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, channels, size, size, generator=generator, dtype=torch.float32, device="cpu")
        try:
            model.run(x)
        except Exception as error:
            failure = failure or error
            continue
        return x.to(model.device)
    tried = " and ".join(f"{size}x{size}" for size in sizes)
    raise ValueError(
        f"the model fails on images of {tried} ({failure}); give it others to be compared on, verify=images, or "
        "verify=False"
    ) from failure


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
    """The name of the first of some maps, which belong to these names, that differ."""
    for y, right, name in zip(ours, theirs, names, strict=False):
        if not agree([y], [right]):
            return name
    return f"what follows {names[min(len(ours), len(theirs), len(names)) - 1]}"
