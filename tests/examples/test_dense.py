"""The dense examples: shapes and masks by hand, refusals, and each task whole on a few composites."""

import dataclasses
import importlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dense_runs
from dense_models import Recipe
from dense_runs import Key, Result
from run_log import Log
from tests.examples.test_dense_data import write_fashion

ROOT = Path(__file__).parents[2]
TASKS = ("features", "segmentation", "detection")


@pytest.fixture
def example():
    """A module by the name of its task: their libraries take seconds to import, which the first tier has not."""
    return lambda task: importlib.import_module(f"dense_{task}")


def result(first, second, millions=0.5):
    return Result(first, second, millions, 9.0, "2026-11-26", "2.15.0", "x86_64", "timm 1")


def table_of(results, rows, columns=("mIoU", "accuracy")):
    task = type("Rows", (), {"rows": rows, "columns": columns})
    return dense_runs.format_table(task, results).splitlines()


def test_table():
    rows = [("linear head", "raw patches"), ("FPN", "SDT-H"), ("FPN", "RMT")]
    results = {Key("FPN", "SDT-H", seed): result(30.0 + seed, 80.0) for seed in range(3)}
    results[Key("linear head", "raw patches", 0)] = result(12.5, math.nan, 0.0738)
    assert table_of(results, rows) == [
        "| framework | backbone | parameters | mIoU | accuracy |",
        "|---|---|---|---|---|",
        "| linear head | raw patches | 0.07 M | 12.50 (1) | - |",
        "| FPN | SDT-H | 0.50 M | 31.00 ± 1.00 (3) | 80.00 ± 0.00 (3) |",  # RMT has not been run
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data"),
        (["--data", "x", "--epochs", "0"], "must be a whole number >= 1: got '0'"),
        (["--data", "x", "--seeds", "many"], "must be a whole number >= 1: got 'many'"),
        (["--data", "x", "--output", __file__], "must be a folder"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        dense_runs.parse_arguments("segmentation", Recipe(), arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_rows():
    rows = dense_runs.dense_rows("FPN", "UperNet")
    assert len(rows) == len(set(rows)) == 9
    names = {Key(*row, seed).name for row in rows for seed in range(2)}
    assert len(names) == 18
    assert not [name for name in names if re.search(r"[^\w.+()-]", name)]  # they name files


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_empty_folder_is_refused(task, example, tmp_path):
    with pytest.raises(SystemExit, match="must hold Fashion-MNIST"):
        example(task).main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_runs, "NUM_TEST", 6)
    (tmp_path / "data").mkdir()
    return write_fashion(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The hypothesis was not met")
@pytest.mark.parametrize("task", TASKS)
def test_main(task, example, fashion, tmp_path, monkeypatch, capsys):
    module, output = example(task), tmp_path / "out"
    rows = [module.TASK.rows[number] for number in (0, 1, -2)]  # the head, and one row of each framework
    monkeypatch.setattr(module, "TASK", dataclasses.replace(module.TASK, rows=rows))
    arguments = ["--data", str(fashion), "--images", "16", "--epochs", "1", "--seeds", "1", "--output", str(output)]
    results = module.main(arguments)
    assert [(key.framework, key.backbone) for key in results] == rows
    assert all(0 <= of.first <= 100 for of in results.values())
    table = (output / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert all(f"| {framework} | {backbone} |" in table for framework, backbone in rows)
    assert (output / "predictions.png").read_bytes().startswith(b"\x89PNG")
    # Again: nothing is trained, and the table is the same. With other data it is refused.
    monkeypatch.setattr(dense_runs.dense_models, "train", None)
    assert module.main(arguments).keys() == results.keys()
    assert (output / "table.md").read_text(encoding="utf-8") == table
    with pytest.raises(SystemExit, match="must have results of this configuration"):
        module.main([*arguments, "--images", "17"])


@pytest.mark.slow
def test_a_linear_head_sees_one_patch_alone(example):
    model = example("segmentation").RawPatches()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    model(images)[0, 1, 17, 42].backward()
    rows, columns = images.grad.abs().sum((0, 1)).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 23, 40, 47)


@pytest.mark.slow
def test_regions_become_boxes(example):
    detection = example("detection")
    logits = torch.zeros(len(detection.CLASSES), 64, 64)
    logits[0] = 5
    logits[2, 10:20, 30:36] = logits[4, 40:45, 0:4] = 9  # the second has 20 pixels: too few
    (found,) = (detection.RawRegions()._regions(logits.softmax(0)),)
    assert found["boxes"].tolist() == [[30, 10, 36, 20]]
    assert found["labels"].tolist() == [2]
    assert found["scores"].item() > 0.9


@pytest.mark.slow
def test_right_boxes_have_an_ap_of_100(example, fashion):
    detection, data = example("detection"), importlib.import_module("dense_data")
    test = data.compose(data.load_pieces(fashion)[1], 6, seed=0)

    class Right:
        def predict(self, images):
            assert torch.equal(images, test.images)
            pairs = zip(test.boxes, test.labels, strict=True)
            return [{"boxes": box, "labels": label, "scores": torch.ones(len(box))} for box, label in pairs]

    assert detection.measure(None, Right(), test) == (100, 100)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["SDT-H", "ViT, swapped"])
@pytest.mark.parametrize("name", ["Faster", "RTDetr"])
def test_gates_of_a_detector_learn(name, backbone, example, fashion):
    detection, data = example("detection"), importlib.import_module("dense_data")
    train = data.compose(data.load_pieces(fashion)[0], 4, seed=0)
    model = getattr(detection, name)(backbone)
    model.train()
    model.loss(train.images, train.boxes, train.labels).backward()
    gates = [weight.grad for name, weight in model.named_parameters() if ".gate." in name]
    assert gates
    assert all(gate is not None and gate.any() for gate in gates)


@pytest.mark.slow
def test_patch_masks(example):
    masks = torch.zeros(2, 64, 64, dtype=torch.int64)
    masks[0, :8, :4] = 3  # half of a patch
    masks[1, :8, :3] = 5  # less
    masks[1, 8:24, 8:16] = 5
    patches = example("features").patch_masks(masks)
    assert patches.shape == (2, 8, 8)
    assert patches[0].nonzero().tolist() == [[0, 0]]
    assert patches[0, 0, 0] == 3
    assert patches[1].nonzero().tolist() == [[1, 1], [2, 1]]
    assert patches[1, 1, 1] == 5


@pytest.mark.slow
def test_training_never_sees_a_mask_and_the_classifier_stays_frozen(example, fashion):
    features, data = example("features"), importlib.import_module("dense_data")
    train = data.compose(data.load_pieces(fashion)[0], 20, seed=0, num_pieces=(1, 1))
    models = []
    for masks in (train.masks, torch.zeros_like(train.masks)):
        torch.manual_seed(0)
        blank = type(train)(train.images, masks, train.boxes, train.labels)
        models.append(
            features.train_classifier(features.VARIANTS["LocAtViT (both)"], blank, Recipe(images=20, epochs=1), seed=0)
        )
    states = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not models[0].training
    assert not any(parameter.requires_grad for parameter in models[0].parameters())
    head = features.LinearHead(models[0])
    head.fit(train.images, features.patch_masks(train.masks))
    assert head.predict(train.images).shape == (20, 8, 8)
    assert all(torch.equal(value, states[0][name]) for name, value in models[0].state_dict().items())


@pytest.mark.slow
def test_a_linear_head_learns_a_linear_rule_of_each_patch(example):
    features = example("features")
    images = torch.randint(256, (30, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bright = F.avg_pool2d(images[:, 0].float(), 8)
    masks = (bright > bright.median()).long()
    head = features.LinearHead(None)
    head.fit(images[:20], masks[:20])
    assert (head.predict(images[20:]) == masks[20:]).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_guide_has_the_results_that_are_kept(task, example, tmp_path):
    """Its tables are those of the CSVs, which were made with the configuration that the code has."""
    page = (ROOT / "docs" / "guides" / "dense.md").read_text(encoding="utf-8")
    folder, module = ROOT / "examples" / "results" / f"dense_{task}", example(task)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    here = dense_runs.configuration(module.TASK, module.TASK.recipe)
    assert {name: config[name] for name in here} == json.loads(json.dumps(here))
    shutil.copytree(folder, tmp_path / "kept")  # a log makes folders of its own
    results = Log(tmp_path / "kept", config, Key, Result).results()
    assert dense_runs.format_table(module.TASK, results) in page
