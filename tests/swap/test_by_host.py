"""What host libraries themselves write of a swapped model comes back with its gates, or says what to do."""

import functools
import logging

import accelerate
import diffusers
import pytest
import torch
import transformers
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

import spatial_decay as sd
from tests.swap.hosts import HF, HOSTS

BY_NAME = {host.name: host for host in HOSTS}
CLASSES = {
    "transformers ViT": transformers.ViTModel,
    "transformers DeiT": transformers.DeiTModel,
    "transformers DINOv2": transformers.Dinov2Model,
    "transformers DINOv2 with registers": transformers.Dinov2WithRegistersModel,
    "transformers DINOv3": transformers.DINOv3ViTModel,
    "diffusers DiT": diffusers.DiTTransformer2DModel,
    "diffusers PixArt": diffusers.PixArtTransformer2DModel,
}
SWAP = {"decay": sd.kinds.Full(alpha=0.2), "lpe_kernel_size": 3, "gate_rank": 4}


def stir(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def swapped(host, **options):
    model = host.make()
    sd.swap_attention(model, **SWAP | options)
    return stir(model)


def assert_same(model, other):
    state, its_state = model.state_dict(), other.state_dict()
    assert state.keys() == its_state.keys()
    assert [name for name in state if not torch.equal(state[name], its_state[name])] == []
    assert type(model) is type(other)


@pytest.mark.parametrize("name", CLASSES)
def test_save_pretrained_of_a_swapped_model(name, tmp_path):
    host, cls = BY_NAME[name], CLASSES[name]
    model, images = swapped(host), host.images(host.sizes[-1])
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = sd.load_swapped(cls, tmp_path, swap=SWAP)
    assert_same(model, again)
    with torch.no_grad():
        assert torch.equal(host.run(again, images), host.run(model, images))


def test_other_files_of_weights(tmp_path):
    vit = swapped(BY_NAME["transformers ViT"])
    vit.save_pretrained(tmp_path / "vit")
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    assert not vit.state_dict().keys() >= weights.keys()  # names of transformers 4
    torch.save(weights, tmp_path / "vit" / "pytorch_model.bin")
    (tmp_path / "vit" / "model.safetensors").unlink()
    assert_same(vit, sd.load_swapped(transformers.ViTModel, tmp_path / "vit", swap=SWAP))
    dit = swapped(BY_NAME["diffusers DiT"])
    dit.save_pretrained(tmp_path / "dit", safe_serialization=False, variant="ema")
    options = {"variant": "ema", "low_cpu_mem_usage": False, "use_safetensors": False}
    assert_same(dit, sd.load_swapped(diffusers.DiTTransformer2DModel, tmp_path / "dit", swap=SWAP, **options))
    half = sd.load_swapped(
        diffusers.DiTTransformer2DModel, tmp_path / "dit", swap=SWAP, torch_dtype=torch.half, **options
    )
    assert {weight.dtype for weight in half.parameters()} == {torch.half}


@pytest.mark.parametrize("kind", ["fixed", "none", "1d", "gaussian"])
def test_kinds_with_other_gates_or_none(kind, tmp_path):
    model = swapped(BY_NAME["transformers ViT"], decay=kind, lpe_kernel_size=0, gate_rank=0, layers=[-1])
    model.save_pretrained(tmp_path)
    assert_same(model, sd.load_swapped(transformers.ViTModel, tmp_path, swap={"decay": kind, "layers": [-1]}))


def classifier():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HF))


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"pixel_values": torch.full((3, 64, 64), i / 4), "labels": torch.tensor(i % 2)}


@pytest.mark.slow
def test_a_checkpoint_of_transformers_trainer(tmp_path):
    def trainer(model):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            save_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        return transformers.Trainer(model=model, args=arguments, train_dataset=Pictures())

    model = stir(classifier())
    sd.swap_attention(model, **SWAP)
    before = model.state_dict()["vit.layers.0.attention.spatial_decay.lpe.conv.weight"].clone()
    trainer(model).train()
    checkpoint = tmp_path / "checkpoint-2"
    again = sd.load_swapped(transformers.ViTForImageClassification, checkpoint, swap=SWAP)
    assert_same(model, again)
    assert not torch.equal(again.vit.layers[0].attention.spatial_decay.lpe.conv.weight, before)

    trainer(again).train(resume_from_checkpoint=str(checkpoint))  # what is loaded already stays
    assert_same(model, again)
    fresh = classifier()
    sd.swap_attention(fresh, **SWAP)
    trainer(fresh).train(resume_from_checkpoint=str(checkpoint))
    same = [torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items()]
    assert not all(same), (
        "mended upstream (transformers #48805): take the advice on resume_from_checkpoint out of the docs"
    )


