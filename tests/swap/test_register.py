"""register_attention: a class of one's own, the same as it is known; and what of a wrong registration is said."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import spatial_decay as sd
from spatial_decay.swap.hosts.register import _HOSTS
from tests.cases import relative_error
from tests.swap.hosts import HF, HOSTS, STRONG, InFloat64, full_masks, pickled


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv = 3, nn.Linear(48, 3 * 24)

    def forward(self, x, bias=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class Windows(Attention):
    """A subclass, which is known with it."""


class Model(nn.Module):
    def __init__(self, cls=Attention):
        super().__init__()
        self.patches, self.attn, self.out = nn.Conv2d(3, 48, 16, 16), cls(), nn.Linear(24, 48)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        return self.out(self.attn(torch.cat([x, x[:, :1]], 1)))


RIGHT = {
    "heads": lambda attn: attn.num_heads,
    "width": lambda attn: attn.qkv.in_features,
    "channels": lambda attn: attn.qkv.out_features // 3,
    "mask": "bias",
    "num_suffix_tokens": lambda attn: 1,
    "reason_against": lambda attn: "it attends over windows" if isinstance(attn, Windows) else "",
}


@pytest.fixture(autouse=True)
def own_table():
    known = dict(_HOSTS)
    yield
    _HOSTS.clear()
    _HOSTS.update(known)


def test_a_class_of_ones_own_is_a_host_as_any():
    torch.manual_seed(0)
    model, images = Model().eval(), torch.randn(2, 3, 48, 64)
    plain = copy.deepcopy(model)
    with pytest.raises(ValueError, match="(?s)attn: Attention is not known .*teach swap_attention its class"):
        sd.swap_attention(model)
    sd.swap.register_attention(Attention, **RIGHT)
    with torch.no_grad():
        expected = model(images)
        assert sd.swap_attention(model, "none").replaced == ("attn",)
        assert torch.equal(model(images), expected)
        sd.restore_attention(model)
        sd.swap_attention(model, STRONG)
        x = model.patches(images).flatten(2).mT
        masks = F.pad(full_masks(model.attn.spatial_decay.decay.gate, x, (3, 4)), (0, 1, 0, 1))
        with InFloat64(masks):
            expected = plain(images)
        assert relative_error(model(images), expected) < 2e-6
        assert torch.equal(pickled(model)(images), model(images))
    model(images).sum().backward()
    assert model.attn.spatial_decay.decay.gate.weight.grad.any()


def test_what_it_cannot_do_is_its_reason():
    sd.swap.register_attention(Attention, **RIGHT)
    with pytest.raises(ValueError, match="attn: it attends over windows"):
        sd.swap_attention(Model(Windows))


def test_by_its_name_and_again():
    name = f"{__name__}.Attention"
    sd.swap.register_attention(name, **RIGHT | {"reason_against": lambda _: "not yet"})
    with pytest.raises(ValueError, match="attn: not yet"):
        sd.swap_attention(Model())
    sd.swap.register_attention(name, **RIGHT)
    assert sd.swap_attention(Model()).replaced == ("attn",)


@pytest.mark.parametrize(
    ("paths", "replaced"),
    [
        (["Model.attn"], ["0.attn", "1.attn"]),
        (["Towers.*.attn"], ["0.attn", "1.attn"]),
        (["Towers.1.attn"], ["1.attn"]),
        (["Model.attn", "Towers.0.attn: not this one"], ["1.attn"]),
        (["Towers.0.attn", "Towers.*.attn: not the others", "Attention"], ["0.attn"]),
        (["Attention", "Model.attn: not here"], []),
    ],
    ids=str,
)
def test_by_the_path_to_it(paths, replaced):
    """Numbers as they are or as *; a longer path goes before a shorter one, and any before the class."""
    for path in paths:
        name, _, reason = path.partition(": ")
        sd.swap.register_attention(f"{__name__}.{name}", **RIGHT | {"reason_against": lambda _, reason=reason: reason})
    model = Towers(Model(), Model())
    if not replaced:
        with pytest.raises(ValueError, match="0-1.attn: not here"):
            sd.swap_attention(model)
        return
    assert list(sd.swap_attention(model).replaced) == replaced


class Towers(nn.Sequential):
    """Two models."""


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"heads": 3}, TypeError, "heads must be a function of a module .*got 3"),
        ({"width": None}, TypeError, "width must be a function"),
        ({"stand_in": object}, TypeError, "stand_in must be a subclass of StandIn"),
        ({"mask": "attn_mask"}, ValueError, "Attention.forward behind the tokens, one of bias: got 'attn_mask'"),
        ({"mask": "x"}, ValueError, "behind the tokens, one of bias: got 'x'"),
    ],
)
def test_what_cannot_be_registered_is_said(wrong, error, message):
    with pytest.raises(error, match=message):
        sd.swap.register_attention(Attention, **RIGHT | wrong)
    with pytest.raises(TypeError, match="cls must be a class of modules or its full name: got 3"):
        sd.swap.register_attention(3, **RIGHT)


class OfAny(Attention):
    def forward(self, *args, bias=None):
        return super().forward(*args, bias=bias)


class OfPlaces(Attention):
    def forward(self, x, /, bias=None):
        return super().forward(x, bias)


@pytest.mark.parametrize("cls", [OfAny, OfPlaces, nn.Module])
def test_a_forward_that_cannot_be_called_by_names_is_said(cls):
    with pytest.raises(
        ValueError, match=rf"{cls.__name__}.forward must take the tokens first, and all .*: got \(self, "
    ):
        sd.swap.register_attention(cls, **RIGHT)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"heads": lambda attn: "3"}, TypeError, "heads of Attention must give a whole number >= 1: got '3'"),
        ({"width": lambda attn: 0}, TypeError, "width of Attention must give a whole number >= 1: got 0"),
        ({"num_prefix_tokens": lambda attn: -1}, TypeError, "num_prefix_tokens of .* must give a whole number >= 0"),
        ({"reason_against": lambda attn: None}, TypeError, "reason_against of .* must give a string, empty where"),
        (
            {"channels": lambda attn: 25},
            ValueError,
            "channels of Attention must be a multiple of its heads: got 25 and",
        ),
        (
            {"heads": lambda attn: attn.heads},
            ValueError,
            "attn: it is not built as its class is: heads cannot be asked",
        ),
    ],
)
def test_a_wrong_answer_is_named_as_it_is_asked(wrong, error, message):
    model = Model()
    sd.swap.register_attention(Attention, **RIGHT | wrong)
    with pytest.raises(error, match=message):
        sd.swap_attention(model)
    assert type(model.attn) is Attention


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": lambda attn: 2}, "heads=2 does not, got tokens .2, 13, 48., queries .2, 3, 13, 8."),
        ({"width": lambda attn: 24}, "width=24 does not"),
        ({"channels": lambda attn: 48}, "channels=48 does not"),
        ({"num_suffix_tokens": None}, "pass swap_attention num_prefix_tokens=1, if behind them num_suffix_tokens=1"),
    ],
)
def test_or_as_the_first_call_shows_it(wrong, message):
    model = Model()
    sd.swap.register_attention(Attention, **RIGHT | wrong)
    sd.swap_attention(model)
    with pytest.raises((RuntimeError, ValueError), match=message):
        model(torch.randn(2, 3, 48, 64))


class Deaf(Attention):
    """Its softmax gets no mask."""

    def forward(self, x, bias=None):  # noqa: ARG002  its host passes it
        return super().forward(x)


class Curious(Attention):
    """It asks its mask for what a StandIn of its own would have to say."""

    def forward(self, x, bias=None):
        return super().forward(x, bias.float())


@pytest.mark.parametrize(
    ("cls", "what"), [(Deaf, "Deaf did it 0 times"), (Curious, "its mask was asked for its float")]
)
def test_a_mask_that_does_not_come_to_the_softmax_is_said(cls, what):
    sd.swap.register_attention(Attention, **RIGHT)
    model = Model(cls)
    sd.swap_attention(model)
    with pytest.raises(RuntimeError, match=rf"{what}. Use fused attention \(in the forward of its class\)"):
        model(torch.randn(2, 3, 48, 64))


def test_a_forward_without_the_softmax_with_decay_is_said():
    sd.swap.register_attention(Attention, **RIGHT, forward=lambda attn, x: attn.qkv(x)[..., :24])
    model = Model()
    sd.swap_attention(model)
    with pytest.raises(RuntimeError, match="that is registered of Attention must call .*attend_as_host"):
        model(torch.randn(1, 3, 64, 96))


def test_the_decoder_of_mae_has_all_patches_in_their_order():
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**HF, **decoder, decoder_intermediate_size=32, mask_ratio=0.5)
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    plain, images, seen = copy.deepcopy(model), torch.randn(2, 3, 64, 64), []
    report = sd.swap_attention(model, STRONG)
    assert len(report.replaced) == 3
    assert [module.num_heads for module in report.modules] == [3, 3, 2]
    attn = model.decoder.decoder_layers[0].attention
    attn.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0])))
    with torch.no_grad():
        model(images, noise=torch.rand(2, 16))
        ((x, got),) = seen
        masks = F.pad(full_masks(attn.spatial_decay.decay.gate, x[:, 1:], (4, 4)), (1, 0, 1, 0))
        with InFloat64(masks):
            expected = plain.decoder.decoder_layers[0].attention(x)[0]
    assert relative_error(got, expected) < 2e-6
    sd.restore_attention(model)
    assert not model.decoder._forward_pre_hooks
    assert not model.vit.embeddings._forward_hooks


@pytest.mark.parametrize("model", ["Beit", "Data2VecVision"])
def test_a_bias_of_the_hosts_own_is_trained_on(model):
    """It costs a mask, which the backends that keep none in memory refuse."""
    config = getattr(transformers, f"{model}Config")(**HF, use_relative_position_bias=True)
    model = getattr(transformers, f"{model}Model")(config)
    tables = {name: weight for name, weight in model.named_parameters() if "bias_table" in name}
    sd.swap_attention(model)
    model(torch.randn(1, 3, 64, 64)).last_hidden_state.square().sum().backward()
    assert len(tables) == 2
    assert all(table.grad.any() for table in tables.values())
    sd.restore_attention(model)
    sd.swap_attention(model, backend="tiled")
    with pytest.raises(NotImplementedError, match="attn_mask requires grad"):
        model(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (lambda: transformers.CLIPModel(transformers.CLIPConfig(vision_config=HF, text_config=TEXT)), "text_model."),
        (
            lambda: transformers.SiglipModel(transformers.SiglipConfig(vision_config=HF, text_config=TEXT)),
            "text_model.",
        ),
    ],
    ids=["CLIP", "SigLIP"],
)
def test_of_two_towers_that_of_the_images(build, left):
    report = sd.swap_attention(build())
    assert [name.startswith("vision_model.") for name in report.replaced] == [True, True]
    text = [reason for name, reason in report.left.items() if name.startswith(left)]
    assert text == ["it attends over text"] * 2


TEXT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
TEXT |= {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("name", ["Dpt", "Yolos", "Data2VecVision", "Clip"])
def test_softmax_that_is_written_out_is_a_reason(name):
    name = {"Dpt": "DPT", "Clip": "CLIPVision"}.get(name, name)
    more = {"image_size": [64, 64]} if name == "Yolos" else {}
    config = getattr(transformers, f"{name}Config")(**HF | more, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"it runs attn_implementation='eager' \(needs 'sdpa'\)"):
        sd.swap_attention(getattr(transformers, f"{name}Model")(config))


def attend(attn, x, *_, **__):
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = attn.spatial_decay.attend_as_host(x, q, k, v)
    return attn.out_proj(out.transpose(1, 2).flatten(2)), None


def test_layers_of_pytorch_do_not_go_past_the_decay():
    """In evaluation without gradients nn.TransformerEncoderLayer has a fast path that does not call its attention."""
    answers = {"heads": lambda attn: attn.num_heads, "width": lambda attn: attn.embed_dim, "forward": attend}
    sd.swap.register_attention(nn.MultiheadAttention, **answers)
    layer = nn.TransformerEncoderLayer(48, 4, 64, batch_first=True)
    model, images = Model(lambda: nn.TransformerEncoder(layer, 2)).eval(), torch.randn(2, 3, 48, 64)
    model.out = nn.Identity()
    sd.swap_attention(model, STRONG, num_suffix_tokens=1)
    for swapped in (model, pickled(model)):
        expected = swapped(images)
        with torch.no_grad():
            assert relative_error(swapped(images), expected) < 2e-6
    host = next(host for host in HOSTS if host.name == "torchvision ViT")
    vit = host.make()
    sd.swap_attention(vit)
    host.run(vit, host.images((64, 64)))  # its place is registered besides, with a class token


def test_torchvisions_vit_is_the_same_with_gradients_and_refuses_other_calls():
    """With gradients, and in training, PyTorch's own softmax is another one than without."""
    host = next(host for host in HOSTS if host.name == "torchvision ViT")
    model, images = host.make(), host.images((64, 64))
    plain = copy.deepcopy(model)
    sd.swap_attention(model, "none")
    for mode in (True, False):
        assert torch.equal(model.train(mode)(images), plain.train(mode)(images))
    other = host.make()
    sd.swap_attention(other, STRONG)
    attn, x = other.encoder.layers[0].self_attention, torch.randn(2, 17, 48)
    for args, kwargs in (((x, x, x), {}), ((x, x + 1, x), {"need_weights": False})):
        with pytest.raises(ValueError, match="must be called for self-attention without masks"):
            attn(*args, **kwargs)
    other = host.make()
    for block in other.encoder.layers:
        block.self_attention = nn.MultiheadAttention(48, 4)
    with pytest.raises(ValueError, match="it has no batch_first, as torchvision builds it"):
        sd.swap_attention(other)
