"""Compound scaling: the paper's formula, what networks cost, and the grid search."""

import itertools
import math

import pytest
import torch

import effnet_kernels as ek
from effnet_kernels.models import scaling
from effnet_kernels.models.factory import measure
from effnet_kernels.models.scaling import Coefficients, scaled_variant


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def on_meta(phi):
    with torch.device("meta"):
        return ek.EfficientNet.from_phi(phi)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_paper_coefficients_and_their_cost():
    assert Coefficients() == (1.2, 1.1, 1.15)
    # To two decimals.
    assert Coefficients().cost == pytest.approx(1.92, abs=5e-3)
    assert Coefficients(2.0, 3.0, 5.0).cost == 2 * 9 * 25


def test_phi_zero_is_b0():
    variant = scaled_variant(0)
    b0 = ek.VARIANTS["efficientnet_b0"]
    assert (variant.width, variant.depth, variant.resolution, variant.dropout) == (1, 1, 224, b0.dropout)
    with torch.device("meta"):
        expected = shapes(ek.efficientnet_b0())
    assert shapes(on_meta(0)) == expected
    assert count(on_meta(0)) == 5_288_548


@pytest.mark.parametrize("phi", [-2, -0.5, 0.5, 1, 3.5])
def test_each_dimension_grows_by_its_own_base(phi):
    variant = scaled_variant(phi, Coefficients(1.3, 1.2, 1.1), "efficientnet_b1")
    assert variant.depth == pytest.approx(1.1 * 1.3**phi)
    assert variant.width == pytest.approx(1.2**phi)
    assert variant.resolution == round(240 * 1.1**phi)
    assert 0 <= variant.dropout <= 0.5
    assert variant.stages == ek.VARIANTS["efficientnet_b1"].stages


def test_released_networks_lie_near_the_phi_that_the_documentation_names():
    b1, b4 = ek.VARIANTS["efficientnet_b1"], ek.VARIANTS["efficientnet_b4"]
    assert scaled_variant(0.5).depth == pytest.approx(b1.depth, rel=0.01)
    assert scaled_variant(0.5).resolution == pytest.approx(b1.resolution, rel=0.01)
    assert scaled_variant(3.5).width == pytest.approx(b4.width, rel=0.01)
    assert scaled_variant(3.5).resolution == pytest.approx(b4.resolution, rel=0.05)
    # ... and differ from it all the same.
    assert count(on_meta(0.5)) != 7_794_184


def test_more_phi_is_more_network():
    sizes = [measure(scaled_variant(phi)) for phi in (-6, -3, -1, 0, 1, 2)]
    for small, large in itertools.pairwise(sizes):
        assert small.parameters < large.parameters
        assert small.macs < large.macs
        assert small.resolution < large.resolution


@pytest.mark.parametrize("phi", [-8, -3.5, -1, 0.3])
def test_from_phi_builds_networks_that_run(phi):
    model = ek.EfficientNet.from_phi(phi, num_classes=7, in_chans=1).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 40, 40)).shape == (2, 7)


def test_from_phi_of_a_subclass_and_with_its_options():
    class Backbone(ek.EfficientNet):
        pass

    model = Backbone.from_phi(-4, features_only=True, out_indices=(1, 3))
    assert type(model) is Backbone
    assert len(model(torch.randn(2, 3, 64, 64))) == 2


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("efficientnet_b0", 5_288_548, 0.386),
        ("efficientnet_b1", 7_794_184, 0.687),
        ("efficientnet_b4", 19_341_616, 4.394),
        ("efficientnet_v2_s", 21_458_488, 8.366),
        ("efficientnet_lite0", 4_652_008, None),
    ],
)
def test_measure_gives_the_published_sizes(name, parameters, gmacs):
    variant = ek.VARIANTS[name]
    size = measure(variant)
    assert size.parameters == parameters
    assert size.resolution == variant.resolution
    if gmacs is not None:
        # Published to three decimals.
        assert size.macs / 1e9 == pytest.approx(gmacs, abs=6e-4)


def test_measure_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    measure(scaled_variant(-8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("step", "budget", "tolerance"), [(0.05, 2.0, 0.1), (0.1, 2.0, 0.2), (0.25, 3.0, 0.05)])
def test_grid_is_every_point_within_the_budget(step, budget, tolerance):
    points = scaling.grid(step, budget, tolerance)
    ticks = [round(1 + step * i, 6) for i in range(math.ceil((budget + tolerance) / step))]
    every = {Coefficients(a, b, c) for a in ticks for b in ticks for c in ticks}
    assert set(points) == {point for point in every if abs(point.cost - budget) <= tolerance + 1e-9}
    assert len(points) == len(set(points)) > 0


def test_grid_contains_the_papers_choice():
    assert Coefficients(1.2, 1.1, 1.15) in scaling.grid()


def test_grid_search_scores_each_configuration_and_returns_the_best_first():
    scored = []

    def score(variant):
        with torch.device("meta"):
            parameters = count(ek.build(variant))
        scored.append((variant, -parameters))
        return -parameters

    found = scaling.grid_search(score, phi=1.0, step=0.25, tolerance=0.2)
    points = scaling.grid(0.25, tolerance=0.2)
    assert len(found) == len(scored) == len(points) == 3
    assert {candidate.coefficients for candidate in found} == set(points)
    assert [candidate.score for candidate in found] == sorted((s for _, s in scored), reverse=True)
    for candidate in found:
        assert (candidate.variant, candidate.score) in scored
        assert candidate.variant == scaled_variant(1.0, candidate.coefficients)


def test_grid_search_takes_the_base_and_phi():
    found = scaling.grid_search(lambda v: v.width, base="efficientnet_lite0", phi=2, step=0.5, tolerance=0.5)
    assert found[0].variant.width == max(1.0 * c.coefficients.beta**2 for c in found)
    assert all(candidate.variant.activation == "relu6" for candidate in found)


@pytest.mark.parametrize("phi", [math.nan, math.inf, -math.inf, "1", None, True, 1j])
def test_phi_that_is_no_finite_number_is_refused(phi):
    with pytest.raises(ValueError, match="phi: expected a finite number, got"):
        ek.EfficientNet.from_phi(phi)


def test_phi_beyond_all_networks_is_refused():
    with pytest.raises(ValueError, match="phi: expected"):
        scaled_variant(1e5)


def test_unknown_base_is_refused():
    with pytest.raises(ValueError, match=r"base: expected a released variant.*got 'resnet50'"):
        scaled_variant(1, base="resnet50")


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": 0},
        {"step": -0.1},
        {"step": math.nan},
        {"step": math.inf},
        {"tolerance": -1},
        {"tolerance": math.nan},
        {"budget": 0.5},
        {"budget": math.nan},
        {"budget": math.inf},
    ],
    ids=str,
)
def test_grid_arguments_that_make_no_grid_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        scaling.grid(**arguments)
    with pytest.raises(ValueError, match="expected"):
        scaling.grid_search(lambda variant: 0.0, **arguments)


def test_grid_without_a_point_is_refused():
    with pytest.raises(ValueError, match=r"expected a grid with a point of cost 1\.5"):
        scaling.grid_search(lambda variant: 0.0, step=0.9, budget=1.5, tolerance=0.01)
