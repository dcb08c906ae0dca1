"""freeze(): every variant against the model it came from, and what users do with an engine."""

import copy
import threading

import pytest
import torch
from conftest import assert_close, copies, randomize, relative_rms, run_python
from native_cases import needs_linux, needs_native, pools_memory
from test_features import small
from torch import nn

import effnet_kernels as ek
from effnet_kernels.backends import cpu
from effnet_kernels.inference import engine as engines

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


def eager(model, x):
    with torch.inference_mode(), ek.use_backend("torch"):
        return model.eval()(x)


@pytest.mark.parametrize(
    "name", [name for name in ek.VARIANTS if not name.endswith(("_b6", "_b7", "_b8", "_l", "_l2"))]
)
def test_variants(name):
    model = randomize(getattr(ek, name)(num_classes=10))
    x = torch.randn(1, 3, 65, 72)
    assert_close(ek.freeze(model)(x), eager(model, x))


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (33, 31), (40, 97)])
def test_sizes_and_batches(padding, size):
    model = small(padding=padding)
    engine = ek.freeze(model)
    for batch in (1, 2, 4, 5, 9):
        x = torch.randn(batch, 3, *size)
        y = engine(x)
        assert y.is_contiguous()
        assert_close(y, eager(model, x))
        assert torch.equal(engine(x.contiguous(memory_format=torch.channels_last)), y)
    assert engine(torch.empty(0, 3, *size)).shape == (0, 10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_feature_maps(memory_format):
    model = small(features_only=True)
    x = torch.randn(2, 3, 48, 64).contiguous(memory_format=memory_format)
    maps, expected = ek.freeze(model)(x), eager(model, x)
    assert len(maps) == len(expected)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.is_contiguous(memory_format=memory_format)
        assert_close(ours, theirs)


def test_many_sizes_are_forgotten_and_right():
    model = small()
    engine = ek.freeze(model)
    for _ in range(2):
        for size in range(16, 28):
            x = torch.randn(1, 3, size, size)
            assert_close(engine(x), eager(model, x))


def test_classifiers():
    x = torch.randn(3, 3, 32, 32)
    for classes in (1, 17):
        model = small(num_classes=classes)
        assert_close(ek.freeze(model)(x), eager(model, x))
    model.classifier = nn.Identity()
    pooled = ek.freeze(model)(x)
    assert pooled.shape == (3, 64)
    assert_close(pooled, eager(model, x))
    model.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    model.train()
    engine = ek.freeze(model)
    assert_close(engine(x), eager(model, x))
    assert not engine(x).requires_grad
    assert torch.equal(engine.train()(x), engine(x))
    assert not engine.training


def test_the_engine_keeps_the_weights_of_its_moment():
    model = small().train()
    x = torch.randn(2, 3, 32, 32)
    engine = ek.freeze(model)
    assert model.training
    before = engine(x)
    expected = eager(model, x)
    for p in model.parameters():
        p.data.mul_(1.5)
    assert torch.equal(engine(x), before)
    assert_close(before, expected)
    assert list(engine.parameters()) == []


def test_chains_have_the_buffers_of_the_moment():
    folded = ek.freeze(small().eval()).folded

    def weight(network):
        return network.chains()[0].layers[0].weight

    assert folded.chains() is folded.chains()
    copied = copy.deepcopy(folded)
    assert weight(copied) is copied.weight
    assert weight(folded) is folded.weight
    assert weight(folded.double()) is folded.weight
    assert folded.weight.dtype == torch.float64
    folded.load_state_dict({name: t + 1.0 for name, t in copied.state_dict().items()}, assign=True)
    assert weight(folded) is folded.weight
    assert torch.equal(folded.weight, copied.weight + 1.0)


def test_weights_that_could_not_be_packed_are_packed_at_the_next_call(monkeypatch):
    engine, x = ek.freeze(small().eval()), torch.randn(1, 3, 32, 32)
    engine(x)
    engine.load_state_dict({key: t + 0.1 for key, t in engine.state_dict().items()})
    with monkeypatch.context() as patch:

        def fail(*arguments):
            raise MemoryError

        patch.setattr(engines, "Network", fail)
        with pytest.raises(MemoryError):
            engine(x)
    with ek.use_backend("torch"):
        expected = engine(x)
    assert_close(engine(x), expected)


def test_weights_as_odd_as_users_have_them():
    model = small()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    model.features[1][0].block[0].norm.weight = None
    model.features[1][0].block[0].norm.bias = None
    x = torch.randn(2, 3, 32, 32)
    assert_close(ek.freeze(model)(x), eager(model, x))


def test_copies():
    model = small()
    x = torch.randn(1, 3, 40, 40)
    engine = ek.freeze(model)
    expected = engine(x)
    for again in copies(engine):
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_native_fused_and_torchs_operators_agree(padding):
    model = small(padding=padding)
    engine, x = ek.freeze(model), torch.randn(2, 3, 33, 47)
    expected = eager(model, x)
    assert_close(engine(x), expected)
    assert_close(engine.folded(x)[0], expected)
    with ek.use_backend("torch"):
        assert_close(engine.folded(x)[0], expected)
    torch.compiler.reset()
    assert_close(torch.compile(engine, backend="aot_eager", fullgraph=True)(x), expected)


def test_engines_in_another_dtype():
    model, x = small(), torch.randn(2, 3, 33, 47)
    engine = ek.freeze(model)
    expected = engine(x)
    half = engine.to(torch.bfloat16)
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # Twice the error that torch's own network has in that dtype.
    allowed = 2 * relative_rms(eager(model.bfloat16(), x.bfloat16()).float(), expected)
    assert relative_rms(y.float(), expected) <= allowed
    with (
        cpu.use_isa("scalar"),
        pytest.raises(ValueError, match=r"expected torch\.bfloat16 or torch\.float32 im"),
    ):
        half(x.half())
    with pytest.raises(ValueError, match=r"expected torch\.float16 images on cpu, got torch\.float32 on cpu"):
        engine.half()(x)
    # The packed weights are those of the moment, too.
    rounded = engine.float()
    assert relative_rms(rounded(x), expected) <= allowed
    assert_close(rounded(x), rounded.folded(x)[0])


def test_autocast_changes_nothing():
    engine, x = ek.freeze(small()), torch.randn(2, 3, 33, 47)
    expected = engine(x)
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        for run in (engine, engine.folded, torch.compile(engine, backend="aot_eager", fullgraph=True)):
            y = run(x)
            assert_close(y[0] if isinstance(y, list) else y, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True])
