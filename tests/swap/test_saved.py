"""Swapped models of transformers and diffusers through a folder, and of the others through their state_dict."""

import json
import logging
import threading
from dataclasses import dataclass
from typing import ClassVar

import accelerate
import diffusers
import huggingface_hub
import peft
import pytest
import torch
import transformers

import spatial_decay as sd
from spatial_decay.folders import signed
from spatial_decay.layers.kinds import KINDS
from tests.swap.hosts import HOSTS, traces

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
    file.write_text(json.dumps(signed(found, [folder / name for name, hash_of in names.items() if hash_of])))


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
    with pytest.raises(ValueError, match="spatial_decay.safetensors is missing, damaged, edited or from another save"):
        sd.load_swapped(transformers.ViTModel, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_bias_init": 6.0, "alpha": 0.1}, "it needs backend, decay, gate_rank, .* and has alpha, backend"),
        ({"decay": {"kind": "full", "reach": 3}}, "kind 'full' has the options .*alpha.*: got reach"),
        ({"decay": 1}, "decay must be the name of a kind"),
        (None, "it needs .*, and has 0, 1"),
        ("{", "Expecting property name"),
        ("[" * 10**5, ""),
    ],
)
def test_options_of_another_version_are_refused_before_a_model_is_built(tmp_path, monkeypatch, change, message):
    sd.save_swapped(swapped(BY_NAME["transformers ViT"]), tmp_path)
    file = tmp_path / "spatial_decay.json"
    saved = json.loads(file.read_text())
    said = {"gate_bias": True, "gate_bias_init": 0.5, "alpha": 0.1}
    assert saved["decay"] == {"kind": "full", "reference_grid": None, **said}
    changed = saved | change if isinstance(change, dict) else ["0", "1"]
    file.write_text(change if isinstance(change, str) else json.dumps(changed))
    monkeypatch.setattr(transformers.ViTModel, "from_pretrained", lambda *_, **__: pytest.fail("too early"))
    with pytest.raises(ValueError, match=rf"(?s)is not what this version's save_swapped writes.*{message}"):
        sd.load_swapped(transformers.ViTModel, tmp_path)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("saves", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_calls_while_it_is_saved_are_right(name, saves, tmp_path):
    host = BY_NAME[name]
    model, images = swapped(host), host.images(host.sizes[-1])
    with torch.no_grad():
        expected = host.run(model, images)
    stop, outs = threading.Event(), []

    def call():
        with torch.no_grad():
            while not stop.is_set():
                outs.append(torch.equal(host.run(model, images), expected))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    num_saves = 0
    while (num_saves < saves or len(outs) <= 4 * saves) and all(thread.is_alive() for thread in threads):
        sd.save_swapped(model, tmp_path)
        num_saves += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert all(outs)
    assert len(outs) > 4 * saves


@pytest.mark.parametrize("name", CLASSES)
def test_a_host_that_fails_half_way_changes_neither_model_nor_folder(name, tmp_path, monkeypatch):
    host = BY_NAME[name]
    model = swapped(host)
    before, config = traces(model), dict(model.config.to_dict() if hasattr(model.config, "to_dict") else model.config)

    def half(self, folder):
        (folder / "config.json").write_text("{}")
        assert not any(hasattr(module, "spatial_decay") for module in self.modules())
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(CLASSES[name], "save_pretrained", half)
        with pytest.raises(OSError, match="no space left"):
            sd.save_swapped(model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())
    sd.save_swapped(model, tmp_path)
    assert traces(model) == before
    assert dict(model.config.to_dict() if hasattr(model.config, "to_dict") else model.config) == config
    assert all(not list(module._state_dict_hooks) for module in model.modules())


def test_what_others_have_hung_on_the_model_is_not_copied(tmp_path):
    host = BY_NAME["transformers ViT"]
    model, images = swapped(host), host.images((64, 64))

    class Recorder:
        def __init__(self):
            self.lock, self.num_calls = threading.Lock(), 0  # locks cannot be copied

        def __call__(self, *_):
            self.num_calls += 1

    recorder = Recorder()
    model.register_forward_hook(recorder)
    sd.save_swapped(model, tmp_path)
    host.run(model, images)
    assert recorder.num_calls == 1
    model.lock = recorder.lock
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"copy.deepcopy copies, .*cannot pickle '_thread.lock'.*state_dict"):
        sd.save_swapped(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["full", "fixed"])  # with gates, and with nothing that could be missed