@pytest.fixture
def warnings_of_hosts(caplog):
    """Their loggers hand nothing on to the root's."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def test_hosts_warn_where_a_model_without_decay_reads_the_gates(tmp_path, warnings_of_hosts):
    swapped(BY_NAME["transformers ViT"]).save_pretrained(tmp_path / "vit")
    swapped(BY_NAME["diffusers DiT"]).save_pretrained(tmp_path / "dit")
    transformers.ViTModel.from_pretrained(tmp_path / "vit")
    assert "spatial_decay.decay.gate.weight" in warnings_of_hosts.text
    assert "UNEXPECTED" in warnings_of_hosts.text
    warnings_of_hosts.clear()
    diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "dit")
    assert "were not used when initializing" in warnings_of_hosts.text
    assert "attn1.spatial_decay.decay.gate.weight" in warnings_of_hosts.text


class SwappedDiT(diffusers.DiTTransformer2DModel):
    @functools.wraps(diffusers.DiTTransformer2DModel.__init__)
    def __init__(self, **options):
        super().__init__(**options)
        sd.swap_attention(self, **SWAP)


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model:FutureWarning")  # diffusers' own call
def test_the_average_of_diffusers(tmp_path):
    host = BY_NAME["diffusers DiT"]
    model = swapped(host)
    average = EMAModel(model.parameters(), model_cls=diffusers.DiTTransformer2DModel, model_config=model.config)
    with pytest.raises(RuntimeError, match="must match"):  # it knows the parameters by their order alone
        average.save_pretrained(tmp_path)
    average = EMAModel(model.parameters(), model_cls=SwappedDiT, model_config=model.config)
    average.save_pretrained(tmp_path)
    assert_same(model, sd.load_swapped(diffusers.DiTTransformer2DModel, tmp_path, swap=SWAP))
    again = EMAModel.from_pretrained(tmp_path, SwappedDiT)
    assert all(torch.equal(a, b) for a, b in zip(again.shadow_params, model.parameters(), strict=True))


def test_a_pipeline_of_diffusers(tmp_path, warnings_of_hosts):
    model = swapped(BY_NAME["diffusers DiT"])
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    plain = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert "attn1.spatial_decay.decay.gate.weight" in warnings_of_hosts.text  # it warns, and leaves them out
    assert not any("spatial_decay" in name for name in plain.transformer.state_dict())
    transformer = sd.load_swapped(type(model), tmp_path / "transformer", swap=SWAP)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path, transformer=transformer)
    assert_same(model, again.transformer)


def test_the_state_of_accelerate(tmp_path):
    host = BY_NAME["transformers ViT"]
    model = swapped(host)
    saving = accelerate.Accelerator(cpu=True)
    saving.prepare(model)
    saving.save_state(str(tmp_path))
    again = host.make()
    sd.swap_attention(again, **SWAP)
    loading = accelerate.Accelerator(cpu=True)
    loading.prepare(again)
    loading.load_state(str(tmp_path))
    assert_same(model, again.eval())
    without = accelerate.Accelerator(cpu=True)
    without.prepare(host.make())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*spatial_decay\.decay\.gate"):
        without.load_state(str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="For other files .* save_state.*, build the model, swap_attention with"
    ):
        sd.load_swapped(transformers.ViTModel, tmp_path)


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        (SWAP | {"lpe_kernel_size": 5}, r"of another shape: layers\.0\.attention\.spatial_decay\.lpe\.conv\.weight"),
        (SWAP | {"gate_rank": 0}, r"not in the swapped model: layers\.0\.attention\.spatial_decay\.output_gate\.down"),
        (
            SWAP | {"decay": "bidirectional"},
            r"missing: .*gate_backward\.bias.*not in the swapped model: .*\.decay\.gate\.bias",
        ),
        (SWAP | {"layers": [0]}, r"not in the swapped model: layers\.1\.attention"),
        ({"decay": "none"}, "not in the swapped model: .*Pass the keywords that it was swapped with"),
        ({"alpha": 0.2}, "must hold keywords of swap_attention .* got alpha"),
        ({"decay": "steep"}, "kind of decay must be one of"),
    ],
)
def test_keywords_of_another_swap_are_refused(swap, message, tmp_path):
    swapped(BY_NAME["transformers ViT"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        sd.load_swapped(transformers.ViTModel, tmp_path, swap=swap)
    lenient = {"ignore_mismatched_sizes": True}
    with pytest.raises(ValueError, match=message):
        sd.load_swapped(transformers.ViTModel, tmp_path, swap=swap, **lenient)


def test_what_cannot_be_loaded_is_said(tmp_path):
    host = BY_NAME["transformers ViT"]
    model = swapped(host)
    host.make().save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ValueError, match="missing: .*Where it was never swapped, use swap_attention after from_pretrained"
    ):
        sd.load_swapped(transformers.ViTModel, tmp_path / "plain", swap=SWAP)
    with pytest.raises(FileNotFoundError, match=r"it has no spatial_decay\.json.*pass the keywords of the swap"):
        sd.load_swapped(transformers.ViTModel, tmp_path / "plain")
    sd.save_swapped(model, tmp_path / "own")
    with pytest.raises(
        ValueError, match=r"swap must be left out for .*own, whose spatial_decay\.json has the keywords"
    ):
        sd.load_swapped(transformers.ViTModel, tmp_path / "own", swap=SWAP)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "epoch=1.ckpt")  # as Lightning does
    for options in ({}, {"swap": SWAP}):
        with pytest.raises(ValueError, match=r"got the file .*ckpt\. For other files \(of Lightning"):
            sd.load_swapped(transformers.ViTModel, tmp_path / "epoch=1.ckpt", **options)
    with pytest.raises(TypeError, match="class of the model itself.*AutoModel"):
        sd.load_swapped(transformers.AutoModel, tmp_path / "plain", swap=SWAP)
    swapped(BY_NAME["diffusers DiT"]).save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"SwappedDiT must not swap by itself .*SwappedDiT\.from_pretrained"):
        sd.load_swapped(SwappedDiT, tmp_path / "dit", swap=SWAP)
    other = transformers.ViTConfig(**HF | {"intermediate_size": 64})
    model.config.intermediate_size = 64
    model.config.save_pretrained(tmp_path / "plain")
    assert other.intermediate_size == 64
    with pytest.raises(ValueError, match=r"of another shape: layers\.0\.mlp"):
        sd.load_swapped(transformers.ViTModel, tmp_path / "plain", swap=SWAP)
