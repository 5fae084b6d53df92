"""timm's doors: our backbones by timm.create_model, and our attention and block for its VisionTransformer.

Importing this module registers the backbones. It needs the extra: pip install spatial-decay[timm].
"""

import copyreg
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

import spatial_decay.models  # noqa: F401  they register themselves
from spatial_decay.layers import SDTBlock, SpatialDecayAttention
from spatial_decay.layers.kinds import DecayLike
from spatial_decay.layout import LayoutLike
from spatial_decay.models.registry import ENTRIES, Entry, ImageSettings

try:
    from timm.layers import GELU, Attention, Mlp
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models.vision_transformer import ATTN_LAYERS
except ImportError as error:
    raise ImportError(
        "spatial_decay.integrations.timm needs timm 1.0.23 or newer. Install it: pip install spatial-decay[timm]"
    ) from error

__all__ = ["TimmAttention", "TimmBlock", "attention_layer", "block_layer"]  # register_model adds the models' names


class TimmAttention(SpatialDecayAttention):
    """SpatialDecayAttention as timm's VisionTransformer builds and calls it; attention_layer makes it with options.

    timm's Block passes no layout, so the patch tokens must be a square. Its weights have the names of timm's
    attention: qkv, proj, q_norm, k_norm.

    Args:
        dim: D.
        num_heads: N; D must be a multiple of it.
        num_prefix_tokens: P, the class token and the registers of the model.
        qk_norm: norm_layer of q and k over d, before the rotary embedding.
        scale_norm: Must be False: there is no norm before the output projection.
        proj_bias: Bias of the output projection.
        norm_layer: Of qk_norm; None is nn.LayerNorm.
        device: Where the weights are.
        dtype: Of the weights.
        options: Further keywords of SpatialDecayAttention; timm passes qkv_bias, attn_drop and proj_drop.

    Raises:
        TypeError, ValueError: an option that cannot be; the message says what must hold.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_prefix_tokens: int = 1,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        _refuse("TimmAttention", {"scale_norm=True (needs False)": scale_norm})
        super().__init__(dim, num_heads, num_prefix_tokens=num_prefix_tokens, qk_norm=qk_norm, **options)
        if qk_norm and norm_layer is not None:
            self.q_norm, self.k_norm = norm_layer(self.head_dim), norm_layer(self.head_dim)
        if not proj_bias:
            self.proj = nn.Linear(dim, dim, bias=False)
        self.to(device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        layout: LayoutLike = None,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """As SpatialDecayAttention.forward, as timm calls it.

        Args:
            x: Tokens (B, L, D).
            layout: As in SpatialDecayAttention.forward; None: the patch tokens must be a square.
            attn_mask: The same; without layout (L, L).
            is_causal: Must be False.

        Returns:
            (B, L, D).

        Raises:
            ValueError: is_causal; or no layout, and L - P is no square, or attn_mask differs from image to image.
        """
        _check_call(x, layout, attn_mask, self.num_prefix_tokens, is_causal=is_causal)
        return super().forward(x, layout, attn_mask)


class TimmBlock(SDTBlock):
    """SDTBlock as timm's VisionTransformer builds and calls it; block_layer makes it with options.

    timm passes no layout, so the patch tokens must be a square.

    Args:
        dim: D.
        num_heads: N; D must be a multiple of it.
        num_prefix_tokens: P, the class token and the registers of the model.
        qk_norm: norm_layer of q and k over d, before the rotary embedding.
        init_values: First value of LayerScale on the two branches; None or 0 leaves it out, as in timm.
        norm_layer: Of the tokens before attention and MLP, and of qk_norm.
        act_layer: Must be GELU, which is what the MLP has.
        mlp_layer: Must be timm's Mlp, its default: the block has an MLP of its own.
        attn_layer: Must be timm's Attention, its default: the block has an attention of its own.
        scale_attn_norm: Must be False: there is no norm before the last projection of a branch.
        scale_mlp_norm: Must be False, for the same reason.
        proj_bias: Must be True.
        proj_drop: Must be 0: the MLP has no dropout.
        depth: Which block this is; nothing depends on it.
        device: Where the weights are.
        dtype: Of the weights.
        options: Further keywords of SDTBlock; timm passes mlp_ratio, qkv_bias, attn_drop and drop_path.

    Raises:
        TypeError, ValueError: an option that cannot be; the message says what must hold.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_prefix_tokens: int = 1,
        qk_norm: bool = False,
        init_values: float | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        attn_layer: Callable[..., nn.Module] | str = Attention,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        depth: int = 0,  # noqa: ARG002  timm passes it
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        _refuse(
            "TimmBlock",
            {
                f"act_layer={act_layer} (needs GELU)": act_layer not in (nn.GELU, GELU),
                f"mlp_layer={mlp_layer} (needs timm's Mlp)": mlp_layer is not Mlp,
                f"attn_layer={attn_layer} (block_layer(decay=...) chooses the attention)": attn_layer
                not in (Attention, "", "attn"),
                "scale_attn_norm=True (needs False)": scale_attn_norm,
                "scale_mlp_norm=True (needs False)": scale_mlp_norm,
                "proj_bias=False (needs True)": not proj_bias,
                f"proj_drop={proj_drop} (needs 0)": proj_drop != 0,
            },
        )
        super().__init__(
            dim,
            num_heads,
            num_prefix_tokens=num_prefix_tokens,
            qk_norm=qk_norm,
            init_values=init_values or None,
            **options,
        )
        if norm_layer is not None:
            self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        if qk_norm and norm_layer is not None:
            self.attn.q_norm, self.attn.k_norm = norm_layer(self.attn.head_dim), norm_layer(self.attn.head_dim)
        self.to(device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        layout: LayoutLike = None,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """As SDTBlock.forward, as timm calls it.

        Args:
            x: Tokens (B, L, D).
            layout: As in SDTBlock.forward; None: the patch tokens must be a square.
            attn_mask: The same; without layout (L, L).
            is_causal: Must be False.

        Returns:
            (B, L, D).

        Raises:
            ValueError: is_causal; or no layout, and L - P is no square, or attn_mask differs from image to image.
        """
        _check_call(x, layout, attn_mask, self.attn.num_prefix_tokens, is_causal=is_causal)
        return super().forward(x, layout, attn_mask)


ATTN_LAYERS["spatial_decay"] = TimmAttention  # timm's names for attn_layer=


def attention_layer(decay: DecayLike = "full", *, num_prefix_tokens: int = 1, **options: Any) -> type[TimmAttention]:
    """A class for the attn_layer= of timm's vision transformers; with nothing said, its name "spatial_decay" does too.

    Args:
        decay: Kind of decay with its options, see SpatialDecayMask.
        num_prefix_tokens: P, the class token and the registers of the model.
        options: Further keywords of SpatialDecayAttention, except those that timm passes itself.

    Returns:
        A subclass of TimmAttention.

    Raises:
        TypeError: an option that timm passes itself.

    Examples:
        >>> import timm
        >>> attention = attention_layer("full", gate_rank=8)
        >>> options = {"attn_layer": attention, "depth": 2, "num_classes": 10}
        >>> model = timm.create_model("vit_tiny_patch16_224", **options)
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 10])
    """
    return _bound(TimmAttention, {"decay": decay, "num_prefix_tokens": num_prefix_tokens, **options})


def block_layer(decay: DecayLike = "full", *, num_prefix_tokens: int = 1, **options: Any) -> type[TimmBlock]:
    """A class for the block_fn= of timm's vision transformers.

    Args:
        decay: Kind of decay with its options, see SpatialDecayMask.
        num_prefix_tokens: P, the class token and the registers of the model.
        options: Further keywords of SDTBlock, except those that timm passes itself.

    Returns:
        A subclass of TimmBlock.

    Raises:
        TypeError: an option that timm passes itself.

    Examples:
        >>> import timm
        >>> block = block_layer("full", pos_kernel_size=0)
        >>> options = {"block_fn": block, "depth": 2, "num_classes": 10}
        >>> model = timm.create_model("vit_tiny_patch16_224", **options)
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 10])
    """
    return _bound(TimmBlock, {"decay": decay, "num_prefix_tokens": num_prefix_tokens, **options})


_PASSED = {
    *("dim", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "scale_norm", "scale_attn_norm", "scale_mlp_norm"),
    *("proj_bias", "proj_drop", "attn_drop", "init_values", "drop_path", "norm_layer", "act_layer", "mlp_layer"),
    *("attn_layer", "depth", "device", "dtype"),
}
"""What timm's VisionTransformer passes to its blocks and attentions."""


Layer = TypeVar("Layer", bound=nn.Module)


class _Bound(type):
    """A class with options, for libraries that take a class and no function. Models that hold it can be pickled."""

    options: dict[str, Any]


def _bound(base: type[Layer], options: dict[str, Any]) -> type[Layer]:
    """Base with options, which timm cannot pass."""
    if passed := _PASSED & set(options):
        raise TypeError(
            f"timm passes {', '.join(sorted(passed))} itself: give it to timm.create_model, under timm's name "
            "(attn_drop is attn_drop_rate there), and leave it out here."
        )

    def init(self: Layer, *arguments: Any, **keywords: Any) -> None:
        base.__init__(self, *arguments, **options, **keywords)

    bound = _Bound(base.__name__, (base,), {"__init__": init, "__doc__": base.__doc__, "options": options})
    return cast(type[Layer], bound)


def _taken_apart(bound: _Bound) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """For pickle: what a class is made of again."""
    return _bound, (bound.__base__, bound.options)


copyreg.pickle(_Bound, _taken_apart)


def _refuse(name: str, reasons: dict[str, bool]) -> None:
    if wrong := [f"\n  - {reason}" for reason, is_wrong in reasons.items() if is_wrong]:
        raise ValueError(f"{name} cannot do what timm asks for:{''.join(wrong)}\nBuild the model without it.")


def _check_call(
    x: Tensor, layout: LayoutLike, attn_mask: Tensor | None, num_prefix_tokens: int, *, is_causal: bool
) -> None:
    if is_causal:
        raise ValueError("is_causal must be False: got True. Tokens of an image have no order; pass attn_mask.")
    # NaFlexVit's says which tokens are padding, and the others by chance count as a square.
    if layout is None and attn_mask is not None and attn_mask.ndim == 4:
        raise ValueError(
            "without layout attn_mask must be one of all images, (L, L): got shape "
            f"{tuple(attn_mask.shape)}. NaFlexVit's for padding are such, and where its patches lie is not known here: "
            "build it with its own attention, and put the decay in with spatial_decay.swap_attention."
        )
    num_patches = x.shape[1] - num_prefix_tokens
    if x.ndim == 3 and layout is None and int(max(num_patches, 0) ** 0.5) ** 2 != num_patches:
        raise ValueError(
            f"timm passes no layout, so the patch tokens must be a square: got L = {x.shape[1]}, "
            f"num_prefix_tokens = {num_prefix_tokens}, L - num_prefix_tokens = {num_patches}. Set num_prefix_tokens to "
            "the class token and registers of the model; for images that are not square, put the attention into a "
            "finished model with spatial_decay.swap_attention."
        )


def _create(entry: Entry, images: ImageSettings, keywords: dict[str, Any]) -> nn.Module:
    """A model by timm's builder, which loads weights, and wraps it where features_only is asked for."""
    wrapper = keywords.pop("feature_cls", "getter") if keywords.get("features_only") else "getter"
    if wrapper not in ("getter", "list"):  # both give a list of maps
        raise ValueError(
            f"feature_cls must be 'getter' or 'list': got {wrapper!r}. timm's others call or trace the modules of a "
            "model one by one, and blocks here take more than one tensor. By name: "
            "dict(zip(model.feature_info.module_name(), model(x)))."
        )
    if "img_size" in keywords and "img_size" not in inspect.signature(entry.model).parameters:
        raise TypeError(f"{entry.name} has no keyword img_size: it takes images of any size. Leave it out.")
    features = {"out_indices": images.num_maps, "feature_cls": "getter"}
    return build_model_with_cfg(entry.build, entry.name, feature_cfg=features, **keywords)


def _settings(images: ImageSettings) -> dict[str, Any]:
    """In timm's words."""
    settings: dict[str, Any] = {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "classifier": "head",
        "first_conv": images.first_conv,
        "crop_pct": images.crop_pct,
        "mean": images.mean,
        "std": images.std,
    }
    return settings | ({"pool_size": images.pool_size} if images.pool_size else {})


def _register(entry: Entry, images: ImageSettings) -> None:
    def create(pretrained: bool = False, **keywords: Any) -> nn.Module:
        return _create(entry, images, {"pretrained": pretrained, **keywords})

    create.__name__ = create.__qualname__ = entry.name
    summary, *_ = inspect.cleandoc(entry.build.__doc__ or "").splitlines()
    create.__doc__ = f"""{summary}

    Args:
        pretrained: Load the file of pretrained_cfg_overlay; no weights are published under this name.
        keywords: timm's, and the other arguments of {entry.model.__name__}.

    Returns:
        The model; with features_only, its feature maps as timm wraps them.

    Raises:
        TypeError, ValueError: a keyword that the model has not, or whose value cannot be.
    """
    globals()[entry.name] = register_model(create)


_IMAGES = {name: (entry, entry.images) for name, entry in ENTRIES.items() if entry.images is not None}

default_cfgs = generate_default_cfgs({name: _settings(images) for name, (_, images) in _IMAGES.items()})
"""Where register_model looks for a model's settings; no weights of ours are published."""

for _entry, _images in _IMAGES.values():
    _register(_entry, _images)
