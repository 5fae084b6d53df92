"""python -m spatial_decay: the report, a self-check that finds what is wrong, the demo, and one line for bad input."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy
import pytest
import torch

import spatial_decay as sd
from spatial_decay.__main__ import main
from spatial_decay.command import check, demo
from spatial_decay.decay import AxialDecay
from spatial_decay.ops import tiled
from spatial_decay.ops.choice import BACKENDS
from spatial_decay.ops.formulas import FORMULAS


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    matplotlib.image.imsave(path, numpy.random.default_rng(0).random((40, 60, 3)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A backbone as integrations.hub saves it, of 4 x 6 patches."""
    hub = importlib.import_module("spatial_decay.integrations.hub")
    path = tmp_path_factory.mktemp("model") / "vit"
    hub.save_pretrained(sd.ViT(10, img_size=(16, 24), patch_size=4, dim=16, depth=2, num_heads=2, decay="full"), path)
    return path


@pytest.fixture
def one_kind(monkeypatch):
    monkeypatch.setattr(check, "_KINDS", ("full",))


class Room:
    """Backend tiled, but for what is said."""

    unsupported_reasons = staticmethod(tiled.unsupported_reasons)
    avoid_reasons = staticmethod(tiled.avoid_reasons)

    def __init__(self, attention):
        self.attention = attention


def wrong(inputs):
    return tiled.attention(inputs) * 1.1


def not_a_number(inputs):
    return tiled.attention(inputs) * float("nan")


def raising(_inputs):
    raise OSError("illegal\ninstruction")


def lacking(_inputs):
    raise NotImplementedError("The operator 'aten::polar' is not currently implemented for this device")


def test_report_and_self_check(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"spatial-decay {sd.__version__}\n")
    assert f"torch {torch.__version__.split('+')[0]}" in out
    assert "  triton cannot: q is on cpu (needs cuda)" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("  cpu  ")]
    assert {row[1] for row in rows} >= {"lowrank", "tiled", "sdpa", "math"}
    assert all(row[7:] == (["ok,", "of", "squared", "alone"] if row[1] == "lowrank" else ["ok"]) for row in rows)
    assert "All agree." in out


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        (wrong, "WRONG"),
        (not_a_number, "WRONG"),
        (raising, "FAILED: OSError: illegal instr"),
        (lacking, "FAILED: NotImplem"),
    ],
)
def test_self_check_finds_what_is_wrong(attention, said, monkeypatch, capsys, one_kind):
    monkeypatch.setitem(BACKENDS, "tiled", Room(attention))
    assert main([]) == 1
    out = capsys.readouterr().out
    assert [said in line for line in out.splitlines() if line.startswith("  cpu   tiled")] == [True, True]
    assert "NOT as they should be: tiled on cpu. Please report" in out


def test_each_pair_formula_is_checked():
    kinds = {type(check.example(kind, torch.float32, torch.device("cpu"))[3]) for kind in check._KINDS}
    assert kinds == {row.decay for row in FORMULAS.values() if row.decay is not None} | {AxialDecay}


@pytest.mark.slow
def test_all_backends_are_checked_when_asked_for(capsys, one_kind):
    assert main(["--all"]) == 0
    out = capsys.readouterr().out
    assert " flex " in out
    assert "no gradient here" in out  # flex on a CPU


def test_demo_draws(photo, folder, tmp_path, capsys):
    out = tmp_path / "reach.png"
    assert main(["demo", str(photo), "--model", str(folder), "--out", str(out)]) == 0
    said = f"Wrote {out}: ViT of {folder}, 2 of 2 layers with decay: 0 (blocks.0.attn), 1 (blocks.1.attn).\n"
    assert capsys.readouterr().out == said
    height, width, _ = matplotlib.image.imread(out).shape
    assert min(height, width) > 100


def test_demo_draws_four_layers_or_those_that_are_named(photo, folder, capsys):
    assert demo._chosen(None, 4) == [0, 1, 2, 3]
    assert demo._chosen(None, 14) == [0, 4, 8, 13]
    assert demo._chosen([5, 2], 14) == [5, 2]
    arguments = ["demo", str(photo), "--model", str(folder), "--layers", "0", "2"]
    assert_one_line(arguments, "--layers must be numbers from 0 to 1: got 0, 2.", capsys)


