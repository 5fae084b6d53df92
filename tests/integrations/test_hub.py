"""Folders for Hugging Face's Hub: they rebuild the model exactly, or say why not and build none."""

import json
import os
import sys

import pytest
import torch

import spatial_decay as sd
from spatial_decay.folders import signed
from spatial_decay.integrations import hub

TWO_STAGES = {
    "embed_dims": [16, 32],
    "depths": [1, 1],
    "num_heads": [2, 2],
    "mlp_ratios": [2, 2],
    "decay": [sd.kinds.FixedDecomposed(heads_range=6), {"kind": "full", "gate_bias": True}],
    "init_values": [None, 1e-6],
    "projection_dim": 24,
}
VIT = {
    "img_size": 32,
    "dim": 24,
    "depth": 1,
    "num_heads": 2,
    "decay": sd.kinds.Gaussian(reference_grid=(3, 4)),
    "global_pool": "prr",
    "num_registers": 1,
}
LATENTS = (torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 7]))
CASES = {
    "SDTH": (lambda classes: classes.SDTH(5, **TWO_STAGES), (torch.randn(2, 3, 24, 32),)),
    "SDTP": (lambda classes: classes.SDTP(8, 2, 4, 10, dim=24, depth=1, num_heads=2, gate_rank=4), LATENTS),
    "ViT": (lambda classes: classes.ViT(5, **VIT), (torch.randn(2, 3, 32, 48),)),
}


def build(name, classes=sd):
    """With weights that are all different from those of a new model."""
    model = CASES[name][0](classes).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def assert_same(model, other, *inputs):
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model(*inputs)
        assert expected.abs().max() > 1e-3
        assert torch.equal(other(*inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_rebuilds_the_model(name, tmp_path):
    model = build(name, hub)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    other = getattr(hub, name).from_pretrained(tmp_path)
    assert type(other) is getattr(hub, name)
    assert isinstance(other, getattr(sd, name))
    assert not other.training
    assert json.dumps(other.config) == json.dumps(model.config)
    assert_same(model, other, *CASES[name][1])


@pytest.mark.parametrize("name", CASES)
def test_a_plain_model_is_saved_too_and_stays_as_it_is(name, tmp_path):
    model = build(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hub.save_pretrained(model, str(tmp_path / "new" / "folder"))
    assert type(model) is getattr(sd, name)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    other = hub.from_pretrained(tmp_path / "new" / "folder")
    assert type(other) is getattr(hub, name)
    assert_same(model.eval(), other, *CASES[name][1])


def test_the_config_holds_class_and_arguments(tmp_path):
    hub.save_pretrained(build("ViT"), tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found.pop("files").keys() == {"model.safetensors"}
    assert len(found.pop("sha256")) == 64
    assert found == {"class": "ViT", "config": sd.ViT(5, **VIT).config} | {"spatial_decay": sd.__version__}


def test_the_builders_models(tmp_path):
    """A published size goes there and back as itself, with one line each."""
    model = sd.sdt_h_tiny(num_classes=3, depths=[1, 1, 1, 1])
    hub.save_pretrained(model, tmp_path)
    assert_same(model.eval(), hub.SDTH.from_pretrained(tmp_path), torch.randn(1, 3, 64, 64))


def test_a_new_classifier_is_in_the_config(tmp_path):
    model = build("ViT", hub)
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    assert hub.from_pretrained(tmp_path).head.out_features == 7


def test_overrides_and_what_fits(tmp_path):
    model = build("ViT")
    hub.save_pretrained(model, tmp_path)
    assert hub.from_pretrained(tmp_path, backend="math").blocks[0].attn.attention.backend == "math"
    with pytest.raises(ValueError, match=r"head.weight: the model has \(9, 24\), the checkpoint \(5, 24\)"):
        hub.from_pretrained(tmp_path, num_classes=9)
    other = hub.from_pretrained(tmp_path, num_classes=9, strict=False)
    assert torch.equal(other.norm.weight, model.norm.weight)
    with pytest.raises(ValueError, match=r"overrides \(colour\) must hold arguments of ViT: .* no keyword colour"):
        hub.from_pretrained(tmp_path, colour="red")


def test_a_model_that_its_config_does_not_rebuild_is_not_saved(tmp_path):
    hub.save_pretrained(build("ViT"), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    for classes in (sd, hub):
        model = build("ViT", classes)
        model.head = torch.nn.Linear(24, 6)
        with pytest.raises(ValueError, match=r"head.bias \(config \(5,\), model \(6,\)\).*reset_classifier"):
            hub.save_pretrained(model, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_only_backbones_are_saved(tmp_path):
    with pytest.raises(TypeError, match=r"one of SDTH, SDTP, ViT: got torch.nn.modules.linear.Linear"):
        hub.save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def sign(folder, config):
    """As a save of these weights with this config, whatever is in them."""
    content = {key: value for key, value in config.items() if key not in ("files", "sha256")}
    (folder / "config.json").write_text(json.dumps(signed(content, [folder / "model.safetensors"])))


def edit_config(change):
    def edit(folder):
        sign(folder, change(json.loads((folder / "config.json").read_text())))

    return edit


def edit_weights(change):
    def edit(folder):
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path)
        sign(folder, json.loads((folder / "config.json").read_text()))

    return edit


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            FileNotFoundError,
            "config.json is missing, it holds README.md, model",
        ),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing"),
        (lambda f: (f / "config.json").write_text('{"class": "ViT", '), ValueError, "config.json must be JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ValueError, "config.json must be JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, 'must hold "class"'),
        (edit_config(lambda c: {"model_type": "vit"}), ValueError, "got class None and config NoneType"),
        (edit_config(lambda c: c | {"class": "Swin"}), ValueError, "one of SDTH, SDTP, ViT.* got class 'Swin'"),
        (edit_config(lambda c: c | {"class": ["ViT"]}), ValueError, "got class"),
        (edit_config(lambda c: c | {"config": c["config"] | {"shape": 3}}), ValueError, "no keyword shape"),
        (edit_config(lambda c: c | {"config": c["config"] | {"decay": "half"}}), ValueError, "kind of decay must be"),
        (edit_config(lambda c: c | {"config": c["config"] | {"dim": "24"}}), ValueError, "must hold arguments of ViT"),
        (
            edit_config(lambda c: c | {"config": c["config"] | {"dim": 32}}),
            ValueError,
            r"(?s)norm.weight: the model has \(32,\), the checkpoint \(24,\).*Build the model that the weights",
        ),
        (
            edit_config(lambda c: c | {"config": c["config"] | {"depth": 2}}),
            ValueError,
            "missing from the checkpoint: blocks.1.",
        ),
        (
            edit_weights(lambda w: {k: v for k, v in w.items() if k != "norm.bias"}),
            ValueError,
            "missing from the checkpoint: norm.bias",
        ),
        (edit_weights(lambda w: w | {"ghost": torch.ones(1)}), ValueError, "not in the model: ghost"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), ValueError, "must be JSON: .*Save the model again"),
        (
            truncate,
            ValueError,
            "as they were saved: model.safetensors is missing, damaged",
        ),
        (
            lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("prr", "avg")),
            ValueError,
            "as they were saved: .*config.json is missing, damaged, edited or from another save",
        ),
        (
            lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("sha256", "sha1")),
            ValueError,
            "an older version has written it. Load it with that version, and save it again",
        ),
    ],
)
def test_damaged_folders(damage, error, says, tmp_path):
    hub.save_pretrained(build("ViT"), tmp_path)
    damage(tmp_path)
    for load in (hub.from_pretrained, hub.ViT.from_pretrained):
        with pytest.raises(error, match=says):
            load(tmp_path)


