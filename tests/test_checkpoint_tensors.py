"""load_checkpoint and tensors that cannot be weights: refused by name, and the model stays bit for bit."""

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import spatial_decay as sd
from tests.faults import killed
from tests.golden import make_dit, make_rmt, read

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of kinds of tensors that it will change


def make(dtype=torch.float32, **options):
    """timm's, with 35 parameters and a BatchNorm's buffers beside them."""
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5} | options
    model = timm.models.VisionTransformer(**options, reg_tokens=1)
    model.last = nn.BatchNorm1d(5)
    for value in model.parameters():
        nn.init.normal_(value)
    return model.to(dtype)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def bits(model):
    return {name: value.clone().contiguous().view(-1).view(torch.uint8) for name, value in model.state_dict().items()}


def assert_refused(model, source, says, **options):
    before = bits(model)
    for strict in (True, False):
        with pytest.raises(ValueError, match=says):
            sd.load_checkpoint(model, source, strict=strict, **options)
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def fake(value):
    with FakeTensorMode():
        return torch.empty(value.shape)


def with_one(number, at=(1, 2)):
    def change(value):
        value = value.clone()
        value[at] = number
        return value

    return change


BAD = {
    "meta": (lambda value: value.to("meta"), "it is on the meta device"),
    "sparse": (lambda value: value.to_sparse(), "it is sparse_coo"),
    "sparse rows": (lambda value: value.to_sparse_csr(), "it is sparse_csr"),
    "quantized": (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "it is quantized"),
    "nested": (lambda value: torch.nested.nested_tensor(list(value)), "it is nested"),
    "jagged": (lambda value: torch.nested.nested_tensor(list(value), layout=torch.jagged), "it is nested"),
    "fake": (fake, "it is a FakeTensor"),
    "nan": (with_one(math.nan), "it has NaN or infinite values"),
    "infinite": (with_one(-math.inf), "it has NaN or infinite values"),
    "bool": (lambda value: value > 0, "bool .* float32"),
    "int": (lambda value: value.long(), "int64 .* float32"),
    "complex": (lambda value: value.to(torch.complex64), "complex64 .* float32"),
    "too large": (lambda value: with_one(1e39)(value.double()), "it has numbers beyond float32's largest"),
}


@pytest.mark.parametrize("kind", BAD)
def test_tensors_that_cannot_be_weights(kind):
    change, says = BAD[kind]
    model, source = make(), state_of(make())
    assert len(list(model.parameters())) == 35
    source["head.weight"] = change(source["head.weight"])
    assert_refused(model, source, rf"as it was(.|\n)*head.weight: {says}")


@pytest.mark.parametrize("kind", ["meta", "sparse", "quantized", "nan", "int"])
def test_the_same_from_a_file(kind, tmp_path):
    change, says = BAD[kind]
    source = state_of(make())
    source["head.weight"] = change(source["head.weight"])
    torch.save({"model": source}, tmp_path / "bad.pt")
    assert_refused(make(), tmp_path / "bad.pt", f"head.weight: {says}")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("last.running_var", torch.full((5,), math.inf), "it has NaN or infinite values"),
        ("last.num_batches_tracked", torch.tensor(2.5), "float32 .* int64"),
        ("last.num_batches_tracked", torch.tensor(True), "bool .* int64"),
        (
            "last.num_batches_tracked",
            torch.tensor(2**64 - 1, dtype=torch.uint64),
            "it has numbers beyond int64's largest",
        ),
    ],
)
def test_buffers(name, value, says):
    model = make()
    assert_refused(model, state_of(model) | {name: value}, f"{name}: {says}")


def test_numbers_that_a_narrower_model_cannot_hold():
    model, source = make(torch.float16), state_of(make())
    source["head.weight"][0, 0] = 7e4
    assert_refused(model, source, "head.weight: .*float16's largest")


def test_what_merely_loses_precision_is_loaded():
    source = {name: value.double() if value.is_floating_point() else value for name, value in state_of(make()).items()}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = make(dtype)
        assert sd.load_checkpoint(model, source).is_complete
        assert torch.equal(model.head.weight, source["head.weight"].to(dtype))
        assert {value.dtype for value in model.parameters()} == {dtype}


def test_infinite_values_that_the_model_has_too():
    """Masks of -inf, and the ranges that quantization observes."""
    model, other = make(), make()
    for each in (model, other):
        each.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert sd.load_checkpoint(model, other.state_dict()).is_complete
    assert_refused(model, other.state_dict() | {"mask": torch.tensor([-math.inf, -math.inf])}, "mask: it has NaN")


def test_many_names_are_counted():
    source = {
        name: value * math.nan if value.is_floating_point() else value for name, value in state_of(make()).items()
    }
    assert_refused(make(), source, "cls_token: it has NaN(.|\n)*and 27 more")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_two_names_that_become_one(prefix):
    model = make()
    source = {f"{prefix}{name}": value for name, value in state_of(make()).items()} | {"head.bias": torch.ones(5)}
    assert_refused(model, source, f"head.bias and {prefix}head.bias|{prefix}head.bias and head.bias")


@pytest.mark.parametrize("ema", [False, True])
def test_weights_in_two_places(ema):
    model, (one, two) = make(), (state_of(make()), state_of(make()))
    places = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    says = f"weights in one place: got '{places[0]}' and '{places[1]}'"
    assert_refused(model, dict(zip(places, (one, two), strict=True)), says, ema=ema)
    assert sd.load_checkpoint(model, {places[1]: two}, ema=ema).is_complete