def test_the_decay_that_a_partial_restore_has_left_comes_back(kind, tmp_path):
    host = BY_NAME["transformers ViT"]
    model, images = host.make(), host.images((64, 96))
    sd.swap_attention(model, kind)
    sd.restore_attention(model.layers[0])
    sd.save_swapped(model, tmp_path)
    again = sd.load_swapped(transformers.ViTModel, tmp_path).eval()
    assert [name for name, _ in again.named_modules() if name.endswith(".spatial_decay")] == [
        "layers.1.attention.spatial_decay"
    ]
    with torch.no_grad():
        assert torch.equal(host.run(again, images), host.run(model, images))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of transformers, which PEFT still asks
@pytest.mark.parametrize("how", ["wrapped", "inside", "put in place", "added by transformers"])
def test_adapters_of_peft_are_refused_until_they_are_merged(how, tmp_path):
    """Their weights have other names, under which from_pretrained finds none, and makes them up with a warning."""
    host = BY_NAME["transformers ViT"]
    model = swapped(host)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    if how == "added by transformers":
        model.add_adapter(config)
    elif how == "put in place":
        model = peft.inject_adapter_in_model(config, model)
    else:
        wrapped = peft.get_peft_model(model, config)
        model = wrapped if how == "wrapped" else model
    with pytest.raises(ValueError, match=r"must be as its own library builds it: got .* of PEFT at .*merge_and_unload"):
        sd.save_swapped(model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())
    if how == "wrapped":
        merged = wrapped.merge_and_unload()
        sd.save_swapped(merged, tmp_path)
        again, images = sd.load_swapped(transformers.ViTModel, tmp_path).eval(), host.images((64, 64))
        with torch.no_grad():
            assert torch.equal(host.run(again, images), host.run(merged, images))


def test_weights_that_the_folder_has_not_are_refused(tmp_path):
    """transformers makes them up, with a warning."""
    config = BY_NAME["transformers ViT"].make().config
    models = {"layers.0.mlp.fc1": transformers.ViTModel(config), "pooler.dense": transformers.ViTModel(config, False)}
    models["layers.0.mlp.fc1"].layers[0].mlp.fc1 = torch.nn.Sequential(models["layers.0.mlp.fc1"].layers[0].mlp.fc1)
    for name, model in models.items():
        sd.swap_attention(model, "full")
        sd.save_swapped(model, tmp_path)
        with pytest.raises(ValueError, match=rf"has none for {name}.bias, {name}.weight\. Load it with the class"):
            sd.load_swapped(transformers.ViTModel, tmp_path)
    again = sd.load_swapped(transformers.ViTModel, tmp_path, add_pooling_layer=False)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_folder_without_its_config_is_refused(tmp_path):
    """transformers takes the default one: an activation and an epsilon of one's own are lost where the sizes fit."""
    sd.save_swapped(swapped(BY_NAME["transformers ViT"]), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"must belong together .* config\.json is missing"):
        sd.load_swapped(transformers.ViTModel, tmp_path)


