"""What SDTH and ViT have in common with timm's models: pooling, features by number, pruning, groups of parameters."""

import re
import sys
import typing

import pytest
import torch

import spatial_decay as sd

X = (2, 3, 32, 64)


def make(name: str, **options):
    if name == "SDTH":
        small = {"embed_dims": [8, 16, 24, 32], "depths": [2, 1, 2, 1], "num_heads": [2, 2, 3, 4], "projection_dim": 20}
        return sd.SDTH(5, **(small | options))
    return sd.ViT(
        5, **({"img_size": 32, "patch_size": 8, "dim": 16, "depth": 4, "num_heads": 2, "decay": "full"} | options)
    )


both = pytest.mark.parametrize("name", ["SDTH", "ViT"])


@both
@torch.no_grad()
def test_pooling_none(name):
    model, x = make(name).eval(), torch.randn(X)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    assert model.config["global_pool"] == model.global_pool == ""
    everything = model(x)
    if name == "SDTH":
        assert everything.shape == (2, 20, 1, 2)
        torch.testing.assert_close(everything.mean((2, 3)), pooled)
    else:
        assert torch.equal(everything, model.forward_features(x))
    again = type(model)(**model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), everything)


@both
def test_a_pooling_that_cannot_be_changes_nothing(name):
    model = make(name)
    with pytest.raises(ValueError, match="global_pool must be one of .*: got 'max'"):
        model.reset_classifier(3, "max")
    with pytest.raises(
        ValueError, match="global_pool='' needs num_classes=0, it reads pooled features: got num_classes=3"
    ):
        model.reset_classifier(3, "")
    assert model.num_classes == model.config["num_classes"] == model.head.out_features == 5
    with pytest.raises(ValueError, match="drop_rate must satisfy 0 <= drop_rate < 1: got 1.0"):
        make(name, drop_rate=1.0)


@both
@pytest.mark.parametrize("wrong", [-4, 2.5, "7", True, None])
def test_a_number_of_classes_that_cannot_be_changes_nothing(name, wrong):
    model = make(name)
    head, config = model.head, dict(model.config)
    says = re.escape(f"num_classes must be a whole number >= 0: got {wrong!r}.")
    with pytest.raises(ValueError, match=says):
        model.reset_classifier(wrong, "avg")
    assert (model.num_classes, model.head, model.config) == (5, head, config)
    assert model.global_pool == config["global_pool"]
    with pytest.raises(ValueError, match=says):
        type(model)(wrong)
    with pytest.raises(ValueError, match="in_chans must be a whole number >= 1: got 0"):
        make(name, in_chans=0)


@torch.no_grad()
def test_pooling_changes_and_a_token_that_is_not_there_is_refused():
    model, x = make("ViT").eval(), torch.randn(X)
    tokens = model.forward_features(x)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), tokens[:, 1:].mean(1))
    model.reset_classifier(0, "prr")
    torch.testing.assert_close(model(x), model.prr(tokens)[:, 0])
    with pytest.raises(ValueError, match="global_pool='token' needs class_token=True"):
        make("ViT", class_token=False, global_pool="avg").reset_classifier(5, "token")


@both
def test_dropout_before_the_classifier(name):
    model, x = make(name, drop_rate=0.5), torch.randn(X)
    with torch.no_grad():
        features = model.eval().forward_features(x)
        kept = model.forward_head(features, pre_logits=True)
        model.head_drop.train()
        dropped = model.forward_head(features, pre_logits=True)
    zero = dropped == 0
    assert 0.2 < zero.float().mean() < 0.8
    torch.testing.assert_close(dropped[~zero], 2 * kept[~zero])


@both
@torch.no_grad()
def test_features_by_number(name):
    model, x = make(name).eval(), torch.randn(X)
    last, features = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert len(features) == len(model.feature_info) == 4
    for map_, info in zip(features, model.feature_info, strict=True):
        assert map_.shape == (2, info["num_chs"], 32 // info["reduction"], 64 // info["reduction"])
        assert info["module"] in dict(model.named_modules())
    for indices, numbers in ((2, [2, 3]), ([-1, 0], [0, 3]), (None, [0, 1, 2, 3]), ((1, 1), [1])):
        some = model.forward_intermediates(x, indices, intermediates_only=True)
        assert [next(i for i, f in enumerate(features) if torch.equal(f, s)) for s in some] == numbers
    calls = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda *_: calls.append(1))
    model.forward_intermediates(x, [1], stop_early=True)
    assert len(calls) == 2
    for wrong in (0, 5, [4], [-5], []):
        with pytest.raises(ValueError, match="indices"):
            model.forward_intermediates(x, wrong)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or .*: got 'HWC'"):
        model.forward_intermediates(x, output_fmt="HWC")