def test_another_class(tmp_path):
    hub.save_pretrained(build("ViT"), tmp_path)
    with pytest.raises(ValueError, match=r"must be of an SDTH: got one of an ViT. Use ViT.from_pretrained"):
        hub.SDTH.from_pretrained(tmp_path)


def test_a_repository_is_downloaded_by_name(tmp_path, monkeypatch):
    """What is not a folder goes to the Hub's client, with its options."""
    hub.save_pretrained(build("ViT"), tmp_path)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options.get("revision")))
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = hub.from_pretrained("someone/model", revision="v1")
    assert type(model) is hub.ViT
    assert set(asked) == {("someone/model", name, "v1") for name in ("config.json", "model.safetensors")}


def test_files_of_two_commits_are_refused(tmp_path, monkeypatch):
    """A repository comes file by file, and somebody may push between two of them."""
    hub.save_pretrained(build("ViT"), tmp_path / "old")
    hub.save_pretrained(build("ViT"), tmp_path / "new")
    commits = {"config.json": "old", "model.safetensors": "new"}
    monkeypatch.setattr(hub, "hf_hub_download", lambda _, name, **options: str(tmp_path / commits[name] / name))
    with pytest.raises(ValueError, match="model.safetensors is missing, damaged, edited or from another save"):
        hub.from_pretrained("someone/model")


@pytest.mark.parametrize("name", [None, "someone/vit"])
def test_push_to_hub_sends_the_whole_folder(name, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, RepoUrl

    sent = {}

    def create_repo(self, repo_id, **_):
        assert repo_id == (name or "my-vit")
        return RepoUrl("https://huggingface.co/someone/vit")

    def upload_folder(self, *, repo_id, folder_path, commit_message, **_):
        sent.update(repo=repo_id, files=sorted(os.listdir(folder_path)), message=commit_message)
        assert_same(model, hub.from_pretrained(folder_path), torch.randn(2, 3, 32, 48))
        return "the commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model, folder = build("ViT"), tmp_path / "my-vit"
    options = {"push_to_hub": True, "commit_message": "first"} | ({"repo_id": name} if name else {})
    assert hub.save_pretrained(model, folder, **options) == "the commit"
    files = ["README.md", "config.json", "model.safetensors"]
    assert sent == {"repo": "someone/vit", "files": files, "message": "first"}
    assert sorted(os.listdir(folder)) == files


def test_a_readme_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "log.txt").write_text("mine too")
    hub.save_pretrained(build("ViT"), tmp_path)
    hub.save_pretrained(build("ViT"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("missing", ["huggingface_hub", "safetensors.torch"])
def test_without_the_extra_it_says_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "spatial_decay.integrations.hub")
    monkeypatch.delattr(sys.modules["spatial_decay.integrations"], "hub", raising=False)
    with pytest.raises(ImportError, match=r"pip install spatial-decay\[hf\]"):
        import spatial_decay.integrations.hub  # noqa: F401  the import is what is tested
