"""Swapped models of transformers and diffusers through a folder, and of the others through their state_dict."""

import json
import logging
from dataclasses import dataclass
from typing import ClassVar

import diffusers
import pytest
import torch
import transformers

import spatial_decay as sd
from spatial_decay.folders import signed
from spatial_decay.layers.kinds import KINDS
from tests.swap.hosts import HOSTS

BY_NAME = {host.name: host for host in HOSTS}
CLASSES = {"transformers ViT": transformers.ViTModel, "diffusers DiT": diffusers.DiTTransformer2DModel}


def swapped(host, **options):
    model = host.make()
    sd.swap_attention(model, sd.kinds.Full(gate_bias_init=0.5), **{"lpe_kernel_size": 3, "layers": [-1]} | options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".spatial_decay." in name:
                weight.add_(torch.randn_like(weight))
    return model


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_gives_the_same_model_back(name, tmp_path, caplog):
    host = BY_NAME[name]
    model = swapped(host)
    images = host.images(host.sizes[-1])
    with torch.no_grad():
        expected = host.run(model, images)
        sd.save_swapped(model, tmp_path)
        assert torch.equal(host.run(model, images), expected)  # saving has not changed it
        with caplog.at_level(logging.WARNING):
            again = sd.load_swapped(CLASSES[name], tmp_path).eval()
        assert torch.equal(host.run(again, images), expected)
        plain = CLASSES[name].from_pretrained(tmp_path).eval()  # which its library reads without us
        sd.restore_attention(model)
        assert torch.equal(host.run(plain, images), host.run(model, images))
    assert not any("spatial_decay" in record.getMessage() for record in caplog.records)  # no names left over
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "decomposed" not in kind])  # they take no class token
def test_every_kind_comes_back(kind, tmp_path):
    host = BY_NAME["transformers ViT"]
    model, images = host.make(), host.images((64, 64))
    sd.swap_attention(model, kind)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".spatial_decay." in name:
                weight.copy_(torch.randn_like(weight))
        sd.save_swapped(model, tmp_path)
        again = sd.load_swapped(transformers.ViTModel, tmp_path).eval()
        assert torch.equal(host.run(again, images), host.run(model, images))
    assert again.state_dict().keys() == model.state_dict().keys()


def sign(folder, **change):
    """As a save of the weights in a folder, with other keywords of the swap."""
    file = folder / "spatial_decay.json"
    found = json.loads(file.read_text()) | change
    names = found.pop("files")
    del found["sha256"]
    file.write_text(json.dumps(signed(found, [folder / name for name in names])))


def test_weights_of_gates_that_the_kind_has_not_are_refused(tmp_path):
    sd.save_swapped(swapped(BY_NAME["transformers ViT"], lpe_kernel_size=0), tmp_path)
    sign(tmp_path, decay={"kind": "none"})
    with pytest.raises(ValueError, match="does not fit the model"):
        sd.load_swapped(transformers.ViTModel, tmp_path)


@dataclass(frozen=True, kw_only=True)
class Steep(sd.kinds.Full):
    name: ClassVar[str] = "steep"


@dataclass(frozen=True, kw_only=True)
class SameName(sd.kinds.Full):
    pass


@pytest.mark.parametrize("kind", [Steep, SameName])
def test_a_kind_of_ones_own_is_refused_before_anything_is_written(kind, tmp_path):
    model = BY_NAME["transformers ViT"].make()
    sd.swap_attention(model, kind())
    with pytest.raises(ValueError, match=rf"one of full, fixed, .*test_saved\.{kind.__name__}, '{kind.name}'\. Save"):
        sd.save_swapped(model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_a_state_dict_fits_any_model_that_is_swapped_the_same(tmp_path):
    host = BY_NAME["timm vit_tiny_patch16_224"]
    model = swapped(host)
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    again = host.make()
    sd.swap_attention(again, "full", lpe_kernel_size=3, layers=[-1])
    sd.load_checkpoint(again, tmp_path / "vit.pt")
    with torch.no_grad():
        assert torch.equal(host.run(again, host.images((64, 96))), host.run(model, host.images((64, 96))))
    with pytest.raises(ValueError, match="must have been changed by swap_attention and have a save_pretrained"):
        sd.save_swapped(model, tmp_path)


def test_what_does_not_fit_is_said(tmp_path):
    host = BY_NAME["transformers ViT"]
    with pytest.raises(FileNotFoundError, match=r"it has no spatial_decay\.json"):
        sd.load_swapped(transformers.ViTModel, tmp_path)
    with pytest.raises(ValueError, match="ViTModel with 0 decays"):
        sd.save_swapped(host.make(), tmp_path)
    sd.save_swapped(swapped(host), tmp_path)
    sign(tmp_path, lpe_kernel_size=5)
    with pytest.raises(ValueError, match=r"the model has \(48, 1, 5, 5\), the checkpoint \(48, 1, 3, 3\)"):
        sd.load_swapped(transformers.ViTModel, tmp_path)
    sign(tmp_path, lpe_kernel_size=3)
    weights = (tmp_path / "spatial_decay.safetensors").read_bytes()
    (tmp_path / "spatial_decay.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="damaged, edited or of another save is spatial_decay.safetensors"):
        sd.load_swapped(transformers.ViTModel, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_bias_init": 6.0, "alpha": 0.1}, "it needs backend, decay, gate_rank, .* and has alpha, backend"),
        ({"decay": {"kind": "full", "reach": 3}}, "kind 'full' has the options .*alpha.*: got reach"),
        ({"decay": 1}, "decay must be the name of a kind"),
        (None, "it needs .*, and has 0, 1"),
        ("{", "Expecting property name"),
    ],
)
def test_options_of_another_version_are_refused_before_a_model_is_built(tmp_path, monkeypatch, change, message):
    sd.save_swapped(swapped(BY_NAME["transformers ViT"]), tmp_path)
    file = tmp_path / "spatial_decay.json"
    saved = json.loads(file.read_text())
    assert saved["decay"] == {"kind": "full", "gate_bias": True, "gate_bias_init": 0.5, "alpha": 0.1}
    changed = saved | change if isinstance(change, dict) else ["0", "1"]
    file.write_text(change if isinstance(change, str) else json.dumps(changed))
    monkeypatch.setattr(transformers.ViTModel, "from_pretrained", lambda *_, **__: pytest.fail("too early"))
    with pytest.raises(ValueError, match=rf"(?s)is not what this version's save_swapped writes.*{message}"):
        sd.load_swapped(transformers.ViTModel, tmp_path)
