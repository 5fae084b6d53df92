"""The one argument `layout`: what it takes, that all its forms mean the same, and what does not fit."""

import pytest
import torch

import spatial_decay as sd
from spatial_decay.features import as_tokens
from spatial_decay.layout import Grid, Layout, Positions

X = torch.randn(2, 2 + 12, 16)


def placed(num_prefix=2, *, device="cpu"):
    """The 3 x 4 grid as Positions behind prefix tokens."""
    return Positions.of_subset(torch.arange(12, device=device)[None], Grid(3, 4, num_prefix))


@pytest.mark.parametrize("layout", [(3, 4), [3, 4], torch.Size((3, 4)), Grid(3, 4, 2), placed()], ids=str)
def test_all_forms_mean_the_same(layout):
    for module in (
        sd.SpatialDecayMask(16, 2, num_prefix_tokens=2),
        sd.SpatialDecayAttention(16, 2, num_prefix_tokens=2, lpe_kernel_size=0),
        sd.SDTBlock(16, 2, num_prefix_tokens=2, lpe_kernel_size=0, pos_kernel_size=0, mlp_kernel_size=0),
    ):
        torch.testing.assert_close(module(X, layout), module(X, (3, 4)))


def test_a_layout_is_passed_on_whole(monkeypatch):
    """The door of a block makes it; the attention inside, its decay and its convolutions get that very object."""
    seen = []
    block = sd.SDTBlock(16, 2, num_prefix_tokens=2)
    for module in (block.attn, block.pos, block.mlp.conv, block.attn.lpe):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    describe = sd.SpatialDecayMask.describe_tokens
    monkeypatch.setattr(
        sd.SpatialDecayMask, "describe_tokens", lambda self, x, layout: seen.append(layout) or describe(self, x, layout)
    )
    block(X, (3, 4))
    assert len(seen) == 5
    assert all(layout is seen[0] and isinstance(layout, Layout) for layout in seen)


@pytest.mark.parametrize("height", range(1, 7))
@pytest.mark.parametrize("width", range(1, 7))
def test_steps_go_from_the_query_to_the_key(height, width):
    grid = Grid(height, width)
    for multiple in (1, 8):
        dh, dw = grid.steps(device=torch.device("cpu"), dtype=torch.float64, row_multiple=multiple)
        dh, dw = (x.flatten(1) for x in torch.broadcast_tensors(dh, dw))
        assert dh.shape[1] % multiple == 0 or dh.shape[1] == height * width  # where padding would cost too much
        for i in range(height * width):
            for j in range(height * width):
                assert (dh[i, j], dw[i, j]) == (j // width - i // width, j % width - i % width)


def test_numbers_along_the_raster_scan():
    """Tokens at one place share theirs; whole grids count their tokens."""
    h, w = torch.tensor([[1, 0, 1, 0, 5]]), torch.tensor([[2, 3, 2, 0, 0]])
    positions = Positions(h, w, torch.tensor([[True, True, True, True, False]]))
    numbers = positions.raster_numbers(device=h.device, dtype=torch.float32)[0, 0]
    assert numbers[0] == numbers[2] > numbers[1] > numbers[3]
    assert Grid(2, 3, 1).raster_numbers(device=h.device, dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("shape", "num_prefix", "layout", "says"),
    [
        ((2, 14, 16), 2, Grid(3, 4), "the L = 14 tokens of x: got a grid of 3 x 4 patches behind 0 prefix tokens, 12"),
        (
            (2, 14, 16),
            2,
            Grid(2, 7),
            "_tokens = 2, .*: got a grid of 2 x 7 patches behind 0 prefix tokens, 0 of them",
        ),
        ((2, 14, 16), 0, Grid(3, 4, 2), "num_prefix_tokens = 0, .* behind 2 prefix tokens, 2 of them"),
        ((2, 14, 16), 2, placed(0), "the L = 14 tokens of x: got Positions of 12 tokens"),
        ((2, 12, 16), 2, placed(0), "num_prefix_tokens = 2, .*: got Positions of 12 tokens, 0 of them"),
        ((2, 13, 16), 2, placed(1), "num_prefix_tokens = 2, .*: got Positions of 13 tokens, 1 of them"),
        ((2, 14, 16), 1, Positions(torch.ones(1, 14), torch.ones(1, 14)), "= 1, .*: got Positions of 14 tokens, 0 of"),
        ((3, 14, 16), 2, Positions(*torch.ones(2, 2, 14)), "those of the B = 3 images of x, or of 1: got 2"),
        ((2, 14, 16), 2, placed(device="meta"), "on the device of x, cpu: got meta"),
        ((2, 3, 4, 16), 0, Grid(4, 3), r"layout must be the \(H, W\) of the map: got \(4, 3\) and a map of 3 x 4"),
        ((2, 3, 4, 16), 0, Grid(3, 4, 1), "num_prefix_tokens = 0"),
        ((2, 3, 4, 16), 0, placed(0), "a map needs a whole grid.*: got Positions of 12 tokens"),
        ((2, 3, 4, 16), 1, None, "a map .* has no place for prefix tokens"),
        ((2, 14, 16), 2, (3, 5), r"H \* W == L - num_prefix_tokens: got layout=\(3, 5\) \(H \* W = 15\), L = 14"),
        ((2, 14, 16), 2, (3, 4, 1), r"\(H, W\), a Grid or Positions, or None: got \(3, 4, 1\)"),
        ((2, 1, 16), 0, (True, True), r"a Grid or Positions, or None: got \(True, True\)"),
        ((2, 14, 16), 2, "34", "a Grid or Positions, or None: got '34'"),
    ],
)
def test_what_does_not_fit_is_said(shape, num_prefix, layout, says):
    with pytest.raises(ValueError, match=says):
        as_tokens(torch.zeros(shape), layout, dim=16, num_prefix_tokens=num_prefix)


def test_prefix_tokens_of_positions_are_not_asked_of_what_cannot_be_read():
    """torch.func has no values to look at."""

    def tokens(x, known):
        return as_tokens(x, Positions(placed().h, placed().w, known), dim=16, num_prefix_tokens=2)[0]

    assert torch.vmap(tokens)(X[:, None], placed().has_position.expand(2, 1, -1)).shape == (2, 1, 14, 16)


def test_negative_coordinates_and_tokens_that_lie_nowhere():
    h = torch.tensor([[-1, 0, -1, 3]])
    positions = Positions(h, h, torch.tensor([[True, False, True, True]]))
    numbers = positions.raster_numbers(device=h.device, dtype=torch.float32)[0, 0]
    assert numbers[0] == numbers[2] < numbers[3]


def test_text_may_lie_before_the_patches_of_a_layer_without_prefix_tokens():
    """Flux: what lies nowhere need not be the layer's class or register tokens."""
    assert as_tokens(X, placed(2), dim=16)[1].num_tokens == 14
