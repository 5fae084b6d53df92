"""Gates that a host library makes on the meta device, and whose values its checkpoint lacks, begin as new ones do."""

import functools

import accelerate
import diffusers
import pytest
import torch
import transformers
from torch import nn
from transformers.initialization import constant_
from transformers.models.vit.modeling_vit import ViTPreTrainedModel

import spatial_decay as sd
from tests.swap.hosts import HF, HOSTS

BY_NAME = {host.name: host for host in HOSTS}
SWAP = {"lpe_kernel_size": 3, "gate_rank": 4}


@pytest.fixture(autouse=True)
def _raw_memory_is_nan():
    """So torch.empty shows whether anything is left of it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


class SwappedViT(ViTPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.vit = transformers.ViTModel(config)
        sd.swap_attention(self.vit, config.decay, **SWAP)
        self.post_init()

    def forward(self, x):
        return self.vit(x).last_hidden_state


class ViTWithLayers(ViTPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.vit = transformers.ViTModel(config)
        self.gate = sd.ContextAwareGate(48, 3, bias=True, bias_init=6.0)
        self.attn = sd.SpatialDecayAttention(48, 3, decay="gaussian", num_prefix_tokens=1)
        self.block = sd.SDTBlock(48, 3, init_values=0.5, num_prefix_tokens=1, decay=sd.kinds.Full(gate_bias_init=3.0))
        self.post_init()

    def forward(self, x):
        x = self.vit(x).last_hidden_state
        return self.block(self.attn(x)) * self.gate(x).mean(-1, keepdim=True)


class SwappedDiT(diffusers.DiTTransformer2DModel):
    @functools.wraps(diffusers.DiTTransformer2DModel.__init__)  # from_config reads the names of the arguments
    def __init__(self, **options):
        super().__init__(**options)
        sd.swap_attention(self, "full", **SWAP)


def check_new(model: nn.Module) -> int:
    """That what is ours has the values of a new layer; how many modules that were."""
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, sd.ContextAwareGate):
            assert 0.01 < module.weight.std() < 0.03, name
            assert module.bias is None or (module.bias == module.bias_init).all(), name
        elif isinstance(module, sd.layers.OutputGate):
            rank = len(module.down)
            assert 0.01 < module.down.std() < 0.03, name
            assert (module.up - 2 / rank).abs().max() < 0.1 / rank, name
        elif isinstance(module, sd.layers.DepthwiseConv):
            weight, bound = module.conv.weight, 1 / module.conv.kernel_size[0]
            assert bound / 2 < weight.std() < bound, name
            assert weight.abs().max() <= bound, name
            assert 0 < module.conv.bias.abs().max() <= bound, name
        elif isinstance(module, sd.layers.GaussianGate):
            bound = module.log_var.in_features**-0.5
            for layer in (module.log_var, module.log_alpha):
                assert bound / 3 < layer.weight.std() < bound, name
                assert 0 < layer.bias.abs().max() <= bound, name
        elif isinstance(module, sd.layers.LayerScale):
            assert (module.gamma == module.init_values).all(), name
        else:
            continue
        count += 1
    return count


def stir(model: nn.Module) -> dict[str, torch.Tensor]:
    """Change all weights, as training does."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


@pytest.mark.parametrize(
    ("cls", "decay", "count"),
    [(SwappedViT, "full", 6), (SwappedViT, "gaussian", 6), (ViTWithLayers, "full", 11)],
    ids=["swap", "swap-gaussian", "layers"],
)
def test_transformers_from_a_plain_folder_and_from_its_own(cls, decay, count, tmp_path):
    config = transformers.ViTConfig(**HF, decay=decay)
    plain = transformers.ViTModel(config)
    plain.save_pretrained(tmp_path / "plain")
    model = cls.from_pretrained(tmp_path / "plain").eval()
    assert check_new(model) == count
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert_same(plain.state_dict(), {k: v for k, v in model.vit.state_dict().items() if "spatial_decay" not in k})
    images = torch.randn(2, 3, 64, 64)
    assert model(images).isfinite().all()
    trained = stir(model)
    model.save_pretrained(tmp_path / "own")
    again = cls.from_pretrained(tmp_path / "own").eval()
    assert_same(trained, again.state_dict())
    assert torch.equal(again(images), model(images))
    assert check_new(cls(config)) == count  # built the plain way
    half = cls.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in half.parameters())


