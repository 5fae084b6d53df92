"""RMT and LocAtViT: the outputs of the authors' code on its own weights, and the published sizes.

golden/rmt.npz and golden/locat.npz: config, weights, an input and outputs of small models of the published code of RMT
(Fan et al. 2024) and LocAtViT (Hajimiri et al. 2026).
"""

import pytest
import torch

import spatial_decay as sd
from tests.cases import CPU_BACKENDS
from tests.golden import make_locatvit, make_rmt, read


def close(actual, expected):
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rmt_equals_the_authors_code(backend):
    golden = read("rmt")
    model = make_rmt(golden, backend=backend).eval()
    report = sd.load_checkpoint(model, golden.state, origin="rmt")
    assert report.is_complete
    assert report.derived
    assert all(".Relpos." in name for name in report.derived)
    close(model(torch.from_numpy(golden.arrays["io/x"])), golden.arrays["io/y"])


@torch.no_grad()
@pytest.mark.parametrize(
    "backend", [name for name in CPU_BACKENDS if name != "tiled"]
)  # tiled is for decays: PRR has none
def test_locatvit_equals_the_authors_code(backend):
    golden = read("locat")
    model = make_locatvit(golden).eval()
    for block in model.blocks:
        block.attn.attention.backend = "tiled" if backend == "math" else backend
    model.prr.backend = backend
    assert sd.load_checkpoint(model, golden.state, origin="locatvit").is_complete
    images = torch.from_numpy(golden.arrays["io/x"])
    features = model.forward_features(images)
    close(features, golden.arrays["io/features"])
    close(model.forward_head(features), golden.arrays["io/y"])


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (sd.models.rmt_tiny, 14.33),
        (sd.models.rmt_small, 26.97),
        (sd.models.rmt_base, 54.15),
        (sd.models.rmt_large, 95.46),
    ],
)
def test_rmt_has_its_published_size(build, millions):
    with torch.device("meta"):
        assert round(sum(parameter.numel() for parameter in build().parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("build", "vit"),
    [
        (sd.models.locatvit_tiny, 5_717_416),
        (sd.models.locatvit_small, 22_050_664),
        (sd.models.locatvit_base, 86_567_656),
    ],
)
def test_locatvit_is_a_vit_and_three_rows_of_weights_a_block(build, vit):
    """timm's vit_*_patch16_224, and for 12 blocks (64 + 1) * 3 for the Gaussians; PRR has none."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build().parameters()) == vit + 12 * 65 * 3


def test_structures_are_keywords():
    model = sd.models.rmt_tiny(10, depths=[1, 1, 1, 1], embed_dims=[16, 16, 32, 32], num_heads=[1, 1, 2, 2])
    assert [block.attn.decay.kind.name for stage in model.stages for block in stage.blocks] == [
        "fixed_decomposed",
        "fixed_decomposed",
        "fixed",
        "fixed",
    ]
    assert model(torch.randn(2, 3, 64, 32)).shape == (2, 10)
    assert sd.models.rmt_base().config["init_values"] == [None, None, 1e-6, 1e-6]
