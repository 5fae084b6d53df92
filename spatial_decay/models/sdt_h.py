"""SDT-H, the hierarchical backbone (SDT Fig. 2 and Table 1): RMT's structure with content-aware decay."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, TypeAlias, get_args, overload

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from spatial_decay.layers import AttentionOptions, ConvStem, Downsample, SDTBlock
from spatial_decay.layers.kind import OnReferenceGrid
from spatial_decay.layers.kinds import DecayLike, Kind, as_kind
from spatial_decay.layers.patch import check_images
from spatial_decay.layers.reference import shrunk
from spatial_decay.layout import Grid
from spatial_decay.models.backbone import Backbone, FeatureInfo, Groups, block_numbers
from spatial_decay.models.common import check_whole, init_linear, run_block
from spatial_decay.models.config import keeps_config
from spatial_decay.models.per_stage import PerStage, is_list, num_stages, per_stage
from spatial_decay.models.registry import IMAGENET, ImageSettings, register

__all__ = ["SDTH", "SIZES", "SDTHOptions", "sdt_h_base", "sdt_h_small", "sdt_h_tiny"]

MapPool: TypeAlias = Literal["avg", ""]


class SDTHOptions(AttentionOptions, total=False):
    """The keywords of SDTH."""

    embed_dims: PerStage[int]
    depths: PerStage[int]
    num_heads: PerStage[int]
    mlp_ratios: PerStage[float]
    decay: PerStage[DecayLike]
    init_values: PerStage[float | None]
    global_pool: MapPool
    drop_rate: float
    drop_path_rate: float
    projection_dim: int
    stem_stride: int
    output_stride: int | None


class SDTH(Backbone):
    """The hierarchical Spatial Decay Transformer.

    A convolutional stem, stages of SDTBlocks with a 3x3 stride-2 convolution between them, and a head: a 1x1 projection
    with batch norm and swish, the mean over the map, a classifier. Any image size from the total stride up: at each
    stride-2 convolution a size n becomes ceil(n / 2).

    What each stage has of its own is one value for all stages or a list with one a stage; the lists say how many
    stages there are.

    Args:
        num_classes: Outputs of the classifier; 0 leaves it out, and forward gives the pooled features.
        in_chans: Channels of the image.
        embed_dims: D, of each stage.
        depths: Blocks, of each stage.
        num_heads: N, of each stage.
        mlp_ratios: Width of the MLP over D, of each stage.
        decay: Kind of decay with its options, of each stage, see SpatialDecayMask. In one value for all stages
            reference_grid is that of the first stage's map, and smaller in the others as their maps are; in a list each
            is that of its own stage's map.
        init_values: First value of LayerScale, of each stage; None leaves it out.
        global_pool: "avg", the mean over the map, or "", none: the head gives a map, and num_classes must be 0.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        projection_dim: Width of the head's projection; 0 leaves it out, and the head pools the last stage's map.
        stem_stride: 4, or 2 or 1 for small images.
        output_stride: Pixels of the image a step of the last map at most, for segmentation: stages that would go beyond
            it keep the size of the stage before. Their weights are the same, but distances count in steps, which are
            smaller then: weights trained without it need training. None: each stage halves the size.
        options: Keywords of SpatialDecayAttention, for all blocks; its rope_reference_grid is the first map's.

    Attributes:
        config: The arguments, JSON values, with a list for each stage's own: `SDTH(**model.config)` has the same
            structure.
        feature_info: For each stage the name of its module, its channels (num_chs) and its stride (reduction).

    Raises:
        ValueError, TypeError: an option that cannot be; the message says what must hold.
    """

    pools: ClassVar[tuple[str, ...]] = get_args(MapPool)

    @keeps_config()
    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        embed_dims: PerStage[int] = (64, 128, 256, 512),
        depths: PerStage[int] = (2, 2, 8, 2),
        num_heads: PerStage[int] = (4, 4, 8, 16),
        mlp_ratios: PerStage[float] = 3,
        decay: PerStage[DecayLike] = ("decomposed", "decomposed", "full", "full"),
        init_values: PerStage[float | None] = None,
        global_pool: MapPool = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        projection_dim: int = 1024,
        stem_stride: int = 4,
        output_stride: int | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(in_chans, drop_rate=drop_rate)
        count = num_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            decay=decay,
            init_values=init_values,
        )
        check_whole(0, num_classes=num_classes, projection_dim=projection_dim)
        check_whole(1, embed_dims=embed_dims, depths=depths, num_heads=num_heads, stem_stride=stem_stride)
        embed_dims, depths, num_heads = (per_stage(value, count) for value in (embed_dims, depths, num_heads))
        mlp_ratios, init_values = per_stage(mlp_ratios, count), per_stage(init_values, count)
        self.embed_dims = tuple(embed_dims)
        self.num_features, self.head_hidden_size = embed_dims[-1], projection_dim or embed_dims[-1]
        strides = [stem_stride * 2**i for i in range(count)]
        if output_stride is not None:
            if output_stride not in [stem_stride * 2**i for i in range(32)]:
                raise ValueError(
                    f"output_stride must be the stride of a stage, one of {', '.join(map(str, strides))}, or None: got "
                    f"{output_stride!r}."
                )
            strides = [min(stride, output_stride) for stride in strides]
        shrinks = [stride // stem_stride for stride in strides]
        decays: list[DecayLike] = per_stage(decay, count)
        kinds = [as_kind(kind) for kind in decays]
        if not is_list(decay):
            kinds = [_of_stage(kind, shrink) for kind, shrink in zip(kinds, shrinks, strict=True)]
        kinds = [kind.resolved() for kind in kinds]
        lists = (embed_dims, depths, num_heads, mlp_ratios, [kind.config for kind in kinds], init_values)
        self.config |= dict(zip(_PER_STAGE, lists, strict=True))
        self.feature_info = [
            FeatureInfo(module=f"stages.{i}", num_chs=dim, reduction=stride)
            for i, (dim, stride) in enumerate(zip(embed_dims, strides, strict=True))
        ]

        self.stem = ConvStem(in_chans, embed_dims[0], stride=stem_stride)
        rope_grids = [shrunk(options.get("rope_reference_grid"), shrink) for shrink in shrinks]
        drop_paths = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        ends = list(itertools.accumulate(depths))
        self.stages = nn.ModuleList(
            _Stage(
                embed_dims[i - 1] if i else None,
                embed_dims[i],
                num_heads[i],
                stride=strides[i] // strides[i - 1] if i else 1,
                mlp_ratio=mlp_ratios[i],
                decay=kinds[i],
                drop_paths=drop_paths[ends[i] - depths[i] : ends[i]],
                init_values=init_values[i],
                **(options | AttentionOptions(rope_reference_grid=rope_grids[i])),
            )
            for i in range(len(depths))
        )
        self.head_proj = nn.Linear(self.num_features, projection_dim) if projection_dim else None
        self.head_norm = nn.BatchNorm2d(projection_dim) if projection_dim else None
        self._set_classifier(num_classes, global_pool)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W), floating point -> logits (B, num_classes).

        Raises:
            TypeError: x is not floating point.
            ValueError: wrong rank or channels; H or W smaller than the total stride (32).
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> the last stage's map (B, num_features, ceil(H / 32), ceil(W / 32))."""
        return self.forward_intermediates(x, indices=[-1])[0]

    def forward_head(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """The last stage's map (B, num_features, H, W) -> logits; pre_logits: pooled features (B, projection_dim).

        Args:
            x: The last stage's map, (B, num_features, H, W).
            pre_logits: Stop before the classifier.

        Returns:
            (B, num_classes) or (B, projection_dim); without pooling, maps.
        """
        if self.head_proj is not None and self.head_norm is not None:
            x = self.head_proj(x.permute(0, 2, 3, 1))  # (B, H, W, projection_dim)
            x = F.silu(self.head_norm(x.permute(0, 3, 1, 2)))
        x = x.mean((2, 3)) if self.global_pool else x  # (B, projection_dim), or a map
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: Literal[True],
    ) -> list[Tensor]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]: ...

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages, for detection and segmentation.

        Args:
            x: Images (B, in_chans, H, W), floating point.
            indices: Which stages, 0 to 3 (or -1, -2, ...); a number: the last so many; None: all.
            norm: Must be False: there is no norm behind a stage.
            stop_early: Do not compute stages behind the last one of indices.
            output_fmt: "NCHW", or "NHWC".
            intermediates_only: Return the maps alone, and not the last one computed.

        Returns:
            (last, maps): the last map that was computed, and the maps of indices in the order of the stages, all
            (B, D, H', W'); intermediates_only: the maps alone. Stage 0 has stride 4, each further one twice the stride
            before it, up to output_stride.

        Raises:
            TypeError, ValueError: as in forward; ValueError for a stage that is not there, a norm or another format.
        """
        if norm:
            raise ValueError("norm must be False: got True, and no norm stands behind a stage. Add one to your head.")
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC': got {output_fmt!r}.")
        wanted = block_numbers(indices, len(self.stages), "stages")
        self._check_images(x)
        x = self.stem(x)  # (B, H, W, D)
        maps: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > max(wanted):
                break
            x = stage(x, checkpointing=self._is_checkpointing)
            if i in wanted:
                maps.append(x)
        maps = maps if output_fmt == "NHWC" else [features.permute(0, 3, 1, 2) for features in maps]
        return maps if intermediates_only else (x.permute(0, 3, 1, 2), maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,  # noqa: ARG002  timm passes it
        prune_head: bool = True,
    ) -> list[int]:
        """Take off, for good, what the maps of forward_intermediates(indices=indices) do not need.

        Args:
            indices: As in forward_intermediates.
            prune_norm: Changes nothing, there is no norm behind the stages.
            prune_head: Take off the head too; forward then gives the last map that is left. It must go with the last
                stage, whose map it reads.

        Returns:
            The numbers of the stages that indices names.

        Raises:
            ValueError: a stage that is not there; a head without the last stage.
        """
        wanted = block_numbers(indices, len(self.stages), "stages")
        count = max(wanted) + 1
        if not prune_head and count < len(self.stages):
            raise ValueError(
                f"the head reads the last stage, {len(self.stages) - 1}: got indices={indices} and prune_head=False. "
                "Pass prune_head=True, or name the last stage."
            )
        self.stages = self.stages[:count]
        self.embed_dims, self.feature_info = self.embed_dims[:count], self.feature_info[:count]
        self._note_in_config(**{name: self.config[name][:count] for name in _PER_STAGE if name in self.config})
        self.num_features = self.embed_dims[-1]
        if prune_head:
            self.head_proj = self.head_norm = None
            self.head_hidden_size = self.num_features
            self._note_in_config(projection_dim=0)
            self.reset_classifier(0, "")
        return wanted

    def group_matcher(self, coarse: bool = False) -> Groups:
        """Patterns of parameter names by depth, as timm's layer-wise learning rates read them.

        Args:
            coarse: One group a stage instead of one a block.

        Returns:
            Patterns by "stem" and "blocks".
        """
        blocks = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.downsample", (0,)),  # with the stage's first block
            (r"^head_(?:proj|norm)", (99999,)),  # with the group before
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @property
    def total_stride(self) -> int:
        """Pixels of the image a step of the last map."""
        return self.feature_info[-1]["reduction"]

    def _check_images(self, x: Tensor) -> None:
        check_images(x, self.in_chans, self.stem.proj[0].weight)
        if x.shape[2] < self.total_stride or x.shape[3] < self.total_stride:
            raise ValueError(
                f"images must be at least {self.total_stride} x {self.total_stride}, the total stride: got "
                f"{x.shape[2]} x {x.shape[3]}. Resize them, or build the model with a smaller stem_stride."
            )


def _of_stage(kind: Kind, shrink: int) -> Kind:
    """The kind with the reference grid of a stage whose map is so many times as small, where one was said."""
    if not isinstance(kind, OnReferenceGrid):
        return kind
    return replace(kind, reference_grid=shrunk(kind.reference_grid, shrink))


class _Stage(nn.Module):
    """Downsampling, except before the first stage, and blocks; keeps maps (B, H, W, D)."""

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        num_heads: int,
        *,
        stride: int,
        mlp_ratio: float,
        decay: Kind,
        drop_paths: Sequence[float],
        init_values: float | None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        self.downsample = nn.Identity() if in_dim is None else Downsample(in_dim, dim, stride=stride)
        self.blocks = nn.ModuleList(
            SDTBlock(
                dim, num_heads, mlp_ratio=mlp_ratio, decay=decay, drop_path=rate, init_values=init_values, **options
            )
            for rate in drop_paths
        )

    def forward(self, x: Tensor, *, checkpointing: bool) -> Tensor:
        x = self.downsample(x)
        grid = Grid(x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)  # (B, L, D)
        for block in self.blocks:
            tokens = run_block(block, tokens, grid, checkpointing=checkpointing)
        return tokens.reshape(x.shape)


_PER_STAGE = ("embed_dims", "depths", "num_heads", "mlp_ratios", "decay", "init_values")

SIZES: dict[str, SDTHOptions] = {
    "tiny": {
        "embed_dims": (64, 128, 256, 512),
        "depths": (2, 2, 8, 2),
        "num_heads": (4, 4, 8, 16),
        "mlp_ratios": 3,
        "drop_path_rate": 0.1,
    },
    "small": {
        "embed_dims": (64, 128, 256, 512),
        "depths": (3, 4, 18, 4),
        "num_heads": (4, 4, 8, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "drop_path_rate": 0.15,
    },
    "base": {
        "embed_dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "num_heads": (5, 5, 10, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "init_values": (None, None, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
    "large": {
        "embed_dims": (112, 224, 448, 640),
        "depths": (4, 8, 25, 8),
        "num_heads": (7, 7, 14, 20),
        "mlp_ratios": (4, 4, 3, 3),
        "init_values": (None, None, 1e-6, 1e-6),
        "drop_path_rate": 0.5,
    },
}
"""Those that RMT and SDT-H have in common; `large` is RMT's alone."""

