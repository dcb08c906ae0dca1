"""accelerate(): other packages' networks with the same numbers, keys and classes, and what people do with them."""

import copy
import functools
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from conftest import (
    TOLERANCES,
    assert_buffers_close,
    assert_close,
    assert_gradients_close,
    copies,
    randomize,
    relative_rms,
)
from torch import nn

import effnet_kernels as ek
from effnet_kernels.interop.accelerated_classes import AcceleratedBlock, pair_of

tv = pytest.importorskip("torchvision.models", reason="accelerates torchvision's networks, the extra 'third-party'")
timm = pytest.importorskip("timm", reason="accelerates timm's networks, the extra 'third-party'")
lukemelas = pytest.importorskip("efficientnet_pytorch", reason="accelerates its networks, the extra 'third-party'")

pytestmark = pytest.mark.usefixtures("one_thread")

# A network, and how many of its blocks are switched.
NETWORKS = {
    "torchvision efficientnet_b0": (lambda: tv.efficientnet_b0(), 18),
    "torchvision efficientnet_v2_s": (lambda: tv.efficientnet_v2_s(), 42),
    "torchvision mobilenet_v2": (lambda: tv.mobilenet_v2(), 19),
    "torchvision mobilenet_v3_small": (lambda: tv.mobilenet_v3_small(), 13),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0", drop_path_rate=0.2), 16),
    "timm tf_efficientnet_b0": (lambda: timm.create_model("tf_efficientnet_b0", drop_path_rate=0.2), 16),
    "timm tf_efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), 16),
    "timm tf_efficientnetv2_b0": (lambda: timm.create_model("tf_efficientnetv2_b0"), 21),
    "timm mobilenetv2_050": (lambda: timm.create_model("mobilenetv2_050"), 17),
    "timm mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), 12),
    "timm mnasnet_small": (lambda: timm.create_model("mnasnet_small"), 15),
    "efficientnet_pytorch b0": (lambda: lukemelas.EfficientNet.from_name("efficientnet-b0"), 16),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(NETWORKS[name][0]())


def small() -> nn.Module:
    """A network of two blocks and a stem, of torchvision's classes."""
    from torchvision.models.efficientnet import MBConvConfig

    torch.manual_seed(0)
    settings = [MBConvConfig(1, 3, 1, 16, 16, 1), MBConvConfig(4, 5, 2, 16, 24, 2)]
    return randomize(tv.EfficientNet(settings, dropout=0.2, last_channel=64, num_classes=5))


def switched(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, AcceleratedBlock)]


def backends(model: nn.Module, x: torch.Tensor) -> list[str]:
    return [row.backend for row in ek.explain(model, x) if "MBConv" in row.module]


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    y = model(x)
    y.square().mean().backward()
    return y.detach()


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """An untouched copy, and the model accelerated."""
    return copy.deepcopy(model), ek.accelerate(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_inference_computes_the_same(name: str) -> None:
    untouched, model = pair(network(name).eval())
    assert len(switched(model)) == NETWORKS[name][1]
    assert list(model.state_dict()) == list(untouched.state_dict())
    for (key, a), (_, b) in zip(model.named_modules(), untouched.named_modules(), strict=True):
        assert isinstance(a, type(b)), key
    for size in ((64, 64), (65, 97)):
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected = untouched(x)
            assert_close(model(x), expected)
            assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected)


# Training BatchNorms magnify rounding where they normalise few values a channel: in the networks and on the images
# below torch's own outputs are up to 1e-5 off those in float64.
MAGNIFIED = 1e-4
# ReLU's derivative jumps, and a rounding decides to which side: of such networks gradients agree only on the whole.
KINKED = 5e-2
SMOOTH = [n for n in NETWORKS if "efficientnet" in n and "lite" not in n and "v2_s" not in n]


