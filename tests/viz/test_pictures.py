"""Pictures: each shows what the numbers say, in maps that are there, saves to PNG, and leaves pyplot alone."""

from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

from spatial_decay import SpatialDecayAttention, viz
from spatial_decay.viz.panels import log_scale
from tests.cases import GATES_OF_KIND
from tests.viz.backbone import DIM, HEADS, SIZE, make


def record(kind="full", num_prefix=0):
    model, images = make(kind, num_prefix, dtype=torch.float32)
    return viz.record(model, images), images


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


def saved(figure, path):
    figure.savefig(path, dpi=20)
    return matplotlib.image.imread(path)


@pytest.mark.parametrize(
    ("kind", "num_prefix", "heads"),
    [
        ("full", 2, [1]),
        pytest.param("full", 0, None, marks=pytest.mark.slow),
        pytest.param("decomposed", 0, None, marks=pytest.mark.slow),
        pytest.param("1d", 0, None, marks=pytest.mark.slow),
        pytest.param("fixed", 0, None, marks=pytest.mark.slow),
        pytest.param("gaussian", 1, None, marks=pytest.mark.slow),
        pytest.param("none", 0, [0], marks=pytest.mark.slow),
    ],
)
def test_decay_maps_save_to_png(kind, num_prefix, heads, tmp_path):
    (layer, _), images = record(kind, num_prefix)
    figure = viz.plot_decay_maps(layer, images, [(0, 0, 1), (1, 2, 3)], heads=heads)
    assert saved(figure, tmp_path / "maps.png").std() > 0
    num_panels = len(GATES_OF_KIND.get(kind, [])) + 2
    num_heads = HEADS if heads is None else len(heads)
    assert len(figure.axes) == 2 * (1 + num_panels * (num_heads + 1))  # the image; maps and a colour bar
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels.count("G, nats\nper grid step") == 2 * len(GATES_OF_KIND.get(kind, []))
    assert titles(figure).count(f"head {num_heads - 1 if heads is None else heads[0]}") == 2 * num_panels


def test_decay_maps_of_one_token_and_one_channel(tmp_path):
    layer = viz.record(SpatialDecayAttention(DIM, HEADS), torch.randn(1, 1, 1, DIM))[0]
    assert layer.name == "SpatialDecayAttention"
    viz.plot_decay_maps(layer, torch.zeros(1, 1, 4, 4), [(0, 0, 0)], heads=[0]).savefig(tmp_path / "maps.png", dpi=20)


@pytest.mark.slow
def test_sixteen_heads_go_on_in_a_second_line_and_the_ring_can_be_seen():
    layer = viz.record(SpatialDecayAttention(64, 16, decay="fixed", lpe_kernel_size=0), torch.randn(1, 28, 40, 64))[0]
    figure = viz.plot_decay_maps(layer, torch.rand(1, 3, 56, 80), [(0, 3, 30)])
    maps = [ax for ax in figure.axes if ax.get_title().startswith("head")]
    assert len(maps) == 32
    rows = {ax.get_subplotspec().rowspan.start for ax in maps}
    assert len(rows) == 4
    assert figure.get_size_inches()[0] < 11
    (circle, _) = maps[0].patches
    assert circle.center == (30, 3)
    assert circle.radius == pytest.approx(1.4)  # of a patch, which is a pixel or two


def test_a_ring_is_as_large_as_a_patch():
    (layer, _), images = record()
    figure = viz.plot_decay_maps(layer, images, [(0, 1, 2)], heads=[0])
    assert {circle.radius for ax in figure.axes for circle in ax.patches if hasattr(circle, "radius")} == {0.5}


@pytest.mark.parametrize(
    ("values", "highest", "expected"),
    [
        ([1.0, 0.5], 1.0, (0.1, 1.0)),  # a decade at least
        ([1.0, 0.02], 1.0, (0.02, 1.0)),
        ([1.0, 0.0], 1.0, (1e-4, 1.0)),
        ([0.004, 0.002], 0.0, (0.0004, 0.004)),
        ([300.0, 1.0], 1.0, (1.0, 300.0)),  # gaussian
        ([0.0, 0.0], 0.0, (1e-31, 1e-30)),
    ],
)
def test_log_scale(values, highest, expected):
    norm = log_scale(torch.tensor(values), highest=highest)
    assert (norm.vmin, norm.vmax) == pytest.approx(expected)


def test_with_and_without_decay_share_a_scale():
    (_, layer), images = record()
    figure = viz.plot_with_and_without_decay(layer, images, [(1, 2, 3)])
    plain, _, attention = [ax.images[0] for ax in figure.axes if ax.get_title() == "head 1"]
    assert plain.norm is attention.norm
    expected = layer.without_decay().attention((2, 3))[1, 1]
    torch.testing.assert_close(torch.from_numpy(plain.get_array().data), expected)
    torch.testing.assert_close(torch.from_numpy(attention.get_array().data), layer.attention((2, 3))[1, 1])