def test_scripting_an_engine_names_what_else_there_is(inside):
    engine, x = ek.freeze(small()), torch.randn(1, 3, 32, 32)
    model = nn.Sequential(engine, nn.Identity()) if inside else engine
    with pytest.raises(TypeError, match=r"got a frozen engine; script the model .* torch\.jit\.trace"):
        torch.jit.script(model)
    assert_close(torch.jit.trace(model, x)(x), engine(x))
    assert_close(torch.export.export(model, (x,)).module()(x), engine(x))


def test_launches_on_a_gpu_are_recorded():
    pytest.importorskip("triton", reason="records its launches")
    from effnet_kernels.tools.warmup import launches_of_step

    launches = launches_of_step(ek.freeze(small()), (2, 3, 64, 64), train=False)
    assert len(launches) > 20


def test_several_threads_at_once():
    model = small()
    engine = ek.freeze(model)
    images = [torch.randn(2, 3, size, size) for size in (32, 32, 40, 48)]
    expected = [engine(x) for x in images]
    wrong = []

    def work(index):
        torch.set_num_threads(1 + index % 2)
        for _ in range(20):
            if not torch.equal(engine(images[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORKED = """
import os, signal
import torch
import effnet_kernels as ek
from test_features import small
torch.set_num_threads(1)  # torch's own operators stay in this thread, where a forked child's would hang
x = torch.randn(1, 3, 64, 64)
engine = ek.freeze(small())
torch.set_num_threads(2)
y = engine(x)
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    os._exit(0 if torch.equal(engine(x), y) else 3)
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status))
"""


@needs_linux
def test_forked_child():
    done = run_python(FORKED, timeout=60)
    assert done.stdout.strip() == "0", done.stderr


@needs_linux
@pools_memory
def test_memory_does_not_grow_with_calls():
    code = """
import torch
import effnet_kernels as ek
from test_features import small
engine, x = ek.freeze(small()), torch.randn(2, 3, 96, 96)
def resident():
    return int(open("/proc/self/statm").read().split()[1])
for _ in range(10): engine(x)
before = resident()
for _ in range(300): engine(x)
print(resident() - before)
"""
    done = run_python(code)
    # Pages. An arena a call would be thousands.
    assert int(done.stdout) < 100, done.stderr


def test_profile():
    engine = ek.freeze(small())
    profile = engine.profile(torch.randn(2, 3, 64, 64), repeat=3)
    names = [row.name for row in profile]
    assert any("depthwise 3x3" in name for name in names)
    assert any(name.startswith("dense 3x3") for name in names)
    assert sum(row.share for row in profile) == pytest.approx(1)
    assert all(row.milliseconds > 0 and 0 <= row.of_peak < 2 for row in profile)
    table = str(profile).splitlines()
    assert len(table) == len(profile) + 2
    assert table[-1].startswith("all")
    assert table[0].split() == ["step", "ms", "GFLOP/s", "of", "peak", "of", "time"]


def test_images_that_it_refuses():
    engine = ek.freeze(small())
    with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\], got shape \(1, 1, 32, 32\)"):
        engine(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"expected a float32 tensor on the CPU, got torch\.float16"):
        engine(torch.randn(1, 3, 32, 32).half())
    with pytest.raises(RuntimeError, match="a frozen network only infers"):
        engine(torch.randn(1, 3, 32, 32, requires_grad=True))
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        assert not engine(x).requires_grad


def test_models_that_it_refuses(monkeypatch):
    with pytest.raises(TypeError, match=r"expected an EfficientNet of effnet_kernels, .*got torch\.nn.*Linear"):
        ek.freeze(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"features\.0\.0\.weight: expected torch\.float32 .*, got torch\.float64"):
        ek.freeze(small().double())
    with pytest.raises(ValueError, match=r"dtype: expected torch\.float32 or torch\.bfloat16 on the CPU, got"):
        ek.freeze(small(), dtype=torch.float16)
    with pytest.raises(ValueError, match="cuda_graph: expected a model on a GPU, got one on cpu"):
        ek.freeze(small(), cuda_graph=True)
    with torch.device("meta"):
        model = ek.efficientnet_b0()
    with pytest.raises(ValueError, match=r"expected torch\.float32 or .* on the CPU, got torch\.float32 on meta"):
        ek.freeze(model)
    model = small()
    model.features[2][0] = nn.Conv2d(8, 16, 3)
    with pytest.raises(ValueError, match=r"features\.2\.0: expected a block of an EfficientNet, got Conv2d"):
        ek.freeze(model)
    model = small()
    model.features[3][0].block[0][2] = nn.GELU()
    with pytest.raises(ValueError, match=r"features\.3\.0: .*GELU"):
        ek.freeze(model)
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "no compiler")
    with pytest.raises(ek.BackendError, match="needs the native extension: no compiler"):
        ek.freeze(small())


def third_party(package: str, name: str, **options) -> nn.Module:
    module = pytest.importorskip(package, reason="freezes its networks, the extra 'third-party'")
    torch.manual_seed(0)
    if package == "torchvision.models":
        model = getattr(module, name)(**options)
    elif package == "timm":
        model = module.create_model(name, **options)
    else:
        model = module.EfficientNet.from_name(name, **options)
    return randomize(model).eval()


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("torchvision.models", "efficientnet_b0"),
        ("torchvision.models", "efficientnet_v2_s"),
        ("torchvision.models", "mobilenet_v2"),
        ("torchvision.models", "mobilenet_v3_small"),
        ("timm", "efficientnet_b0"),
        ("timm", "tf_efficientnet_b1"),
        ("timm", "efficientnet_lite0"),
        ("timm", "tf_efficientnetv2_b0"),
        ("timm", "mnasnet_small"),
        ("efficientnet_pytorch", "efficientnet-b0"),
    ],
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_networks_of_other_packages(package, name, accelerated):
    """Each keeps its own padding: efficientnet_pytorch's is for the nominal size, whatever an image's is."""
    model = third_party(package, name)
    images = [torch.randn(2, 3, *size) for size in ((64, 64), (65, 98))]
    with torch.inference_mode():
        expected = [model(x) for x in images]
        engine = ek.freeze(ek.accelerate(model) if accelerated else model)
        for x, y in zip(images, expected, strict=True):
            assert_close(engine(x), y)


