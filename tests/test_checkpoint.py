"""load_checkpoint: where weights may lie, what the report says, and that nothing is half-loaded."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

import spatial_decay as sd
from tests.golden import make_locatvit, make_rmt, read


@pytest.fixture(scope="module")
def rmt():
    return read("rmt")


@pytest.fixture(scope="module")
def locat():
    return read("locat")


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def assert_equal(a, b):
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "module.", "args", "safetensors"])
def test_where_weights_may_lie(wrap, locat, tmp_path):
    expected, model = make_locatvit(locat), make_locatvit(locat)
    sd.load_checkpoint(expected, locat.state, origin="locatvit")
    path = tmp_path / ("weights.safetensors" if wrap == "safetensors" else "weights.pth")
    if wrap == "safetensors":
        save_file(locat.state, path)
    else:
        found = {
            "plain": locat.state,
            "model": {"model": locat.state, "epoch": 3},
            "state_dict": {"state_dict": locat.state, "arch": "locatvit"},
            "module.": {"model": {f"module.{name}": value for name, value in locat.state.items()}},
            "args": {"model": locat.state, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}},
        }[wrap]
        torch.save(found, path)
    report = sd.load_checkpoint(model, path, origin="locatvit")
    assert report.is_complete
    assert set(report.loaded) == set(model.state_dict())
    assert report.loaded["blocks.0.attn.decay.gaussian.log_var.weight"] == ("blocks.0.attn.gaug.log_var.weight",)
    assert_equal(model, expected)


def test_averaged_weights(locat):
    averaged = {name: value + 1 for name, value in locat.state.items()}
    both = {"state_dict": locat.state, "state_dict_ema": averaged}
    model = make_locatvit(locat)
    sd.load_checkpoint(model, both, origin="locatvit", ema=True)
    assert torch.equal(model.norm.weight, averaged["norm.weight"])
    sd.load_checkpoint(model, both, origin="locatvit")
    assert torch.equal(model.norm.weight, locat.state["norm.weight"])
    with pytest.raises(
        ValueError, match="ema=True needs weights under 'model_ema' or 'state_dict_ema': got keys model"
    ):
        sd.load_checkpoint(model, {"model": locat.state}, origin="locatvit", ema=True)


def test_native_weights_round_trip(rmt, tmp_path):
    model, other = make_rmt(rmt), make_rmt(rmt)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    report = sd.load_checkpoint(other, tmp_path / "own.pt")
    assert report.is_complete
    assert str(report) == f"{len(model.state_dict())} tensors loaded, 0 left to the model to compute"
    assert_equal(model, other)


def test_where_each_tensor_came_from(rmt):
    report = sd.load_checkpoint(make_rmt(rmt), rmt.state, origin="rmt")
    assert report.loaded["stages.1.downsample.reduction.weight"] == ("layers.0.downsample.reduction.weight",)
    assert report.loaded["stages.0.blocks.0.attn.qkv.bias"] == tuple(
        f"layers.0.blocks.0.retention.{part}_proj.bias" for part in "qkv"
    )
    used = {origin for origins in report.loaded.values() for origin in origins} | set(report.derived)
    assert used == set(rmt.state)


def test_layer_scales_of_rmt(rmt):
    model = make_rmt(rmt, init_values=[None, None, 1e-6, 1e-6])
    gammas = {
        f"layers.{stage}.blocks.{block}.gamma_{i}": torch.randn(1, 1, 1, dim)
        for stage, block, dim in ((2, 0, 48), (2, 1, 48), (3, 0, 64))
        for i in (1, 2)
    }
    assert sd.load_checkpoint(model, rmt.state | gammas, origin="rmt").is_complete
    assert torch.equal(model.stages[3].blocks[0].ls2.gamma, gammas["layers.3.blocks.0.gamma_2"].flatten())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, "missing from the checkpoint: norm.bias"),
        (lambda s: s | {"extra.weight": torch.ones(2)}, "not in the model: extra.weight"),
        (
            lambda s: s | {"head.weight": torch.ones(1000, 48), "head.bias": torch.ones(1000)},
            r"head.weight: the model has \(6, 48\), the checkpoint \(1000, 48\)",
        ),
        (
            lambda s: s | {"pos_embed": torch.ones(1, 197, 48)},
            r"pos_embed: the model has \(1, 17, 48\), .* \(1, 197, 48\)",
        ),
    ],
)
def test_differences_are_said_and_nothing_is_loaded(change, says, locat):
    model = make_locatvit(locat)
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        sd.load_checkpoint(model, change(locat.state), origin="locatvit")
    assert_unchanged(model, before)
    report = sd.load_checkpoint(model, change(locat.state), origin="locatvit", strict=False)
    assert not report.is_complete
    for name in (*report.missing, *report.mismatched):
        assert torch.equal(model.state_dict()[name], before[name])
    assert torch.equal(model.cls_token, locat.state["cls_token"])


def test_another_models_weights(rmt, locat):
    model = make_locatvit(locat)
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not fit the model, which stays as it was"):
        sd.load_checkpoint(model, rmt.state, origin="rmt")
    part = {name: value for name, value in rmt.state.items() if not name.endswith("q_proj.weight")}
    with pytest.raises(ValueError, match=r"not in the model: layers.0.blocks.0.retention.k_proj.weight"):
        sd.load_checkpoint(make_rmt(rmt), part, origin="rmt")
    assert_unchanged(model, before)


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoints(suffix, locat, tmp_path, capsys):
    model = make_locatvit(locat)
    before = snapshot(model)
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(FileNotFoundError, match="source must be a file of weights: there is none at"):
        sd.load_checkpoint(model, path)
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="is not a checkpoint that can be read safely"):
        sd.load_checkpoint(model, path)
    if suffix == ".pth":
        torch.save(locat.state, path)
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ValueError, match="is not a checkpoint that can be read safely"):
            sd.load_checkpoint(model, path)
        torch.save({"model": Malicious()}, path)
        with pytest.raises(ValueError, match="is not a checkpoint that can be read safely"):
            sd.load_checkpoint(model, path)
        assert not capsys.readouterr().out
        torch.save([1, 2], path)
        with pytest.raises(ValueError, match="must hold a dict of weights: got list"):
            sd.load_checkpoint(model, path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (({}, {}), "an empty one"),
        (({"epoch": 3}, {}), "got other values under epoch"),
        (({"w": torch.ones(1)}, {"origin": "swin"}), "origin must be one of native, rmt, locatvit, dit: got 'swin'"),
    ],
)
def test_what_holds_no_weights(arguments, says, locat):
    source, options = arguments
    with pytest.raises(ValueError, match=says):
        sd.load_checkpoint(make_locatvit(locat), source, **options)