def test_gates_that_are_not_in_memory(tmp_path):
    model = swapped(BY_NAME["transformers ViT"])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"plain tensors.*(.|\n)*gate.weight: it is on the meta device(.|\n)*offloads"):
        sd.save_swapped(model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


class OfHub(torch.nn.Module, huggingface_hub.PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.vit = BY_NAME["timm vit_tiny_patch16_224"].make()


def test_a_model_of_huggingface_hubs_mixin(tmp_path):
    model = OfHub()
    sd.swap_attention(model, "full")
    sd.save_swapped(model, tmp_path)
    again = sd.load_swapped(OfHub, tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_parts_that_were_swapped_differently_are_refused(tmp_path):
    """No one call of swap_attention makes them again."""

    class Two(transformers.ViTPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.left, self.right = transformers.ViTModel(config), transformers.ViTModel(config)
            self.post_init()

    model = Two(BY_NAME["transformers ViT"].make().config)
    sd.swap_attention(model.left, sd.kinds.Full(alpha=0.2))
    sd.swap_attention(model.right, sd.kinds.Full(alpha=0.3))
    with pytest.raises(ValueError, match=r"must come from one swap, .*: got different keywords\. Save the state_dict"):
        sd.save_swapped(model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())
    sd.restore_attention(model.right)
    sd.swap_attention(model.right, sd.kinds.Full(alpha=0.2), layers=[1])
    sd.save_swapped(model, tmp_path)
    again = sd.load_swapped(Two, tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.slow  # the compiler's import
def test_a_compiled_model_is_saved_as_the_model_inside(tmp_path):
    model = swapped(BY_NAME["transformers ViT"])
    sd.save_swapped(torch.compile(model), tmp_path)
    again = sd.load_swapped(transformers.ViTModel, tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "sharded_first"),
    [
        ("diffusers DiT", True),  # it prefers parts
        ("transformers ViT", False),  # it prefers the whole
        pytest.param("diffusers DiT", False, marks=pytest.mark.slow),
        pytest.param("transformers ViT", True, marks=pytest.mark.slow),
    ],
)
def test_weights_in_parts_and_whole_ones_do_not_mix(name, sharded_first, tmp_path, monkeypatch):
    host, save = BY_NAME[name], CLASSES[name].save_pretrained
    models = swapped(host), swapped(host)
    with torch.no_grad():
        next(models[1].parameters()).add_(1)
    for model, sharded in zip(models, (sharded_first, not sharded_first), strict=True):
        with monkeypatch.context() as patch:
            size = "40KB" if sharded else "10GB"
            patch.setattr(
                CLASSES[name], "save_pretrained", lambda m, folder, size=size: save(m, folder, max_shard_size=size)
            )
            sd.save_swapped(model, tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 2 or not sharded
        again = sd.load_swapped(CLASSES[name], tmp_path)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        plain = CLASSES[name].from_pretrained(tmp_path)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", ["40KB", "10GB"])
def test_weights_that_the_host_wrote_later_are_refused(name, size, tmp_path):
    """Its own save_pretrained over ours leaves new weights with old gates, or two sets of weights."""
    model = swapped(BY_NAME[name])
    sd.save_swapped(model, tmp_path)
    sd.restore_attention(model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path, max_shard_size=size)
    with pytest.raises(ValueError, match="belong together|only the weights that were saved together"):
        sd.load_swapped(CLASSES[name], tmp_path)


def test_the_hosts_config_may_be_edited_and_other_weights_may_not_be_named(tmp_path):
    sd.save_swapped(swapped(BY_NAME["transformers ViT"]), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": {"0": "cat", "1": "dog"}}))
    assert sd.load_swapped(transformers.ViTModel, tmp_path).config.id2label == {0: "cat", 1: "dog"}
    for option in ({"variant": "fp16"}, {"subfolder": "old"}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match=rf"got {next(iter(option))}, which may name others"):
            sd.load_swapped(transformers.ViTModel, tmp_path, **option)
    with pytest.raises(ValueError, match="output_loading_info must be left out"):
        sd.load_swapped(transformers.ViTModel, tmp_path, output_loading_info=True)


def test_a_folder_without_hashes_is_refused(tmp_path):
    sd.save_swapped(swapped(BY_NAME["transformers ViT"]), tmp_path)
    file = tmp_path / "spatial_decay.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in found.items() if key not in ("files", "sha256")}))
    with pytest.raises(
        ValueError, match=r'spatial_decay\.json must have "files" and "sha256".*Load it with that version'
    ):
        sd.load_swapped(transformers.ViTModel, tmp_path)