# How RMT's authors prepare images (256 / 224 of the size, then the centre); SDT-H has no weights that say otherwise.
IMAGES = ImageSettings(first_conv="stem.proj.0", crop_pct=0.875, mean=IMAGENET[0], std=IMAGENET[1], pool_size=(7, 7))
_SDT_H: SDTHOptions = {"gate_rank": 4}


@register(SDTH, IMAGES)
def sdt_h_tiny(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """SDT-H-T of Table 1: 14 million parameters, 2.7 GFLOPs at 224 x 224.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of SDTH.

    Returns:
        An SDTH, with its first weights.
    """
    return SDTH(num_classes, in_chans, **(SIZES["tiny"] | _SDT_H | overrides))


@register(SDTH, IMAGES)
def sdt_h_small(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """SDT-H-S of Table 1: 27 million parameters, 4.8 GFLOPs at 224 x 224.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of SDTH.

    Returns:
        An SDTH, with its first weights.
    """
    return SDTH(num_classes, in_chans, **(SIZES["small"] | _SDT_H | overrides))


@register(SDTH, IMAGES)
def sdt_h_base(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[SDTHOptions]) -> SDTH:
    """SDT-H-B of Table 1: 54 million parameters, 10.8 GFLOPs at 224 x 224.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of SDTH.

    Returns:
        An SDTH, with its first weights.
    """
    return SDTH(num_classes, in_chans, **(SIZES["base"] | _SDT_H | overrides))