def test_transformers_initialises_only_what_a_folder_lacks(tmp_path):
    config = transformers.ViTConfig(**HF, decay="full")
    model = SwappedViT(config)
    trained = stir(model)
    lacking = {
        name: value
        for name, value in trained.items()
        if not name.endswith(("gate.bias", "lpe.conv.weight")) and "layers.1.attention.spatial_decay" not in name
    }
    model.save_pretrained(tmp_path, state_dict=lacking)
    again = SwappedViT.from_pretrained(tmp_path)
    assert_same(lacking, {name: value for name, value in again.state_dict().items() if name in lacking})
    added = again.vit.layers[0].attention.spatial_decay
    assert (added.decay.gate.bias == 6).all()
    assert 0 < added.lpe.conv.weight.abs().max() <= 1 / 3
    assert check_new(again.vit.layers[1]) == 3


def test_folders_of_a_swapped_model_into_a_class_that_swaps(tmp_path):
    config = transformers.ViTConfig(**HF, decay="full")
    vit = transformers.ViTModel(config)
    sd.swap_attention(vit, "full", **SWAP)
    trained = stir(vit)
    vit.save_pretrained(tmp_path / "theirs")
    assert_same(trained, SwappedViT.from_pretrained(tmp_path / "theirs").vit.state_dict())
    model = SwappedViT(config)
    model.vit.load_state_dict(trained)
    sd.save_swapped(model, tmp_path / "ours")
    assert_same(trained, sd.load_swapped(SwappedViT, tmp_path / "ours").vit.state_dict())
    model.config.decay = "1d"
    model.config.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="SwappedViT swaps as it is built, and must do so with the keywords that were"):
        sd.load_swapped(SwappedViT, tmp_path / "ours")


class ViTWithItsOwnValues(ViTWithLayers):
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, sd.ContextAwareGate):
            constant_(module.bias, 3.0)  # 6 by bias_init, 3 in the block


def test_the_models_own_init_weights_has_the_last_word(tmp_path):
    config = transformers.ViTConfig(**HF, decay="full")
    transformers.ViTModel(config).save_pretrained(tmp_path / "plain")
    for model in (ViTWithItsOwnValues(config), ViTWithItsOwnValues.from_pretrained(tmp_path / "plain")):
        assert (model.gate.bias == 3).all()
        assert 0.01 < model.gate.weight.std() < 0.03
    trained = stir(model)
    model.save_pretrained(tmp_path / "own")
    assert_same(trained, ViTWithItsOwnValues.from_pretrained(tmp_path / "own").state_dict())


def test_a_model_around_a_trained_one_leaves_it_as_it_is(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**HF)).save_pretrained(tmp_path)
    vit = transformers.ViTModel.from_pretrained(tmp_path)
    sd.swap_attention(vit, "gaussian", **SWAP)
    trained = stir(vit)

    class Around(ViTPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.vit = vit
            self.post_init()  # initialises whatever nobody has marked

    assert_same(trained, Around(vit.config).vit.state_dict())

    with torch.device("meta"):
        empty = SwappedViT(transformers.ViTConfig(**HF, decay="full"))
    trained = stir(SwappedViT(transformers.ViTConfig(**HF, decay="full")))
    empty.load_state_dict(trained, assign=True)
    empty.init_weights()
    kept = {name: value for name, value in empty.state_dict().items() if ".spatial_decay." in name}
    assert_same({name: trained[name] for name in kept}, kept)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_diffusers_from_a_plain_folder_and_from_its_own(low_cpu_mem_usage, tmp_path):
    host = BY_NAME["diffusers DiT"]
    plain = host.make()
    plain.save_pretrained(tmp_path / "plain")
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = SwappedDiT.from_pretrained(tmp_path / "plain", **options)
    assert check_new(model) == 6
    images = host.images(host.sizes[0])
    assert host.run(model, images).isfinite().all()
    trained = stir(model)
    model.save_pretrained(tmp_path / "own")
    again = SwappedDiT.from_pretrained(tmp_path / "own", **options)
    assert_same(trained, again.state_dict())
    assert torch.equal(host.run(again, images), host.run(model, images))
    half = SwappedDiT.from_pretrained(tmp_path / "plain", torch_dtype=torch.bfloat16, **options)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def models():
    options = {"depth": 1, "dim": 96, "img_size": 32, "init_values": 0.1, "num_registers": 2, "gate_rank": 4}
    return [
        sd.ViT(10, decay="full", lpe_kernel_size=3, **options),
        sd.ViT(10, decay="gaussian", **options),
        sd.SDTH(10, embed_dims=(32, 64), depths=(1, 1), num_heads=(2, 4), mlp_ratios=2.0, decay=("decomposed", "full")),
        sd.SDTP(8, num_classes=10, dim=96, depth=1, num_heads=3),
    ]


class DiTWithBlock(diffusers.DiTTransformer2DModel):
    @functools.wraps(diffusers.DiTTransformer2DModel.__init__)
    def __init__(self, **options):
        super().__init__(**options)
        self.block = sd.SDTBlock(48, 3, init_values=0.5)
        self.models = nn.ModuleList(models())
        self.theirs = nn.Linear(48, 48)


def test_diffusers_fills_no_new_layer_and_ours_fill_themselves(tmp_path):
    BY_NAME["diffusers DiT"].make().save_pretrained(tmp_path)
    model = DiTWithBlock.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert check_new(model.block) == 7
    ours = [*model.block.parameters(), *model.models.parameters()]
    assert all(weight.isfinite().all() for weight in ours)
    assert 0.5 / 48**0.5 < model.block.attn.qkv.weight.std() < 48**-0.5  # as PyTorch begins
    empty = DiTWithBlock.from_pretrained(tmp_path)  # with low_cpu_mem_usage their linear layers stay on the meta device
    assert empty.block.attn.qkv.weight.is_meta
    with pytest.raises(Exception, match="meta"):
        empty.block(torch.randn(1, 16, 48))
    assert model.theirs.weight.isnan().all(), "mended upstream (diffusers #12153): spatial_decay need not do it"


@pytest.mark.slow
def test_accelerate_dispatches_a_checkpoint_without_the_gates(tmp_path):
    host = BY_NAME["transformers ViT"]
    plain = host.make()
    torch.save(plain.state_dict(), tmp_path / "plain.bin")
    with accelerate.init_empty_weights():
        model = host.build()
        sd.swap_attention(model, "full", **SWAP)
    assert model.embeddings.cls_token.is_meta
    model = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "plain.bin"), device_map={"": "cpu"})
    assert check_new(model) == 6
    assert host.run(model, host.images((64, 64))).isfinite().all()
    torch.save(trained := stir(model), tmp_path / "trained.bin")
    with accelerate.init_empty_weights():
        again = host.build()
        sd.swap_attention(again, "full", **SWAP)
    accelerate.load_checkpoint_and_dispatch(again, str(tmp_path / "trained.bin"), device_map={"": "cpu"})
    assert_same(trained, again.state_dict())


