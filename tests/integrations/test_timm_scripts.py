"""docs/guides/train.md: its commands name what is there, and its module is one that timm's train.py takes."""

import importlib
import re
import sys

import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2

import spatial_decay.integrations.timm  # noqa: F401  the names
from tests.timm_scripts import commands, files, in_miniature


@pytest.fixture(scope="module", autouse=True)
def _module_of_the_page(tmp_path_factory):
    """vit_decay.py, imported as --device-modules does."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "vit_decay.py").write_text(files()["vit_decay.py"])
    sys.path.insert(0, str(folder))
    yield importlib.import_module("vit_decay")
    sys.path.remove(str(folder))
    del sys.modules["vit_decay"], timm.models._registry._model_entrypoints["deit_small_full"]


def test_commands():
    found = commands()
    assert len(found) == 16
    for command in found:
        for name in re.findall(r"--model (\S+)", command):
            assert timm.is_model(name), name
        for name in re.findall(r"-c (\S+)", command):
            assert name in files(), name
        small = in_miniature(command)
        assert "--device cpu" in small
        assert "per-node 8" not in small
    assert all(size in "\n".join(found) for size in ("sdt_h_tiny", "sdt_h_small", "sdt_h_base", "rmt_", "locatvit_"))


@pytest.mark.parametrize("name", ["sdt_h.yaml", "locatvit.yaml"])
def test_settings_are_numbers(name):
    """YAML reads 1e-3 as text."""
    settings = yaml.safe_load(files()[name])
    assert settings["device_modules"] == ["spatial_decay.integrations.timm"]
    assert all(isinstance(settings[key], float) for key in ("lr", "min_lr", "warmup_lr", "weight_decay"))


def test_a_swapped_vit_trains():
    options = {"pretrained": False, "pretrained_cfg": None, "drop_path_rate": 0.1, "num_classes": 10}  # as train.py
    model = timm.create_model("deit_small_full", **options, depth=2, img_size=32)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    weights = {id(weight): group["lr_scale"] for group in optimizer.param_groups for weight in group["params"]}
    gates = {name: weight for name, weight in model.named_parameters() if ".spatial_decay." in name}
    scales = {name: weights[id(weight)] for name, weight in gates.items()}
    assert {scale for name, scale in scales.items() if "blocks.0" in name} == {0.75**2}
    assert {scale for name, scale in scales.items() if "blocks.1" in name} == {0.75}
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert all(gate.grad is not None for gate in gates.values())
    assert timm.data.resolve_data_config(model=model)["mean"] == (0.485, 0.456, 0.406)
