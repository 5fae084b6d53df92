"""model.config: every argument with its value, in JSON, and the class called with it builds the same again."""

import inspect
import json

import pytest
import torch

import spatial_decay as sd
from spatial_decay.layers import AttentionOptions
from spatial_decay.models import SDTH, SDTP, ViT
from spatial_decay.models.config import keeps_config

KINDS = [
    sd.kinds.FixedDecomposed(heads_range=5),
    sd.kinds.Bidirectional(gate_bias_init=4.0),
    {"kind": "full", "alpha": 0.2},
    "1d",
]
STAGES = {"embed_dims": (8, 16, 24, 32), "depths": 1, "num_heads": (2, 2, 3, 4), "projection_dim": 20}
SMALL_VIT = {"img_size": (32, 48), "patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2}
LATENTS = (torch.randn(2, 4, 8, 12), torch.tensor([0, 999]), torch.tensor([3, 7]))
MODELS = {
    "SDTH": (
        lambda: SDTH(5, **STAGES, decay=KINDS, init_values=(None, 1e-3, None, 1), qk_norm=True),
        (torch.randn(2, 3, 64, 64),),
    ),
    "SDTP": (lambda: SDTP((8, 12), 2, 4, 10, dim=24, depth=1, num_heads=2, decay="gaussian"), LATENTS),
    "ViT": (lambda: ViT(5, **SMALL_VIT, decay=sd.kinds.Full(alpha=0.3)), (torch.randn(2, 3, 32, 48),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_holds_every_argument_and_goes_through_files(name, tmp_path):
    build, inputs = MODELS[name]
    model = build().eval()
    arguments = set(inspect.signature(type(model)).parameters) - {"options"}
    assert set(model.config) == arguments | set(AttentionOptions.__annotations__)
    assert json.loads(json.dumps(model.config)) == model.config
    torch.save({"config": model.config, "weights": model.state_dict()}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    for config in (saved["config"], json.loads(json.dumps(model.config))):
        again = type(model)(**config).eval()
        again.load_state_dict(saved["weights"])
        assert torch.equal(again(*inputs), model(*inputs))
        assert again.config == model.config


def test_kinds_are_there_with_every_option():
    config = MODELS["SDTH"][0]().config
    assert config["decay"] == [
        {"kind": "fixed_decomposed", "reference_grid": None, "initial_value": 2.0, "heads_range": 5},
        {"kind": "bidirectional", "gate_bias": True, "gate_bias_init": 4.0},
        {"kind": "full", "reference_grid": None, "alpha": 0.2, "gate_bias": False, "gate_bias_init": 0.0},
        {"kind": "1d", "causal": False, "gate_bias": False, "gate_bias_init": 0.0},
    ]
    assert config["init_values"] == [None, 1e-3, None, 1]
    assert (config["qk_norm"], config["rope"], config["gate_rank"]) == (True, "axial", 16)
    config = MODELS["SDTP"][0]().config
    assert config["decay"] == {"kind": "gaussian", "reference_grid": [4, 6]}
    assert (config["input_size"], config["lpe_kernel_size"], config["gate_rank"]) == ([8, 12], 3, 48)
    config = ViT(5, **SMALL_VIT, decay=sd.kinds.Gaussian(reference_grid=(3, 5)), gate_rank=4).config
    assert config["decay"] == {"kind": "gaussian", "reference_grid": [3, 5]}
    assert (config["rope"], config["gate_rank"], config["img_size"]) == ("none", 4, [32, 48])


@pytest.mark.parametrize("decay", ["full", sd.kinds.Full(), {"kind": "full"}], ids=["name", "value", "mapping"])
def test_one_value_stands_for_all_stages(decay):
    options = STAGES | {"embed_dims": 16, "num_heads": [1, 2, 2, 4], "init_values": 1e-5, "mlp_ratios": 2}
    model = SDTH(5, **options, decay=decay)
    lists = SDTH(
        5,
        **(options | {"embed_dims": [16] * 4, "depths": [1] * 4, "init_values": [1e-5] * 4, "mlp_ratios": [2] * 4}),
        decay=["full"] * 4,
    )
    assert model.config == lists.config
    assert model.config["decay"] == [sd.kinds.Full().resolved().config] * 4
    assert model.state_dict().keys() == lists.state_dict().keys()
    three = SDTH(5, embed_dims=[8, 16, 16], depths=1, num_heads=2, decay="1d")
    assert len(three.stages) == 3


class Subclass(ViT):
    def __init__(self, width: int) -> None:
        super().__init__(5, **(SMALL_VIT | {"dim": width}))


class Decorated(ViT):
    @keeps_config(rope="axial")
    def __init__(self, num_heads: int = 2, *, width: int = 16, **options) -> None:
        super().__init__(5, **(SMALL_VIT | {"dim": width, "num_heads": num_heads}), decay="full", **options)


def test_subclasses():
    config = Subclass(24).config
    assert config == ViT(5, **(SMALL_VIT | {"dim": 24})).config
    model = Decorated(width=24, lpe_kernel_size=3)
    assert (model.config["width"], model.config["num_heads"], model.config["rope"]) == (24, 2, "axial")
    assert not {"dim", "decay", "num_classes"} & set(model.config)
    again = Decorated(**model.config)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    with pytest.raises(TypeError, match="Decorated has no keyword depth: its own are num_heads, width, and those for"):
        Decorated(depth=3)


class DecoratedSDTH(SDTH):
    @keeps_config()
    def __init__(self, width: int = 8, **options) -> None:
        super().__init__(5, embed_dims=[width, width], depths=1, num_heads=2, decay="full", **options)


@pytest.mark.parametrize("build", [Decorated, DecoratedSDTH])
def test_what_changes_later_is_noted_where_the_config_has_it(build):
    model = build()
    config = dict(model.config)
    model.reset_classifier(3, "avg")
    assert model.num_classes == 3
    model.prune_intermediate_layers([0])
    assert model.config == config


def test_a_second_init_has_a_config_of_its_own():
    model = ViT(5, **SMALL_VIT)
    names = set(vars(model))
    model.__init__(7, **(SMALL_VIT | {"depth": 1}))
    assert model.config == ViT(7, **(SMALL_VIT | {"depth": 1})).config
    with pytest.raises(ValueError, match="drop_rate"):
        model.__init__(5, **SMALL_VIT, drop_rate=2.0)
    model.__init__(9, **SMALL_VIT)
    assert model.config == ViT(9, **SMALL_VIT).config
    assert set(vars(model)) == names


def test_keywords_that_are_not_there_are_said_beside_those_that_are():
    says = (
        "ViT has no keyword dims, heads: its own are num_classes, in_chans, img_size, .*and those for all blocks qkv_"
    )
    with pytest.raises(TypeError, match=says):
        ViT(5, heads=3, dims=4)
    with pytest.raises(
        TypeError, match=r"Options of a kind belong to decay, for instance decay={'kind': ..., 'alpha':"
    ):
        SDTP(alpha=3)
    with pytest.raises(TypeError, match="SDTH: too many positional arguments"):
        SDTH(5, 3, 64)
    with pytest.raises(TypeError, match="ViT: multiple values for argument 'num_classes'"):
        ViT(5, num_classes=3)
