"""Compound scaling (Tan and Le 2019, section 3.3).

From a baseline, a network ``phi`` steps up has depth alpha ** phi, width beta ** phi and resolution gamma ** phi times
the baseline's, with alpha * beta ** 2 * gamma ** 2 near 2, so that each step about doubles the arithmetic. The paper's
grid search on B0 found alpha 1.2, beta 1.1, gamma 1.15, whose product is 1.92.

The released networks are not on this curve: their coefficients were rounded, and not all by one phi. B1 (width 1.0,
depth 1.1, resolution 240) is near phi 0.5 and B4 near 3.5. ``efficientnet_b1`` and its siblings are the released table,
``EfficientNet.from_phi`` is the formula.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from effnet_kernels.models.variants import VARIANTS, Variant


class Coefficients(NamedTuple):
    """The bases of depth, width and resolution."""

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15

    @property
    def cost(self) -> float:
        """How many times the arithmetic one step of phi costs: alpha * beta ** 2 * gamma ** 2."""
        return self.alpha * self.beta**2 * self.gamma**2


PAPER = Coefficients()


def scaled_variant(phi: float, coefficients: Coefficients = PAPER, base: str = "efficientnet_b0") -> Variant:
    """The network ``phi`` steps from ``base``; any real phi, negative ones give smaller networks.

    Channels are rounded to multiples of 8, blocks up, the resolution to the nearest pixel. Dropout grows linearly from
    the baseline's to 0.5 near B7's phi, as in section 5.2 of the paper.

    Raises ValueError for a phi that is not finite or a base that is not in the table.
    """
    if isinstance(phi, bool) or not isinstance(phi, int | float) or not math.isfinite(phi):
        raise ValueError(f"phi: expected a finite number, got {phi!r}")
    if base not in VARIANTS:
        raise ValueError(f"base: expected a released variant such as 'efficientnet_b0', got {base!r}")
    baseline = VARIANTS[base]
    try:
        depth, width, resolution = (coefficient**phi for coefficient in coefficients)
    except OverflowError:
        raise ValueError(f"phi: expected a number whose network exists, got {phi!r}") from None
    return replace(
        baseline,
        name=f"{base}_phi{phi:g}",
        width=baseline.width * width,
        depth=baseline.depth * depth,
        resolution=max(1, round(baseline.resolution * resolution)),
        dropout=min(0.5, max(0.0, baseline.dropout + 0.05 * phi)),
    )


class Candidate(NamedTuple):
    """A point of the grid, and its score by the caller's function."""

    coefficients: Coefficients
    variant: Variant
    score: float


def grid(step: float = 0.05, budget: float = 2.0, tolerance: float = 0.1) -> list[Coefficients]:
    """All alpha, beta, gamma >= 1 on a grid of ``step`` whose cost is within ``tolerance`` of ``budget``.

    Raises ValueError for a step that is not positive, a negative tolerance, or a budget below 1.
    """
    if not 0 < step < math.inf or not 0 <= tolerance < math.inf or not 1 <= budget < math.inf:
        raise ValueError(f"expected finite step > 0, tolerance >= 0, budget >= 1, got {step}, {tolerance}, {budget}")
    highest = budget + tolerance
    alphas = [1 + step * i for i in range(int((highest - 1) / step + 1e-9) + 1)]
    others = [1 + step * i for i in range(int((math.sqrt(highest) - 1) / step + 1e-9) + 1)]
    points = (Coefficients(round(a, 6), round(b, 6), round(c, 6)) for a in alphas for b in others for c in others)
    return [point for point in points if abs(point.cost - budget) <= tolerance + 1e-9]


def grid_search(
    score: Callable[[Variant], float],
    *,
    base: str = "efficientnet_b0",
    phi: float = 1.0,
    step: float = 0.05,
    budget: float = 2.0,
    tolerance: float = 0.1,
) -> list[Candidate]:
    """Scores every configuration of :func:`grid` at ``phi``, the best first, as the paper found its coefficients.

    Args:
        score: takes the scaled variant (``effnet_kernels.build`` makes its network) and returns a number to
            maximise: the accuracy after training it, say.
        base: the baseline.
        phi: the step at which the configurations are compared; the paper takes 1.
        step, budget, tolerance: see :func:`grid`.

    Raises ValueError for arguments that do not fit, or where the grid has no point within the budget.
    """
    points = grid(step, budget, tolerance)
    if not points:
        raise ValueError(f"expected a grid with a point of cost {budget} within {tolerance}, got none at step {step}")
    variants = [(point, scaled_variant(phi, point, base)) for point in points]
    candidates = [Candidate(point, variant, float(score(variant))) for point, variant in variants]
    return sorted(candidates, key=lambda candidate: candidate.score, reverse=True)
