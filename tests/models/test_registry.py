"""The one list of backbones: it holds every builder, and what reads it needs nothing else of a new one."""

import inspect
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import spatial_decay as sd
from spatial_decay.models.backbone import Backbone
from spatial_decay.models.registry import ENTRIES

API = "\n".join((Path(__file__).parents[2] / "docs" / "api" / page).read_text() for page in ("models.md", "peers.md"))


def test_it_holds_every_builder():
    public = {name: getattr(sd.models, name) for name in sd.models.__all__}
    builders = {name: value for name, value in public.items() if isinstance(value, types.FunctionType)}
    del builders["list_models"]
    assert {name: entry.build for name, entry in ENTRIES.items()} == builders
    assert sd.list_models() == sorted(builders)
    assert {"sdt_h_tiny", "sdt_p_xlarge", "rmt_large", "locatvit_base"} <= set(builders)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_the_docs_list_it(name):
    assert re.search(rf"^::: spatial_decay\.(models\.)?{name}$", API, flags=re.MULTILINE)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_an_entry_says_what_the_builder_builds(name):
    entry = ENTRIES[name]
    with torch.device("meta"):
        few_blocks = {name: 1 for name in ("depth", "depths") if name in inspect.signature(entry.model).parameters}
        assert type(entry.build(**few_blocks)) is entry.model
    assert get_type_hints(entry.build)["return"] is entry.model
    assert (entry.images is not None) == issubclass(entry.model, Backbone)


NEW = '''
import tempfile
import torch
import spatial_decay as sd
from spatial_decay.models.registry import ImageSettings, register

class Plain(sd.ViT):
    """Another class."""

@register(Plain, ImageSettings(first_conv="patch_embed.proj", crop_pct=0.95, mean=(0, 0, 0), std=(1, 1, 1), num_maps=2))
def plain_tiny(num_classes: int = 1000, in_chans: int = 3, **overrides) -> Plain:
    """A ViT."""
    return Plain(num_classes, in_chans, **({"img_size": 32, "dim": 16, "depth": 3, "num_heads": 2} | overrides))

assert "plain_tiny" in sd.list_models()

import timm
from spatial_decay.integrations import hub
import spatial_decay.integrations.timm

model = timm.create_model("plain_tiny", num_classes=5).eval()
assert type(model) is Plain and model.default_cfg["crop_pct"] == 0.95 and model.num_classes == 5
assert len(timm.create_model("plain_tiny", features_only=True)(torch.randn(1, 3, 32, 32))) == 2
folder = tempfile.mkdtemp()
hub.save_pretrained(model, folder)
again, x = hub.from_pretrained(folder), torch.randn(1, 3, 32, 32)
assert isinstance(again, Plain) and type(again) is hub.Plain and torch.equal(again(x), model(x))
'''


@pytest.mark.slow  # a process of its own: what is registered stays
def test_a_new_backbone_is_its_own_code_alone():
    subprocess.run([sys.executable, "-c", NEW], check=True, timeout=120)
