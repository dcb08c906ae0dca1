"""Which backend runs, what ``explain`` says of it, and what forcing one does."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, run_python
from torch.utils.flop_counter import FlopCounterMode

import effnet_kernels as ek
from effnet_kernels.backends import cpu, select, triton
from effnet_kernels.backends.select import BackendError, Call

needs_native = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=f"the native extension is missing: {cpu.unavailable_reason()}"
)


@pytest.fixture(scope="module")
def model():
    return ek.efficientnet_b0().eval()


@pytest.fixture
def x():
    return torch.randn(1, 3, 32, 32)


def test_explain_names_every_layer_once_in_order(model, x):
    rows = ek.explain(model, x)
    names = [row.name for row in rows]
    assert names[0] == "features.0"
    assert names[-4:] == ["features.8", "avgpool", "classifier.0", "classifier.1"]
    assert len(names) == len(set(names)) == 16 + 2 + 3
    assert len(str(rows).splitlines()) == len(rows) + 1
    assert rows[-1].backend == "torch"


@needs_native
def test_blocks_run_natively_at_inference_and_in_training(x):
    for model, recorded in ((ek.efficientnet_b0().eval(), False), (ek.efficientnet_b0().train(), True)):
        with torch.set_grad_enabled(recorded):
            rows = {row.name: row for row in ek.explain(model, x)}
        assert rows["features.1.0"].backend == "cpu"
        assert rows["features.1.0"].reason == f"fused native kernels ({cpu.isa()})"
        assert rows["features.0"].backend == "cpu"
        assert rows["features.0"].reason == f"fused native kernels ({cpu.isa()})"
        assert rows["classifier.1"].backend == "torch"


@needs_native
@pytest.mark.parametrize("recorded", [True, False])
def test_dense_convolutions_run_as_explain_says(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch computes those of a training step that are not small, and no other."""
    torch.manual_seed(0)
    model = ek.create_model("efficientnet_v2_b0", num_classes=3).train(recorded)
    x = torch.randn(2, 3, 32, 32)
    said = [row for row in ek.explain(model, x) if (row.reason or "").startswith("in training the dense convolution")]
    calls, conv = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *operands, **named: calls.append(1) or conv(*operands, **named))
    with torch.set_grad_enabled(recorded):
        model(x)
    assert said
    assert len(calls) == (len(said) if recorded else 0)


@needs_native
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: x.to("meta"), "meta"),
        (lambda x: x[:0], "batch is empty"),
        (lambda x: x[0], "3 dimensions"),
    ],
)
def test_reasons_name_what_is_in_the_way(model, x, change, reason):
    with torch.no_grad():
        row = ek.explain(model, change(x))[1]
    assert row.backend == "torch"
    assert reason in row.reason


def test_who_else_looks_at_the_calls_is_a_reason(x):
    assert select.interception(x) is None
    with FlopCounterMode(display=False):
        assert "mode" in select.interception(x)
    assert select.interception(x) is None
    seen = []
    torch.func.vmap(lambda t: (seen.append(select.interception(t)), t)[1])(x)
    assert "torch.func" in seen[0] or "plain tensor" in seen[0]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_forced_backend_runs_where_it_can(model, x, backend):
    with ek.use_backend(backend):
        assert {row.backend for row in ek.explain(model, x) if row.module == "MBConv"} == {backend}
    with torch.inference_mode():
        expected = model(x)
        with ek.use_backend(backend):
            assert_close(model(x), expected)


@needs_native
def test_a_forced_backend_that_cannot_run_is_an_error_that_says_why(model, x):
    with ek.use_backend("cpu"), torch.no_grad():
        assert model(x).shape == (1, 1000)
        with pytest.raises(BackendError, match="float64"):
            model.features[1][0](x.double().expand(1, 3, 32, 32)[:, :1].expand(1, 32, 32, 32))
    with pytest.raises(BackendError, match="triton"), ek.use_backend("triton"):
        pass
    with pytest.raises(ValueError, match="expected a backend out of torch, reference, cpu, triton, got 'tpu'"):
        ek.use_backend("tpu").__enter__()


def test_the_environment_forces_a_backend_too():
    code = "import torch, effnet_kernels as ek; print(ek.explain(ek.efficientnet_b0(), torch.ones(1, 3, 32, 32))[1])"
    assert "backend='reference'" in run_python(code, EFFNET_KERNELS_BACKEND="reference").stdout
    wrong = run_python(code, EFFNET_KERNELS_BACKEND="tpu")
    assert "expected a backend out of" in wrong.stderr
    assert wrong.returncode != 0


def test_importing_brings_in_no_third_party_no_gpu_runtime_no_compiler_and_no_network():
    code = """
import sys, socket, subprocess, torch
before = set(sys.modules)
def refuse(*args, **kwargs): raise AssertionError("the import reached outside")
socket.socket.connect = subprocess.Popen.__init__ = refuse
import effnet_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not torch.cuda.is_initialized()
print(sorted(new & {"torchvision", "timm", "PIL", "tqdm", "triton", "skimage", "numpy", "safetensors"}))
"""
    result = run_python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_broken_triton_means_torch_and_one_warning(monkeypatch, model):
    monkeypatch.setattr(triton, "unavailable_reason", lambda: "Triton cannot be imported: planted")
    triton.warn_if_unavailable.cache_clear()
    block = model.features[1][0]
    call = Call(torch.device("cuda"), torch.float32, None)
    with pytest.warns(triton.TritonWarning, match="planted") as warned:
        decisions = [block.decide(call) for _ in range(2)]
    triton.warn_if_unavailable.cache_clear()
    assert len(warned) == 1
    assert {d.backend for d in decisions} == {"torch"}
    assert "planted" in decisions[0].fallback_reason


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), (None, True)])
def test_old_gpus_run_as_torch_has_it_unless_forced(monkeypatch, model, capability, runs):
    monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    monkeypatch.setattr(select, "_triton_unavailable", lambda: None)
    monkeypatch.setattr(select, "_compute_capability", lambda index: capability)
    block, call = model.features[1][0], Call(torch.device("cuda", 0), torch.float32, None)
    decision = block.decide(call)
    assert decision.backend == ("triton" if runs else "torch")
    if not runs:
        assert "compute capability 7.5, and the Triton kernels are for 8.0 and newer" in decision.fallback_reason
    with select.use_backend("triton"):
        assert block.decide(call).backend == "triton"
