"""The bytes that a step moves through device memory and keeps, counted from its launch trace on meta tensors."""

import pytest

from effnet_kernels.backends import triton

pytestmark = pytest.mark.skipif(triton.unavailable_reason() is not None, reason=f"{triton.unavailable_reason()}")


@pytest.fixture(scope="module")
def b0() -> dict[str, dict[str, float]]:
    from traffic import count

    return {name: count("efficientnet_b0", "fp16", 64, fused=name == "ours") for name in ("ours", "eager")}


def test_a_training_step_moves_less_than_half_of_eagers_bytes(b0: dict[str, dict[str, float]]) -> None:
    assert b0["ours"]["training"] <= 135
    assert b0["eager"]["training"] > 300
    assert b0["ours"]["training"] < b0["ours"]["training, requested"] <= 196


def test_inference_moves_a_third_of_eagers_bytes(b0: dict[str, dict[str, float]]) -> None:
    assert b0["ours"]["inference"] <= 31.5
    assert b0["eager"]["inference"] > 90


def test_a_third_of_eagers_activations_is_saved(b0: dict[str, dict[str, float]]) -> None:
    assert b0["ours"]["saved for backward"] <= 0.35 * b0["eager"]["saved for backward"]


def test_the_picture_has_a_bar_for_each_row(b0: dict[str, dict[str, float]]) -> None:
    from traffic import plot

    assert plot(b0, "title").count("<rect") == 1 + 2 * len(b0)