@both
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python keeps overloads since 3.11")
def test_flags_that_are_known_at_run_time_alone_have_a_type(name):
    method = getattr(sd, name).forward_intermediates
    last = typing.get_type_hints(typing.get_overloads(method)[-1])
    assert last == typing.get_type_hints(method)
    assert last["intermediates_only"] is bool


@torch.no_grad()
def test_formats_of_features():
    x = torch.randn(X)
    model = make("SDTH").eval()
    last, maps = model.forward_intermediates(x)
    same_last, channels_last = model.forward_intermediates(x, output_fmt="NHWC")
    assert torch.equal(same_last, last)
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(maps, channels_last, strict=True))
    with pytest.raises(ValueError, match="norm must be False: got True, and no norm stands behind a stage"):
        model.forward_intermediates(x, norm=True)

    model = make("ViT", num_registers=2).eval()
    torch.nn.init.normal_(model.norm.weight)
    last, features = model.forward_intermediates(x, [1, 3], return_prefix_tokens=True, norm=True, output_fmt="NLC")
    patches, prefix = features[1]
    assert torch.equal(torch.cat([prefix, patches], 1), last)
    maps = model.forward_intermediates(x, [1, 3], norm=True, intermediates_only=True)
    assert torch.equal(maps[0].flatten(2).mT, features[0][0])
    raw = model.forward_intermediates(x, [1, 3], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(model.norm(raw[1]), patches)
    assert not torch.allclose(raw[1], patches)
    with pytest.raises(ValueError, match="return_prefix_tokens needs prefix tokens"):
        make("ViT", class_token=False, global_pool="avg").forward_intermediates(x, return_prefix_tokens=True)


@both
def test_pruning_leaves_what_the_features_need(name):
    model, x = make(name, drop_path_rate=0.0).eval(), torch.randn(X)
    wanted = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    before = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([-2, 0], prune_norm=True) == [0, 2]
    assert sum(p.numel() for p in model.parameters()) < before
    got = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    got[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(model.feature_info) == 3
    if name == "SDTH":
        assert torch.equal(model(x), wanted[1])  # without a head, forward gives the last map
        assert model.forward_features(torch.randn(1, 3, 16, 16)).shape == (1, 24, 1, 1)  # the total stride is 16 now
        again = sd.SDTH(**model.config)
        assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    with pytest.raises(ValueError, match="indices"):
        model.prune_intermediate_layers([3])


def test_pruning_keeps_the_head_on_demand():
    model, x = make("ViT").eval(), torch.randn(X)
    model.prune_intermediate_layers([1], prune_head=False)
    assert model(x).shape == (2, 5)
    assert model.config["depth"] == 2
    model = make("SDTH")
    with pytest.raises(ValueError, match="the head reads the last stage, 3: got indices=.1. and prune_head=False"):
        model.prune_intermediate_layers([1], prune_head=False)
    assert model.prune_intermediate_layers(1, prune_head=False) == [3]
    assert model(x).shape == (2, 5)


def test_no_projection_in_the_head():
    model, x = make("SDTH", projection_dim=0).eval(), torch.randn(X)
    torch.testing.assert_close(model(x), model.head(model.forward_features(x).mean((2, 3))))


@both
@pytest.mark.parametrize("coarse", [False, True])
def test_groups_name_every_parameter_but_the_classifiers(name, coarse):
    model = make(name, **({"num_registers": 1} if name == "ViT" else {}))
    groups = model.group_matcher(coarse)
    patterns = [
        groups["stem"],
        *([groups["blocks"]] if isinstance(groups["blocks"], str) else [p for p, _ in groups["blocks"]]),
    ]
    left = {n for n, _ in model.named_parameters() if not any(re.match(pattern, n) for pattern in patterns)}
    head = {"head.weight", "head.bias"}
    if coarse and name == "SDTH":
        head |= {n for n, _ in model.named_parameters() if n.startswith(("head_proj", "head_norm"))}
    assert left == head
