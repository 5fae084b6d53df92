"""SDTH with fixed decay, flat rotary and no output gate is RMT: same outputs as the authors' code on its own weights.

golden/rmt.npz: config, weights, an input and the output of a small model of RMT's published code (Fan et al. 2024).
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from spatial_decay import SDTH, sdt_h_base, sdt_h_small, sdt_h_tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "rmt.npz"

NAMES = {
    r"^patch_embed\.": "stem.",
    r"^layers\.": "stages.",
    r"\.retention_layer_norm\.": ".norm1.",
    r"\.final_layer_norm\.": ".norm2.",
    r"\.retention\.out_proj\.": ".attn.proj.",
    r"\.retention\.lepe\.": ".attn.lpe.",
    r"\.ffn\.dwconv\.": ".mlp.conv.",
    r"\.ffn\.": ".mlp.",
    r"^proj\.": "head_proj.",
    r"^norm\.": "head_norm.",
}


def translate(state):
    """RMT's names -> ours: q, k and v in one matrix, downsampling at the start of a stage; Relpos is made anew."""
    ours, qkv = {}, {}
    for name, value in state.items():
        if ".Relpos." in name:
            continue
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        for pattern, replacement in NAMES.items():
            name = re.sub(pattern, replacement, name)
        if match := re.fullmatch(r"(.*)\.retention\.([qkv])_proj\.(\w+)", name):
            qkv.setdefault(f"{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = value
        else:
            ours[name] = value
    return ours | {name: torch.cat([parts[p] for p in "qkv"]) for name, parts in qkv.items()}


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_equals_the_authors_code(backend):
    golden = np.load(GOLDEN)
    config = json.loads(str(golden["config"]))
    model = SDTH(
        config["num_classes"],
        embed_dims=config["embed_dims"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        mlp_ratios=config["mlp_ratios"],
        heads_ranges=config["heads_ranges"],
        decays=["fixed_decomposed" if decomposed else "fixed" for decomposed in config["chunkwise_recurrents"]],
        projection_dim=config["projection"],
        rope="flat",
        gate_rank=0,
        backend=backend,
    ).eval()
    state = {name.removeprefix("state/"): torch.from_numpy(golden[name]) for name in golden.files if "state/" in name}
    model.load_state_dict(translate(state))
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["io/x"]))
    torch.testing.assert_close(logits, torch.from_numpy(golden["io/y"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("build", "published"), [(sdt_h_tiny, 14.33), (sdt_h_small, 26.97), (sdt_h_base, 54.15)])
def test_without_gates_the_size_is_rmts(build, published):
    with torch.device("meta"):
        model = build(decays=["fixed"] * 4, gate_rank=0)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == published