def test_kinds_side_by_side():
    kinds = ["full", "gaussian", "decomposed"]
    layers = [record(kind)[0][0] for kind in kinds]
    images = record()[1]
    figure = viz.plot_kinds(layers, images, (0, 1, 2), head=1)
    assert [title for title in titles(figure) if title][1:] == kinds * 2
    drawn = {ax.get_title(): ax.images[0].get_array() for ax in figure.axes[1 : 1 + len(kinds)]}
    assert all(values.max() == 1.0 for values in drawn.values())
    torch.testing.assert_close(torch.from_numpy(drawn["full"].data), layers[0].decay((1, 2))[0, 1])
    with pytest.raises(ValueError, match=r"grids of one size: got 0"):
        viz.plot_kinds([], images, (0, 1, 2))


def test_reach_of_layers_and_heads():
    layers, images = record()
    figure = viz.plot_reach(layers, images, image=1, heads=[1], share=0.8)
    maps = [ax for ax in figure.axes if ax.get_title() == "head 1"]
    assert [ax.get_ylabel() for ax in maps] == ["first.attn", "second"]
    for ax, layer in zip(maps, layers, strict=True):
        photo, heat = ax.images
        assert photo.get_extent() == [-0.5, SIZE[1] - 0.5, SIZE[0] - 0.5, -0.5]
        torch.testing.assert_close(torch.from_numpy(heat.get_array().data), viz.reach(layer, 0.8)[1, 1])


def test_reach_in_axes_that_are_there():
    layers, images = record()
    figure = Figure()
    ax = figure.subplots()
    assert viz.plot_reach(layers[:1], images, heads=[0], ax=ax) is figure
    assert len(ax.images) == 2
    with pytest.raises(ValueError, match=r"room for one map: got 2. Choose a layer and a head"):
        viz.plot_reach(layers[:1], images, ax=ax)
    with pytest.raises(ValueError, match="got none"):
        viz.plot_reach([], images)


def test_attention_distance_by_depth_and_head(tmp_path):
    layers, _ = record()
    ax = viz.plot_attention_distance(layers, label="with")
    assert viz.plot_attention_distance([layer.without_decay() for layer in layers], label="without", ax=ax) is ax
    assert ax.get_legend_handles_labels()[1] == ["with", "without"]
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylim()[1] > max(max(line.get_ydata()) for line in ax.lines)
    line, first, second = ax.lines[:3]
    expected = [viz.attention_distance(layer).mean(0).tolist() for layer in layers]
    assert first.get_ydata() == pytest.approx(expected[0])
    assert second.get_ydata() == pytest.approx(expected[1])
    assert line.get_ydata() == pytest.approx([sum(heads) / HEADS for heads in expected])
    assert saved(ax.figure, tmp_path / "distance.png").std() > 0
    with pytest.raises(ValueError, match="got none"):
        viz.plot_attention_distance([])


def test_a_query_that_moves(tmp_path):
    (layer, _), images = record()
    path = [(0, 0), (2, 3)]
    animation = viz.animate_query(layer, images, path, image=1, head=1)
    animation.save(tmp_path / "query.gif", writer="pillow", dpi=20)
    _, decay_ax, attention_ax = animation._fig.axes
    assert decay_ax.patches[0].center == (3, 2)
    shown = torch.from_numpy(attention_ax.images[0].get_array().data)
    torch.testing.assert_close(shown, layer.attention((2, 3))[1, 1])
    assert (tmp_path / "query.gif").read_bytes()[:3] == b"GIF"
    with pytest.raises(ValueError, match="one .h, w. or more"):
        viz.animate_query(layer, images, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": []}, "one or more"),
        ({"queries": [(2, 0, 0)]}, "of 2 images"),
        ({"queries": [(0, 0, 0)], "heads": []}, "0 to 1, one or more"),
        ({"queries": [(0, 0, 0)], "heads": [2]}, "0 to 1"),
    ],
)
def test_what_is_not_there_cannot_be_drawn(options, message):
    (layer, _), images = record()
    for plot in (viz.plot_decay_maps, viz.plot_with_and_without_decay):
        with pytest.raises(ValueError, match=message):
            plot(layer, images, **options)


def test_training_curve_saves_to_png(tmp_path):
    figure = viz.plot_training_curve({"loss": {"train": [2.0]}, "accuracy (%)": {"train": [50, 60], "test": [40, 55]}})
    figure.savefig(tmp_path / "curve.png", dpi=40)
    assert matplotlib.image.imread(tmp_path / "curve.png").std() > 0
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss", "accuracy (%)"]
    assert figure.axes[1].get_legend_handles_labels()[1] == ["train, last 60", "test, last 55"]


def test_no_state_of_pyplot():
    for path in Path(viz.__file__).parent.glob("*.py"):
        assert "matplotlib.pyplot" not in path.read_text(), path