def test_weights_of_which_none_fits():
    """Under another prefix, as Lightning writes them; or into what DataParallel has put around a model."""
    model = make()
    assert_refused(model, {f"net.{name}": value for name, value in state_of(make()).items()}, "0 tensors loaded")
    assert_refused(nn.DataParallel(model), state_of(make()), "0 tensors loaded")


def test_two_names_of_an_origin_that_become_one():
    golden = read("rmt")
    twice = {"head_norm.bias": golden.state["norm.bias"] + 1}
    assert_refused(make_rmt(golden), golden.state | twice, "norm.bias and head_norm.bias", origin="rmt")
    qkv = {"stages.0.blocks.0.attn.qkv.bias": torch.ones(48)}
    assert_refused(make_rmt(golden), golden.state | qkv, "stages.0.* and .*q_proj.bias, .*k_proj.bias, ", origin="rmt")


def test_q_k_and_v_that_do_not_go_together():
    golden = read("rmt")
    name = "layers.0.blocks.0.retention.q_proj.weight"
    state = golden.state | {name: golden.state[name][:, :3]}
    with pytest.raises(ValueError, match=f"not in the model: {name}"):
        sd.load_checkpoint(make_rmt(golden), state, origin="rmt")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def test_one_tensor_under_two_names():
    model, other = Tied(), Tied()
    assert sd.load_checkpoint(model, other.state_dict()).is_complete
    assert torch.equal(model.a.weight, other.a.weight)
    assert model.a.weight is model.b.weight
    assert_refused(model, {"a.weight": torch.ones(3, 3), "b.weight": torch.zeros(3, 3)}, "b.weight: .*a.weight")


@pytest.mark.parametrize("whole", [True, False])
def test_models_without_memory(whole):
    model = make()
    source = state_of(model)
    (model if whole else model.blocks[1]).to("meta")
    with pytest.raises(ValueError, match=r"(cls_token|blocks.1.norm1.weight): .* meta device"):
        sd.load_checkpoint(model, source)
    if not whole:
        assert torch.equal(model.cls_token, source["cls_token"])


def test_a_model_that_is_not_initialised_yet():
    model, source = make(), state_of(make())
    model.head = nn.LazyLinear(5)
    with pytest.raises(ValueError, match=r"head.weight: it is not initialised(.|\n)*forward pass"):
        sd.load_checkpoint(model, source)
    assert not torch.equal(model.cls_token, source["cls_token"])


def test_a_model_whose_tensor_repeats_its_memory():
    model, source = make(), state_of(make())
    model.register_buffer("zz", torch.zeros(1).expand(3))
    assert_refused(model, source | {"zz": torch.zeros(3)}, r"zz: it is an expanded tensor(.|\n)*clone")


def test_a_models_own_tensors():
    model = make()
    before = bits(model)
    assert sd.load_checkpoint(model, model.state_dict()).is_complete
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    one, two = (f"blocks.{i}.norm1.weight" for i in (0, 1))
    old = state_of(model)
    sd.load_checkpoint(model, model.state_dict() | {one: model.state_dict()[two], two: model.state_dict()[one]})
    assert torch.equal(model.state_dict()[one], old[two])
    assert torch.equal(model.state_dict()[two], old[one])


def test_what_a_model_keeps():
    model, source, seen = make(), state_of(make()), []
    model.blocks.requires_grad_(False)
    model.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    parameters, flags = list(model.parameters()), [value.requires_grad for value in model.parameters()]
    sd.load_checkpoint(model, source)
    assert seen == ["loaded"]
    assert [value.requires_grad for value in model.parameters()] == flags
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())


def test_models_made_in_inference_mode():
    with torch.inference_mode():
        model = make()
    source = state_of(make())
    assert sd.load_checkpoint(model, source).is_complete
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
    trained = make()
    with torch.inference_mode():
        assert sd.load_checkpoint(trained, model.state_dict()).is_complete
    assert torch.equal(trained.head.weight, source["head.weight"])
    trained(torch.randn(1, 3, 16, 16)).sum().backward()


def limited(work):
    """Run work in a copy of this process that may take 512 MB more."""
    import resource

    def within():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)
        work()

    assert not killed(within)


HUGE = 3 * 10**8


@pytest.mark.parametrize("what", ["qkv", "gamma", "positions", "native", "file"])
def test_shapes_are_compared_before_anything_is_made_of_them(what, tmp_path):
    """Each is a few bytes that say to be 1.2 GB."""
    rmt, dit = read("rmt"), read("dit")
    parts = {f"layers.0.blocks.0.retention.{part}_proj.bias": torch.zeros(1).expand(HUGE) for part in "qkv"}
    positions = {"pos_embed": torch.zeros(1).expand(1, 2500**2, 48)}
    model, origin, state = {
        "qkv": (make_rmt(rmt), "rmt", rmt.state | parts),
        "gamma": (make_rmt(rmt), "rmt", rmt.state | {"x.gamma_1": torch.zeros(2).expand(1, 1, HUGE // 2, 2)}),
        "positions": (
            make_dit(dit, decay="none", rope="none", lpe_kernel_size=0, gate_rank=0),
            "dit",
            dit.state | positions,
        ),
        "native": (make(), "native", state_of(make()) | {"head.bias": torch.zeros(1).expand(HUGE)}),
        "file": (make(), "native", state_of(make()) | {"head.bias": torch.zeros(1).expand(HUGE)}),
    }[what]
    source = state
    if what == "file":
        torch.save(state, source := tmp_path / "huge.pt")
    limited(lambda: assert_refused_or_left(model, source, origin))


def assert_refused_or_left(model, source, origin):
    with pytest.raises(ValueError, match="does not fit the model, which stays as it was"):
        sd.load_checkpoint(model, source, origin=origin)
    assert not sd.load_checkpoint(model, source, origin=origin, strict=False).is_complete
