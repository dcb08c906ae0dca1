"""Stochastic depth."""

import torch
import torch.fx
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """Zeroes a residual branch at random while training (Huang et al. 2016, section 3).

    Args:
        p: the probability of zeroing, in [0, 1] (one minus the survival probability).
        mode: ``"row"`` draws for each sample, ``"batch"`` once for all.

    Shapes: any [N, ...]; the output is the input times 0 or 1 / (1 - p).
    Raises ValueError for a ``p`` or ``mode`` outside of these.
    """

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p: expected a probability between 0 and 1, got {p}")
        if mode not in ("batch", "row"):
            raise ValueError(f"mode: expected 'batch' or 'row', got {mode!r}")
        self.p = p
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        return stochastic_depth(input, self.p, self.mode, self.training)

    def drop_path_scale(self, input: Tensor) -> Tensor | None:
        """The factors that ``forward`` would draw for ``input``, [N]; None where it would change nothing."""
        if not self.training or self.p == 0.0:
            return None
        return draw_factors(input, self.p, self.mode == "row").flatten().expand(input.shape[0])

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """:class:`StochasticDepth` as a function."""
    if not training or p == 0.0:
        return input
    return input * draw_factors(input, p, mode == "row")


# One node of a symbolic trace, as torchvision's is.
torch.fx.wrap("stochastic_depth")


def draw_factors(input: Tensor, p: float, by_sample: bool = True, scaled: bool = True) -> Tensor:
    """0 with probability p, else 1 / (1 - p), or 1 where not ``scaled``; for each sample or for all, [N or 1, 1, ...].

    The same call, dtype and order of draws as torchvision's and timm's, so that one seed gives one training run.
    """
    survival = 1.0 - p
    size = [input.shape[0] if by_sample else 1] + [1] * (input.ndim - 1)
    noise = torch.empty(size, dtype=input.dtype, device=input.device).bernoulli_(survival)
    if survival > 0.0 and scaled:
        noise.div_(survival)
    return noise
