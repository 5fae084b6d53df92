"""What ablation.py trains: a plain ViT and a small SDT-H with each decay, from the same first weights, in one way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn

import spatial_decay as sd
from image_folder import LabelledImages
from spatial_decay.layers.kinds import DecayLike, as_kind
from spatial_decay.models.sdt_h import SDTHOptions
from spatial_decay.models.sdt_p import sincos_positions
from spatial_decay.models.vit import ViTOptions

Positions: TypeAlias = Literal["learned", "sincos", "rope", "none"]

VIT: ViTOptions = {
    "dim": 48,
    "depth": 4,
    "num_heads": 3,
    "mlp_ratio": 2,
    "class_token": False,  # the decomposed kinds have no place for one
    "global_pool": "avg",
}
SDT_H: SDTHOptions = {
    "embed_dims": (16, 32, 64),
    "depths": (1, 1, 2),
    "num_heads": (1, 2, 4),
    "mlp_ratios": 2,
    "drop_path_rate": 0.0,
    "projection_dim": 128,
    "stem_stride": 1,
    "lpe_kernel_size": 3,
    "gate_rank": 4,
}

STRUCTURE = "rows, columns: none"
DECAYS: dict[str, DecayLike] = {
    "none": "none",
    "fixed": "fixed",
    "full": "full",
    "1d": "1d",
    "bidirectional": "bidirectional",
    "decomposed": "decomposed",
    "full, alpha 0.05": sd.kinds.Full(alpha=0.05),
    "full, alpha 0.15": sd.kinds.Full(alpha=0.15),
    "full, alpha 0.2": sd.kinds.Full(alpha=0.2),
    "alibi": "alibi",
    "learned": "learned",
    "squared": "squared",
    "gaussian": "gaussian",
    "rows, columns: fixed": "fixed_decomposed",
    # Rates of 6e-8: the structure of `decomposed`, attention along rows and then along columns, without its decay.
    STRUCTURE: sd.kinds.FixedDecomposed(initial_value=24.0, heads_range=0.0),
}
"""Names of rows -> what `decay=` takes."""


@dataclass(frozen=True)
class Variant:
    """One row: a model, its positions ("" in SDT-H, which has convolutions and RoPE) and the name of its decay."""

    model: Literal["vit", "sdt_h"]
    positions: Positions | Literal[""]
    decay: str


@dataclass(frozen=True)
class Recipe:
    """How much is trained and tested; the same for all rows of a table."""

    vit_images: int
    vit_epochs: int
    sdt_h_images: int
    sdt_h_epochs: int
    gate_images: int  # one epoch, at each other size
    test_images: int
    size_images: int  # tested at other sizes
    further_epochs: int
    batch_size: int
    learning_rate: float
    size: int = 28  # pixels, trained on
    other_sizes: tuple[int, ...] = (40, 56, 84, 112)  # tested besides
    patch_size: int = 4


def build(
    variant: Variant, data: LabelledImages, recipe: Recipe, *, seed: int, decay: DecayLike | None = None
) -> sd.ViT | sd.SDTH:
    """The model before training. What it has in common with those of other decays has the same weights.

    Args:
        variant: Which.
        data: For channels and classes.
        recipe: For size and patches.
        seed: Of the weights.
        decay: In place of the variant's.
    """
    decays: tuple[DecayLike, ...] = ("none", decay or DECAYS[variant.decay])
    plain, model = (_build(variant, data, recipe, seed, kind) for kind in decays)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


def _build(variant: Variant, data: LabelledImages, recipe: Recipe, seed: int, decay: DecayLike) -> sd.ViT | sd.SDTH:
    channels = data.train.pixels.shape[1]
    torch.manual_seed(seed)
    if variant.model == "sdt_h":
        return sd.SDTH(data.num_classes, channels, **(SDT_H | SDTHOptions(decay=decay))).to(data.device)
    options = ViTOptions(img_size=recipe.size, patch_size=recipe.patch_size, decay=decay)
    options["rope"] = "axial" if variant.positions == "rope" else "none"
    model = sd.ViT(data.num_classes, channels, **(VIT | options))
    if variant.positions != "learned":
        _fix_positions(variant, model)
    return model.to(data.device)


@torch.no_grad()
def _fix_positions(variant: Variant, model: sd.ViT) -> None:
    """Sines and cosines, or zeros where positions are not added to the tokens; not trained."""
    model.pos_embed.requires_grad = False
    if variant.positions == "sincos":
        model.pos_embed.copy_(sincos_positions(model.embed_dim, sd.Grid(*model.grid_size)))
    else:
        model.pos_embed.zero_()


def at_size(
    variant: Variant, model: nn.Module, size: int, recipe: Recipe, *, scales_positions: bool, scales_decay: bool
) -> sd.ViT:
    """A copy for images of another size; learned positions are interpolated in any case.

    Args:
        variant: What the model is.
        model: It, trained.
        size: Of the images.
        recipe: For the size trained on.
        scales_positions: Sines and cosines are interpolated, and the angles of RoPE in steps of the grid trained on.
            Else both go on as they began, to places that the model has never seen.
        scales_decay: The same of distances, for kinds that have a reference_grid.
    """
    assert isinstance(model, sd.ViT)
    config, state = dict(model.config), model.state_dict()
    if scales_decay:
        config["decay"] = reference_decay(variant.decay, recipe) or config["decay"]
    if scales_positions and variant.positions == "rope":
        config["rope_reference_grid"] = grid_of(recipe)
    is_interpolated = variant.positions == "learned" or (scales_positions and variant.positions == "sincos")
    if not is_interpolated:
        config["img_size"] = size
        del state["pos_embed"]
    other = sd.ViT(**config).to(model.pos_embed.device)
    other.load_state_dict(state, strict=is_interpolated)
    if not is_interpolated:
        _fix_positions(variant, other)
    other.pos_embed.requires_grad = variant.positions == "learned"
    return other


def counts_steps(positions: str, decay: str) -> bool:
    """Whether a plain ViT has positions or distances that go on with the grid, unless they are told of the size."""
    if positions in ("rope", "sincos"):
        return True
    # Rates near 0 stay near 0.
    return decay != STRUCTURE and "reference_grid" in as_kind(DECAYS[decay]).options()


def reference_decay(decay: str, recipe: Recipe) -> DecayLike | None:
    """The same decay with distances in steps of the grid trained on; None for kinds that have no such option."""
    kind = as_kind(DECAYS[decay])
    if "reference_grid" not in kind.options():
        return None
    return as_kind(kind.config | {"reference_grid": grid_of(recipe)})


def grid_of(recipe: Recipe) -> tuple[int, int]:
    """(H, W) of the patches of a plain ViT at the size trained on."""
    side = recipe.size // recipe.patch_size
    return side, side


def is_gate(name: str) -> bool:
    """Whether a parameter belongs to the decay."""
    return ".decay." in name


def is_norm(name: str) -> bool:
    """Whether a parameter belongs to a layer norm."""
    return any(part.startswith("norm") for part in name.split("."))


def train_only(model: nn.Module, is_trained: Callable[[str], bool]) -> None:
    """Freeze the parameters whose names do not say yes."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_trained(name)