def config(tmp_path, **said):
    (tmp_path / "config.json").write_text(json.dumps(said))
    return tmp_path


def swapped(tmp_path, **said):
    (tmp_path / "spatial_decay.json").write_text("{}")
    return config(tmp_path, **said)


BAD_MODELS = {
    "is missing": None,
    "is not there. It must be a folder that save_swapped": lambda tmp_path: tmp_path / "nothing",
    "is a file. It must be a folder that save_swapped": lambda tmp_path: config(tmp_path) / "config.json",
    "holds no model with decay: no spatial_decay.json": lambda tmp_path: config(tmp_path, architectures=["ViTModel"]),
    "cannot be read: ": lambda tmp_path: (tmp_path / "config.json").write_bytes(b"{\xff") and tmp_path,
    'cannot be loaded: {folder}/config.json must hold "class"': lambda tmp_path: config(tmp_path, config={}),
    "is of SDTP, which takes latents": lambda tmp_path: config(tmp_path, **{"class": "SDTP"}, config={}),
    "is of diffusers' DiTTransformer2DModel": lambda tmp_path: swapped(tmp_path, _class_name="DiTTransformer2DModel"),
}


@pytest.mark.parametrize("said", BAD_MODELS)
def test_demo_says_what_is_wrong_with_a_model(said, photo, tmp_path, capsys):
    make = BAD_MODELS[said]
    model = [] if make is None else ["--model", str(make(tmp_path))]
    assert_one_line(["demo", str(photo), *model], said.format(folder=tmp_path), capsys)


def test_demo_says_what_is_wrong_with_a_photograph(folder, tmp_path, capsys):
    no_image = tmp_path / "photo.jpg"
    assert_one_line(["demo", str(no_image), "--model", str(folder)], f"{no_image} cannot be read as an image: ", capsys)
    no_image.write_text("hello")
    assert_one_line(["demo", str(no_image), "--model", str(folder)], "cannot identify image file", capsys)


def test_demo_says_what_is_wrong_with_the_picture(photo, folder, tmp_path, capsys):
    for name, said in (("no/reach.png", "there is no folder"), ("reach.docx", "docx")):
        out = tmp_path / name
        arguments = ["demo", str(photo), "--model", str(folder), "--out", str(out)]
        assert_one_line(arguments, f"{out} cannot be written: ", capsys, said)


def test_demo_names_the_extra_that_is_missing(photo, folder, monkeypatch, capsys):
    for name in [*sys.modules]:
        if name.startswith("spatial_decay.viz"):
            monkeypatch.delitem(sys.modules, name)
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, name, None)
    arguments = ["demo", str(photo), "--model", str(folder)]
    error = assert_one_line(arguments, 'pip install "spatial-decay[viz]"', capsys)
    assert error.count("pip install") == 1


def assert_one_line(arguments, said, capsys, *others):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for what in (said, *others):
        assert what in error
    return error


def test_demo_takes_grey_models_and_refuses_other_channels(photo, tmp_path, capsys):
    hub = importlib.import_module("spatial_decay.integrations.hub")
    for channels, status in ((1, 0), (4, 2)):
        model = sd.ViT(10, channels, img_size=16, patch_size=4, dim=16, depth=1, num_heads=2, decay="full")
        hub.save_pretrained(model, tmp_path / f"{channels}")
        arguments = ["demo", str(photo), "--model", str(tmp_path / f"{channels}"), "--out", str(tmp_path / "out.png")]
        assert main(arguments) == status
    assert "the model takes 4 channels" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_of_a_swapped_model_in_a_process_without_a_display(photo, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    sd.swap_attention(model, "full")
    sd.save_swapped(model, tmp_path / "vit")
    command = [sys.executable, "-m", "spatial_decay", "demo", str(photo), "--model", "vit"]
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "ViTModel of vit, 1 of 1 layers with decay: 0 (" in done.stdout
    assert (tmp_path / "reach.png").stat().st_size > 1000