@pytest.mark.parametrize(
    "name", [*SMOOTH, "torchvision mobilenet_v2", "timm tf_efficientnet_lite0", "timm mnasnet_small"]
)
def test_training_computes_the_same(name: str) -> None:
    """Outputs, gradients, running statistics, and the draws of dropout and stochastic depth."""
    untouched, model = pair(network(name).train())
    x = torch.randn(4, 3, 96, 96)
    assert_close(step(model, x), step(untouched, x), tolerance=MAGNIFIED)
    if name in SMOOTH:
        assert_gradients_close(model, untouched)
    else:
        assert_close(gradients(model), gradients(untouched), tolerance=KINKED)
    assert_buffers_close(model, untouched, tolerance=MAGNIFIED)


def test_restore_undoes_it_exactly() -> None:
    model = small()
    before = [(type(module), dict(module.__dict__)) for module in model.modules()]
    assert ek.restore(ek.accelerate(model)) is model
    for (kind, attributes), module in zip(before, model.modules(), strict=True):
        assert type(module) is kind
        assert module.__dict__.keys() == attributes.keys()


def test_a_block_may_be_in_several_places() -> None:
    untouched = tv.mobilenet_v2().eval()
    model = copy.deepcopy(untouched)
    places = ek.accelerate(nn.ModuleDict({"whole": model, "part": model.features[:4]})).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(places["part"](x), untouched.features[:4].eval()(x))
        assert_close(places["whole"](x), untouched(x))
    assert {type(module) for module in ek.restore(places).modules()} == {
        nn.ModuleDict,
        *(type(module) for module in untouched.modules()),
    }


def test_switching_twice_changes_nothing() -> None:
    model = ek.accelerate(small())
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in ek.accelerate(model).modules()] == kinds


def test_copies_and_pickles() -> None:
    model, x = ek.accelerate(small().eval()), torch.randn(1, 3, 32, 32)
    for other in copies(model):
        assert len(switched(other)) == len(switched(model)) == 5
        assert list(map(type, other.modules())) == list(map(type, model.modules()))
        assert torch.equal(other(x), model(x))
    for block in switched(model):
        assert pickle.loads(pickle.dumps(type(block))) is type(block)


def test_another_process_reads_a_pickle(tmp_path) -> None:
    model, x = ek.accelerate(small().eval()), torch.randn(1, 3, 32, 32)
    torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "saved.pt")
    script = f"import torch; s = torch.load({str(tmp_path / 'saved.pt')!r}, weights_only=False); "
    script += "torch.testing.assert_close(s['model'](s['x']), s['y'])"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_subclass_that_keeps_the_forward_is_known() -> None:
    from torchvision.models.efficientnet import MBConv

    model = small()
    block = model.features[1][0]
    block.__class__ = type("Tagged", (MBConv,), {})
    assert isinstance(ek.accelerate(model).features[1][0], AcceleratedBlock)
    other = small()
    other.features[1][0].__class__ = type(
        "Doubled", (MBConv,), {"forward": lambda self, x: MBConv.forward(self, 2 * x)}
    )
    assert not isinstance(ek.accelerate(other).features[1][0], AcceleratedBlock)