@pytest.mark.parametrize("decay", ["bidirectional", "gaussian"])
def test_accelerate_offloads_a_swapped_model(decay):
    """Its hooks bring the weights of each module that is called."""
    host = BY_NAME["transformers ViT"]
    model, images = host.make(), host.images((64, 64))
    sd.swap_attention(model, decay, **SWAP)
    with torch.no_grad():
        expected = host.run(model, images)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(host.run(model, images), expected)


def test_where_a_library_makes_parameters_elsewhere_ours_go_too(monkeypatch):
    """As accelerate's init_on_device does it with a GPU; another dtype shows it too."""
    register = nn.Module.register_parameter

    def elsewhere(module, name, param):
        register(module, name, None if param is None else nn.Parameter(param.double()))

    monkeypatch.setattr(nn.Module, "register_parameter", elsewhere)
    assert {weight.dtype for weight in sd.SDTBlock(48, 3, init_values=0.5).parameters()} == {torch.float64}


def test_what_has_gone_to_the_meta_device_has_no_values():
    gate = sd.ContextAwareGate(48, 3, bias=True, bias_init=6.0).to("meta")
    for name, weight in list(gate.named_parameters()):
        setattr(gate, name, nn.Parameter(torch.empty_like(weight, device="cpu")))
    gate._is_hf_initialized = True  # as transformers says it
    assert check_new(gate) == 1


EMPTY = {"meta": lambda: torch.device("meta"), "accelerate": accelerate.init_empty_weights}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_to_empty_gives_the_values_of_new_layers(empty):
    with empty():
        model = ViTWithLayers(transformers.ViTConfig(**HF))
        sd.swap_attention(model.vit, "full", **SWAP)
    model.to_empty(device="cpu")
    assert check_new(model) == 17
    assert model.vit.embeddings.cls_token.isnan().all()  # which is what to_empty does


def test_on_the_meta_device_nothing_is_real_until_it_is_loaded():
    host = BY_NAME["transformers ViT"]
    model = host.make()
    sd.swap_attention(model, "full", **SWAP)
    trained = stir(model)
    with torch.device("meta"):
        empty = host.build()
        sd.swap_attention(empty, "full", **SWAP)
    assert all(weight.is_meta for weight in empty.parameters())
    empty.load_state_dict(trained, assign=True)
    assert_same(trained, empty.state_dict())


def test_every_module_with_parameters_can_begin_anew():
    """FSDP calls reset_parameters of each module that it has taken off the meta device."""
    for model in models():
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if own:
                for weight in own:
                    weight.data.fill_(torch.nan)
                module.reset_parameters()
                assert all(weight.isfinite().all() for weight in own), f"{type(model).__name__}.{name}"
        check_new(model)