def test_feature_maps_of_other_packages():
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        maps, model = third_party("timm", "efficientnet_b0", features_only=True), third_party("timm", "efficientnet_b0")
        maps.load_state_dict(model.state_dict(), strict=False)
        for engine in (ek.freeze(maps), ek.freeze(model, features_only=True)):
            for actual, expected in zip(engine(x), maps(x), strict=True):
                assert_close(actual, expected)
        model = third_party("efficientnet_pytorch", "efficientnet-b0")
        expected = list(model.extract_endpoints(x).values())[:5]
        for actual, y in zip(ek.freeze(model, features_only=True)(x), expected, strict=True):
            assert_close(actual, y)
        ours = randomize(ek.efficientnet_b0(features_only=True)).eval()
        for actual, y in zip(ek.freeze(ours)(x), ours(x), strict=True):
            assert_close(actual, y)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("package", ["effnet_kernels", "torchvision.models"])
@pytest.mark.parametrize("cut", [slice(n) for n in range(9)] + [slice(1, None), slice(3, None), slice(1, -1)], ids=str)
def test_cut_features_are_refused_by_name(cut, package, features):
    model = pytest.importorskip(package, reason="freezes torchvision's networks").efficientnet_b0()
    model.features = model.features[cut]
    with pytest.raises(ValueError, match=r"features: expected all layers from the stem to the head .* got \w+"):
        ek.freeze(model, features_only=features)


def test_a_cut_backbone_is_refused_by_name():
    backbone = small(features_only=True)
    for layers in range(len(backbone.features)):
        cut = copy.deepcopy(backbone)
        cut.features = cut.features[:layers]
        with pytest.raises(ValueError, match="features: expected all layers from the stem"):
            ek.freeze(cut)


def test_parts_of_other_packages_that_it_refuses():
    model = third_party("timm", "efficientnet_b0")
    model.blocks[2][0].bn2.act = nn.GELU()
    with pytest.raises(ValueError, match=r"blocks\.2\.0: bn2\.act is a GELU|blocks\.2\.0: act is a GELU"):
        ek.freeze(model)


def test_networks_without_a_classifier():
    x = torch.randn(2, 3, 64, 64)
    model = third_party("efficientnet_pytorch", "efficientnet-b0", include_top=False)
    assert_close(ek.freeze(model)(x), eager(model, x))
    assert ek.freeze(model)(x).shape == (2, 1280, 1, 1)
    assert len(ek.freeze(model, features_only=True)(x)) == 5
    model = third_party("timm", "efficientnet_b0", num_classes=0, global_pool="")
    assert_close(ek.freeze(model)(x), eager(model, x))