@pytest.mark.parametrize("place", ["the class", "the instance", "a child"])
@pytest.mark.parametrize("name", ["fused", "original", "method", "adapter", "scripted", "chain_spec", "pairs"])
def test_attributes_whose_names_accelerated_classes_use(name: str, place: str) -> None:
    """They mean what they meant: of a block, of a sequence of blocks, and of a network."""

    class Block(type(small().features[1][0])):
        pass

    class Network(timm.models.efficientnet.EfficientNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y if getattr(self, name, None) is None else 2 * y

    def give(module: nn.Module) -> None:
        if place == "the class":
            type.__setattr__(type(module), name, 1)
        elif place == "the instance":
            module.__dict__[name] = 1
        else:
            module.add_module(name, nn.Identity())

    model = small().eval()
    block = model.features[1][0]
    block.__class__ = Block
    give(block)
    own = timm.create_model("efficientnet_lite0")
    own.__class__ = Network
    give(own)
    inner = nn.Sequential(copy.deepcopy(block), copy.deepcopy(model.features[2]))
    if place != "the class":
        give(inner)
    for made, shape in ((model, (1, 3, 32, 32)), (own.eval(), (1, 3, 32, 32)), (inner, (1, 16, 9, 9))):
        untouched, accelerated = pair(made)
        x = torch.randn(shape)
        with torch.no_grad():
            assert_close(accelerated(x), untouched(x))
    assert isinstance(block, AcceleratedBlock) == (name == "pairs")
    if name != "pairs":
        assert f"an attribute {name!r} of its own" in str(ek.explain(model))


@pytest.mark.parametrize(
    ("path", "part", "reason"),
    [
        ("features.2.0.block.1.2", nn.Mish(), "block.1.2 is a Mish"),
        ("features.2.0.block.1.1", nn.GroupNorm(4, 64), "block.1.1 is a GroupNorm"),
        ("features.2.0.block.2", nn.Identity(), "block.2 is a Identity"),
        ("features.2.0.block.2.scale_activation", nn.Tanh(), "scale_activation is a Tanh"),
        ("features.2.0.stochastic_depth", nn.Dropout(0.1), "stochastic_depth is a Dropout"),
        ("features.2.0.block.0.0", nn.Conv2d(16, 64, 1, padding=1), "pads a 1x1 convolution"),
    ],
)
def test_an_unknown_part_leaves_its_block_alone_with_a_reason(path: str, part: nn.Module, reason: str) -> None:
    model = small()
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
    ek.accelerate(model)
    assert not isinstance(model.features[2][0], AcceleratedBlock)
    assert len(switched(model)) == 4
    rows = {row.name: row for row in ek.explain(model)}
    assert rows["features.2.0"].backend == "torch"
    assert reason in rows["features.2.0"].reason
    assert rows["features.2.1"].backend == "cpu"


def test_nothing_to_switch_warns() -> None:
    with pytest.warns(UserWarning, match="nothing in Linear"):
        ek.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        ek.accelerate("efficientnet_b0")  # type: ignore[type-var]


def test_explain_without_an_input() -> None:
    model = small()
    assert {row.reason for row in ek.explain(model) if "MBConv" in row.module} == {"not accelerated"}
    assert {row.backend for row in ek.explain(ek.accelerate(model)) if "MBConv" in row.module} == {"cpu"}


def forward_hook(block: nn.Module, calls: list[str]):
    return block.get_submodule("block.0.0").register_forward_hook(lambda *_: calls.append("hook"))


def backward_hook(block: nn.Module, calls: list[str]):
    return block.get_submodule("block.1").register_full_backward_hook(lambda *_: calls.append("hook"))


def global_hook(block: nn.Module, calls: list[str]):
    return nn.modules.module.register_module_forward_hook(lambda *_: calls.append("hook"))


@pytest.mark.parametrize("register", [forward_hook, backward_hook, global_hook])
def test_hooks_inside_a_block_fire(register) -> None:
    untouched, model = pair(small())
    x = torch.randn(2, 3, 32, 32)
    assert backends(model, x) == ["cpu"] * 3
    calls: list[str] = []
    handle = register(model.features[1][0], calls)
    assert backends(model, x)[0] == "torch"
    step(model, x)
    assert calls
    handle.remove()
    assert backends(model, x) == ["cpu"] * 3
    del calls[:]
    step(untouched, x)
    assert_close(step(model.eval(), x), step(untouched.eval(), x))
    assert not calls


def test_hooks_on_a_block_fire() -> None:
    model, seen = ek.accelerate(small().eval()), []
    handle = model.features[1][0].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    model(torch.randn(1, 3, 32, 32))
    handle.remove()
    assert seen == [(1, 16, 16, 16)]


def parametrized(model: nn.Module) -> None:
    from torch.nn.utils.parametrizations import weight_norm

    weight_norm(model.features[1][0].block[0][0])


def pruned(model: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.features[1][0].block[0][0], "weight", 0.5)


def sharded(model: nn.Module) -> None:
    """What FSDP leaves of a parameter while a module runs: an attribute."""
    conv = model.features[1][0].block[0][0]
    weight = conv.weight
    del conv.weight
    conv.weight = weight.data.view_as(weight)


def subclassed(model: nn.Module) -> None:
    class Marked(nn.Parameter):
        pass

    conv = model.features[1][0].block[0][0]
    conv._parameters["weight"] = conv.weight.detach().as_subclass(Marked)


@pytest.mark.parametrize("change", [parametrized, pruned, sharded, subclassed])
@pytest.mark.parametrize("before", [True, False])
def test_weights_that_are_not_plain_make_a_block_compute_as_it_did(change, before: bool) -> None:
    untouched, model = small().eval(), small().eval()
    change(untouched)
    if before:
        change(model)
    ek.accelerate(model)
    if not before:
        change(model)
    x = torch.randn(2, 3, 32, 32)
    assert backends(model, x) == ["torch", "cpu", "cpu"]
    with torch.no_grad():
        assert_close(model(x), untouched(x))


@pytest.mark.parametrize("before", [True, False])
def test_sync_batch_norm_conversion(before: bool) -> None:
    """In one process it is BatchNorm; tests/test_distributed.py has several."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    untouched, model = small(), small()
    x = torch.randn(2, 3, 32, 32)
    model = ek.accelerate(convert(model)) if before else convert(ek.accelerate(model))
    assert backends(model, x) == ["cpu"] * 3
    assert_close(step(model, x), step(untouched, x))
    assert_gradients_close(model, untouched)
    assert_buffers_close(model, untouched)
    with torch.no_grad():
        assert_close(model.eval()(x), untouched.eval()(x))


def test_frozen_parts() -> None:
    """BatchNorms in eval mode while the rest trains, and parameters without gradients."""
    untouched, model = pair(small())
    for each in (untouched, model):
        each.train()
        for module in each.features[1].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for parameter in each.features[:2].parameters():
            parameter.requires_grad = False
    x = torch.randn(4, 3, 64, 64)
    assert_close(step(model, x), step(untouched, x))
    assert backends(model, x) == ["cpu"] * 3
    assert_gradients_close(model, untouched)
    assert_buffers_close(model, untouched)


def test_an_optimizer_built_before_trains_the_model() -> None:
    models, losses = [small(), small()], []
    x, target = torch.randn(8, 3, 64, 64), torch.randint(5, (8,))
    for model, accelerates in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        if accelerates:
            ek.accelerate(model)
        torch.manual_seed(3)
        own = []
        for _ in range(4):
            loss = nn.functional.cross_entropy(model.train()(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averaged.update_parameters(model)
            own.append(loss.item())
        losses.append(own)
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCES[torch.float32])


def test_checkpointing() -> None:
    torch.manual_seed(0)
    untouched, model = pair(randomize(timm.create_model("efficientnet_b0")).train())
    model.set_grad_checkpointing()
    x = torch.randn(4, 3, 64, 64)
    assert_close(step(model, x), step(untouched, x), tolerance=MAGNIFIED)
    assert_gradients_close(model, untouched)


@pytest.fixture
def _one_process(tmp_path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel() -> None:
    untouched, model = pair(small())
    x = torch.randn(4, 3, 64, 64)
    assert_close(step(nn.parallel.DistributedDataParallel(model), x), step(untouched, x))
    assert_gradients_close(model, untouched)


@pytest.mark.usefixtures("_one_process")
def test_fully_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    untouched, model = pair(small())
    mesh = init_device_mesh("cpu", (1,))
    for part in (*model.features, model):
        fully_shard(part, mesh=mesh)
    x = torch.randn(4, 3, 64, 64)
    assert_close(step(model, x), step(untouched, x))
    sharded = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    assert_close(sharded, gradients(untouched))


@pytest.mark.parametrize("training", [True, False])
def test_compile_and_export(training: bool) -> None:
    untouched, model = pair(small().train(training))
    for module in [*untouched.modules(), *model.modules()]:
        if type(module).__name__ in ("StochasticDepth", "Dropout"):
            module.p = 0.0
    x = torch.randn(2, 3, 64, 64)
    expected = untouched(x)
    assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    program = torch.export.export(model, (x,))
    assert "effnet_kernels" not in str(program.graph)
    assert_close(program.module()(x), model(x))


SCRIPTED = {
    **{name: make for name, (make, _) in NETWORKS.items() if "efficientnet_pytorch" not in name},
    "small": small,
    "maps": lambda: timm.create_model("efficientnet_b0", features_only=True),
    "maps of MobileNetV3": lambda: timm.create_model("mobilenetv3_small_050", features_only=True),
    "one block": lambda: small().features[2][0],
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripting_compiles_the_blocks_own_forward(name: str, training: bool) -> None:
    torch.manual_seed(0)
    untouched, model = pair(randomize(SCRIPTED[name]()).train(training))
    kinds = [type(module) for module in model.modules()]
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    x = torch.randn(2, 16 if name == "one block" else 3, 64, 64)
    actual, expected = [], []
    for outputs, of in ((actual, scripted), (expected, untouched)):
        torch.manual_seed(1)
        y = of(x)
        outputs.extend([y] if isinstance(y, torch.Tensor) else y)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)
    assert_buffers_close(scripted, untouched)
    # The model that was scripted is as it was.
    assert [type(module) for module in model.modules()] == kinds


def test_torch_func() -> None:
    untouched, model = pair(small().eval())
    parameters, x = dict(model.named_parameters()), torch.randn(2, 3, 32, 32)

    def loss(values, network):
        return torch.func.functional_call(network, values, (x,)).square().mean()

    expected, actual = (torch.func.grad(loss)(parameters, network) for network in (untouched, model))
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)


def test_static_padding_is_carried_layer_by_layer() -> None:
    """efficientnet_pytorch pads for a nominal size, whatever the size of the image is."""
    torch.manual_seed(0)
    model = lukemelas.EfficientNet.from_name("efficientnet-b1", image_size=240)
    untouched, model = pair(randomize(model).eval())
    x = torch.randn(1, 3, 117, 90)
    with torch.inference_mode():
        assert_close(model(x), untouched(x))


@pytest.mark.parametrize("memory_efficient", [True, False])
def test_swish_may_be_set(memory_efficient: bool) -> None:
    model = ek.accelerate(network("efficientnet_pytorch b0").eval())
    model.set_swish(memory_efficient)
    assert backends(model, torch.randn(1, 3, 32, 32)) == ["cpu"] * 16


def test_feature_maps() -> None:
    torch.manual_seed(0)
    model = randomize(timm.create_model("tf_efficientnet_b0", features_only=True, out_indices=(1, 2, 4)))
    untouched, model = pair(model.eval())
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    expected, actual = untouched(x), model(x)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)
    assert_close(*(torch.autograd.grad([y.mean() for y in maps], x)[0] for maps in (actual, expected)))


def test_detection_pyramid() -> None:
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    backbone = tv.efficientnet_b0().features
    torch.manual_seed(0)
    body = randomize(BackboneWithFPN(backbone, {"2": "0", "3": "1", "5": "2"}, [24, 40, 112], 32).eval())
    untouched, model = pair(body)
    x = torch.randn(1, 3, 96, 96)
    expected, actual = untouched(x), model(x)
    assert list(actual) == list(expected)
    for name, y in expected.items():
        assert_close(actual[name], y)
    for each in (untouched, model):
        sum(y.square().mean() for y in each(x).values()).backward()
    assert_gradients_close(model, untouched)


@pytest.mark.parametrize("encoder", ["timm-efficientnet-b0", "efficientnet-b0"])
def test_segmentation(encoder: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="accelerates an encoder of its")
    torch.manual_seed(0)
    untouched, model = pair(randomize(smp.Unet(encoder, encoder_weights=None)).train())
    assert len(switched(model)) == 16
    x = torch.randn(4, 3, 64, 64)
    assert_close(step(model, x), step(untouched, x), tolerance=MAGNIFIED)
    # The decoder's activation is ReLU.
    assert_close(gradients(model), gradients(untouched), tolerance=KINKED)
    assert_buffers_close(model, untouched, tolerance=MAGNIFIED)


def test_detection() -> None:
    effdet = pytest.importorskip("effdet", reason="accelerates a backbone of its")
    torch.manual_seed(0)
    config = effdet.get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (128, 128)
    model = effdet.EfficientDet(config, pretrained_backbone=False)
    untouched, model = pair(randomize(model).eval())
    assert len(switched(model)) > 15
    x = torch.randn(1, 3, 128, 128)
    for actual, expected in zip(model(x), untouched(x), strict=True):
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b)
    for each in (untouched, model):
        sum(y.square().mean() for maps in each(x) for y in maps).backward()
    assert_close(gradients(model), gradients(untouched))


@pytest.mark.parametrize(
    ("name", "stem", "head"),
    [("timm efficientnet_b0", "conv_stem", "conv_head"), ("efficientnet_pytorch b0", "_conv_stem", "_conv_head")],
)
def test_stem_and_head_of_networks_that_have_no_blocks_for_them(name: str, stem: str, head: str) -> None:
    untouched, model = pair(network(name).eval())
    x = torch.randn(1, 3, 64, 64)
    rows = {row.name: row for row in ek.explain(model, x)}
    assert rows[stem].backend == rows[head].backend == "cpu"
    assert not [row for row in rows if row.startswith(("bn", "_bn"))]
    for other in (model, *copies(model)):
        assert_close(other(x), untouched(x))
        assert list(other.state_dict()) == list(untouched.state_dict())
    calls: list[str] = []
    handle = model.get_submodule(stem).register_forward_hook(lambda *_: calls.append("hook"))
    assert_close(model(x), untouched(x))
    assert calls
    handle.remove()
    with torch.no_grad():
        for each in (model, untouched):
            setattr(each, stem, copy.deepcopy(each.get_submodule(stem)))
            each.get_submodule(stem).weight.mul_(0.5)
    assert_close(model(x), untouched(x))
    assert type(ek.restore(model)) is type(untouched)


def test_a_network_with_its_own_way_through_the_stem_keeps_it() -> None:
    class Halved(timm.models.efficientnet.EfficientNet):
        def forward_features(self, x):
            return super().forward_features(x) / 2

    torch.manual_seed(0)
    model = randomize(timm.create_model("efficientnet_b0")).eval()
    model.__class__ = Halved
    untouched, model = pair(model)
    assert type(model) is Halved
    x = torch.randn(1, 3, 64, 64)
    assert_close(model(x), untouched(x))


@pytest.mark.parametrize("name", ["torchvision", "timm", "timm features", "efficientnet_pytorch"])
def test_switching_while_other_threads_call(name):
    import timm
    from efficientnet_pytorch import EfficientNet
    from torchvision.models import efficientnet_b0

    makers = {
        "torchvision": efficientnet_b0,
        "timm": lambda: timm.create_model("test_efficientnet"),
        "timm features": lambda: timm.create_model("test_efficientnet", features_only=True),
        "efficientnet_pytorch": lambda: EfficientNet.from_name("efficientnet-b0"),
    }
    model, x = randomize(makers[name]()).eval(), torch.randn(1, 3, 32, 32)
    expected = model(x)
    stop, failures, calls = threading.Event(), [], []

    def call():
        while not stop.is_set():
            try:
                with torch.no_grad():
                    y = model(x)
                pairs = zip(y, expected, strict=True) if isinstance(y, list) else [(y, expected)]
                assert all(relative_rms(a, b) <= TOLERANCES[b.dtype] for a, b in pairs)
                calls.append(1)
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(calls) < 60 and not failures:
        ek.accelerate(model)
        ek.restore(model)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def ways_through_a_network():
    """Every method by which networks of other packages call their stem and head."""
    import timm
    from efficientnet_pytorch import EfficientNet

    def forward(model, x):
        return [model(x)]

    def intermediates(model, x):
        last, maps = model.forward_intermediates(x, norm=False)
        return [last, *maps]

    def checkpointed(model, x):
        model.set_grad_checkpointing()
        return [model(x)]

    ways = {}
    for name in ("test_efficientnet", "mobilenetv3_small_050"):
        for way in (forward, intermediates, checkpointed):
            ways[f"{name}, {way.__name__}"] = lambda name=name: timm.create_model(name, num_classes=3), way
        ways[f"{name}, stop early"] = (
            lambda name=name: timm.create_model(name, num_classes=3),
            lambda m, x: m.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True),
        )
        ways[f"{name}, features"] = lambda name=name: timm.create_model(name, features_only=True), lambda m, x: m(x)
    for method in ("forward", "extract_features", "extract_endpoints"):
        ways[f"efficientnet_pytorch, {method}"] = (
            lambda: EfficientNet.from_name("efficientnet-b0"),
            lambda m, x, method=method: list(y.values()) if isinstance(y := getattr(m, method)(x), dict) else [y],
        )
    return ways


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ways_through_a_network())
def test_every_way_through_a_network_runs_stem_and_head_on_the_operators(name, training):
    make, way = ways_through_a_network()[name]
    model = randomize(make()).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
            module.eval()
    theirs, x = copy.deepcopy(model), torch.randn(4, 3, 96, 96)
    ek.accelerate(model)
    if not hasattr(model, "pairs"):
        pytest.fail(f"{type(model)} is not accelerated as a network")
    calls = []
    for index in range(len(model.pairs)):
        pair_of(model, index).register_forward_hook(lambda module, *_: calls.append(ek.explain(module)[0].backend))
    torch.manual_seed(1)
    ours = way(model, x)
    torch.manual_seed(1)
    expected = way(theirs, x)
    reached = 1 if "stop early" in name else len(model.pairs)
    assert calls == ["cpu"] * reached
    for y, right in zip(ours, expected, strict=True):
        assert_close(y, right, MAGNIFIED)
    sum(y.square().sum() for y in ours).backward()
    sum(y.square().sum() for y in expected).backward()
    assert_gradients_close(model, theirs)


# The last has a dense convolution of many channels, which is torch's own.
@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "tf_efficientnet_lite0", "mobilenet_v3_large", "efficientnet_v2_b0"]
)
@pytest.mark.parametrize("mode", ["inference", "training", "frozen"])
def test_profilers_count_the_convolutions(name, mode):
    from torch.utils.flop_counter import FlopCounterMode

    torchvision = pytest.importorskip("torchvision.models")
    model = torchvision.mobilenet_v3_large() if name.startswith("mobile") else getattr(ek, name)()
    model, x = randomize(model).train(mode == "training"), torch.randn(2, 3, 50, 40)
    counts = []
    for backend in ("torch", "cpu", "reference"):
        run = model
        if backend != "torch":
            run = ek.freeze(model) if mode == "frozen" else ek.accelerate(model)
        with torch.set_grad_enabled(mode == "training"), ek.use_backend(backend):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
                run(x)
            events = profile.key_averages()
            # The classifier is a matrix product in torch, and a convolution of one pixel in an engine.
            counts.append(sum(e.flops for e in events if e.key in ("aten::conv2d", "aten::addmm", "aten::mm")))
            with FlopCounterMode(display=False) as counter:
                model(x)
            assert counter.get_total_flops() == counts[0] > 0
    assert counts[0] == counts[1] == counts[2]
    found = {e.key for e in events}
    assert "ChainFunction" in found if mode == "training" else any(k.startswith("effnet_kernels::") for k in found)


INNER_CLASSES = ("Sequential", "Conv2d", "BatchNorm2d", "SiLU", "AdaptiveAvgPool2d", "Sigmoid")


@pytest.mark.parametrize("after_a_call", [False, True])
@pytest.mark.parametrize("patched", ["the block's", "squeeze-and-excitation's", *INNER_CLASSES])
@pytest.mark.parametrize("package", ["effnet_kernels", "torchvision"])
def test_a_class_that_is_patched_computes_as_it_was_patched(package, patched, after_a_call, monkeypatch):
    from torchvision.models.efficientnet import MBConv, MBConvConfig
    from torchvision.ops import SqueezeExcitation

    if package == "torchvision":
        classes = {"the block's": MBConv, "squeeze-and-excitation's": SqueezeExcitation}
        block = MBConv(MBConvConfig(4, 3, 1, 8, 8, 1, 1.0, 1.0), 0.0, nn.BatchNorm2d)
    else:
        classes = {"the block's": ek.MBConv, "squeeze-and-excitation's": ek.SqueezeExcitation}
        block = ek.MBConv(ek.MBConvConfig(4, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d)
    kind, x = classes.get(patched) or getattr(nn, patched), torch.randn(2, 8, 9, 9)
    block = randomize(block).eval()
    theirs = copy.deepcopy(block)
    if package == "torchvision":
        ek.accelerate(block)
    if after_a_call:
        block(x)
    # What forward calls of its own class is as good a place for a patch.
    method = {"Conv2d": "_conv_forward", "squeeze-and-excitation's": "_scale"}.get(patched, "forward")
    method = method if hasattr(kind, method) else "forward"
    own = getattr(kind, method)
    # functools.wraps names the module of what it wraps as the wrapper's own.
    monkeypatch.setattr(kind, method, functools.wraps(own)(lambda self, x, *more: 1.1 * own(self, x, *more)))
    with torch.no_grad(), ek.use_backend("torch"):
        expected = theirs(x)
    with torch.no_grad():
        assert_close(block(x), expected)
    if patched != "the block's" or package == "torchvision":
        assert f"had its {method} replaced" in next(iter(ek.explain(block))).reason


def test_lazily_negated_statistics_are_torchs_to_move():
    from torchvision.models.efficientnet import MBConv, MBConvConfig

    block = randomize(MBConv(MBConvConfig(4, 3, 1, 16, 16, 1), 0.0, nn.BatchNorm2d)).train()
    theirs, x = copy.deepcopy(block), torch.randn(2, 16, 9, 9)
    ek.accelerate(block)
    for module in (block, theirs):
        norm = module.block[0][1]
        norm.running_var = torch._neg_view(-norm.running_var.detach())
        module(x)
    assert_buffers_close(block, theirs)


def test_a_model_whose_blocks_are_all_left_alone_says_why() -> None:
    import torchvision

    model = torchvision.models.efficientnet_b0(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    with pytest.warns(
        UserWarning, match=r"left alone all 18 blocks that it knows, features\.0 because .*FrozenBatchNorm"
    ):
        ek.accelerate(model)
    with pytest.warns(UserWarning, match="found nothing in Linear that it could switch$"):
        ek.accelerate(nn.Linear(2, 2))


def test_explain_wants_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"expected the model's input as a tensor .* got tuple"):
        ek.explain(nn.Linear(2, 2), (1, 3, 64, 64))
