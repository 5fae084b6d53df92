"""A plain ViT with any kind of decay, and LocAtViT (Hajimiri et al. 2026), which is one with Gaussians and PRR."""

from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from spatial_decay.features import tokens_to_map
from spatial_decay.layers import AttentionOptions, PatchRepresentationRefinement, SDTBlock
from spatial_decay.layers.initial import Initialised
from spatial_decay.layers.kinds import DecayLike, as_kind
from spatial_decay.layers.patch import PatchEmbed, size_in_patches
from spatial_decay.layout import Grid, GridSize
from spatial_decay.models.backbone import Backbone, FeatureInfo, Groups, block_numbers
from spatial_decay.models.common import check_whole, init_linear, run_block
from spatial_decay.models.config import keeps_config
from spatial_decay.models.registry import ImageSettings, register
from spatial_decay.values import is_jit_tracing

__all__ = ["ViT", "ViTOptions", "locatvit_base", "locatvit_small", "locatvit_tiny"]

_Features: TypeAlias = list[Tensor] | list[tuple[Tensor, Tensor]]
TokenPool: TypeAlias = Literal["token", "avg", "prr", ""]

_CAN_ASK_FREELY = torch.__version__ >= "2.9"  # torch 2.6 cannot trace the question


class ViTOptions(AttentionOptions, total=False):
    """The keywords of ViT."""

    img_size: int | GridSize
    patch_size: int
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    decay: DecayLike
    class_token: bool
    num_registers: int
    global_pool: TokenPool
    init_values: float | None
    drop_rate: float
    drop_path_rate: float


class ViT(Backbone, Initialised):
    """A Vision Transformer as timm and DeiT have it, with a decay in its attention.

    Patches, a class token, registers, learned positions, SDTBlocks without convolutions, a norm and a classifier.
    Images of any size that is a multiple of the patch size: positions are interpolated, bicubic with antialiasing.

    Args:
        num_classes: Outputs of the classifier; 0 leaves it out, and forward gives the pooled features.
        in_chans: Channels of the image.
        img_size: Of the images that the positions are learned on: their side, or (H, W). Kind `gaussian` starts from
            it too.
        patch_size: Side of a patch.
        dim: D.
        depth: Blocks.
        num_heads: N.
        mlp_ratio: Width of the MLP over D.
        decay: Kind of decay with its options, see SpatialDecayMask. The decomposed kinds need class_token=False and no
            registers.
        class_token: Have one, first in the sequence.
        num_registers: Register tokens, behind it.
        global_pool: What the classifier reads: "token", the class token; "avg", the mean of the patches; "prr", after
            Patch Representation Refinement the class token, without one the mean; "", all tokens, and num_classes must
            be 0.
        init_values: First value of LayerScale; None leaves it out.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        options: Keywords of SpatialDecayAttention. Here rotary embedding, LPE and output gate are off unless asked for.

    Attributes:
        config: The arguments, JSON values: `ViT(**model.config)` has the same structure.
        feature_info: For each block the name of its module, its channels (num_chs) and the patch size (reduction).

    Raises:
        ValueError, TypeError: an option that cannot be; the message says what must hold.

    Examples:
        >>> model = ViT(10, img_size=64, dim=48, depth=2, num_heads=3, decay="full")
        >>> model(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 10])
    """

    pools: ClassVar[tuple[str, ...]] = get_args(TokenPool)

    @keeps_config(rope="none", lpe_kernel_size=0, gate_rank=0)
    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        img_size: int | GridSize = 224,
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        decay: DecayLike = "none",
        class_token: bool = True,
        num_registers: int = 0,
        global_pool: TokenPool = "token",
        init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(in_chans, drop_rate=drop_rate)
        check_whole(0, num_classes=num_classes, num_registers=num_registers)
        check_whole(1, patch_size=patch_size, dim=dim, depth=depth, num_heads=num_heads)
        self.grid_size = size_in_patches("img_size", img_size, patch_size)
        kind = as_kind(decay).resolved(grid_size=self.grid_size)
        self.config["decay"] = kind.config
        self.patch_size = patch_size
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.feature_info = [FeatureInfo(module=f"blocks.{i}", num_chs=dim, reduction=patch_size) for i in range(depth)]
        self.num_prefix_tokens = int(class_token) + num_registers

        self.patch_embed = PatchEmbed(in_chans, dim, patch_size=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, num_registers, dim)) if num_registers else None
        num_tokens = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim))
        self.blocks = nn.ModuleList(
            SDTBlock(
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                decay=kind,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                init_values=init_values,
                pos_kernel_size=0,
                mlp_kernel_size=0,
                num_prefix_tokens=self.num_prefix_tokens,
                **options,
            )
            for i in range(depth)
        )
        self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-6)
        self.prr = PatchRepresentationRefinement(num_heads)  # no parameters
        self._set_classifier(num_classes, global_pool)
        self.apply(init_linear)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W), floating point -> logits (B, num_classes).

        Raises:
            TypeError: x is not floating point.
            ValueError: wrong rank or channels; H or W no multiple of the patch size.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens (B, P + L, D) behind the last norm; class token and registers first."""
        tokens, grid = self._embed(x)
        for block in self.blocks:
            tokens = run_block(block, tokens, grid, checkpointing=self._is_checkpointing)
        return self.norm(tokens)

    def forward_head(self, tokens: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Tokens of forward_features -> logits; pre_logits: pooled features (B, D).

        Args:
            tokens: (B, P + L, D), of forward_features.
            pre_logits: Stop before the classifier.

        Returns:
            (B, num_classes) or (B, D); without pooling, of all tokens.
        """
        x = self.prr(tokens) if self.global_pool == "prr" else tokens
        if self.global_pool == "token" or (self.global_pool == "prr" and self.cls_token is not None):
            x = x[:, 0]
        elif self.global_pool:
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(x)  # (B, D), or all tokens
        return x if pre_logits else self.head(x)

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: Literal[False] = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: Literal[False] = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: Literal[True],
    ) -> list[Tensor]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: Literal[True],
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: Literal[True],
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: Literal[True],
    ) -> list[tuple[Tensor, Tensor]]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> _Features | tuple[Tensor, _Features]: ...

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> _Features | tuple[Tensor, _Features]:
        """Patch features behind blocks, for detection and segmentation.

        Args:
            x: Images (B, in_chans, H, W), floating point.
            indices: Which blocks, 0 to depth - 1 (or -1, -2, ...); a number: the last so many; None: all.
            return_prefix_tokens: Return each as (features, prefix tokens (B, P, D)).
            norm: Put them through the last norm.
            stop_early: Do not compute blocks behind the last one of indices.
            output_fmt: "NCHW", maps (B, D, H / patch, W / patch), or "NLC", patch tokens (B, L, D).
            intermediates_only: Return the features alone, and not the last tokens computed.

        Returns:
            (last, features): the last tokens that were computed (B, P + L, D) behind the last norm, prefix first, and
            the features of indices in the order of the blocks; intermediates_only: the features alone.

        Raises:
            TypeError, ValueError: as in forward; ValueError for a block that is not there, another format, or prefix
                tokens where there are none.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC': got {output_fmt!r}.")
        if return_prefix_tokens and not self.num_prefix_tokens:
            raise ValueError("return_prefix_tokens needs prefix tokens: this model has none. Pass False.")
        wanted = block_numbers(indices, len(self.blocks), "blocks")
        tokens, grid = self._embed(x)
        taken: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if stop_early and i > max(wanted):
                break
            tokens = run_block(block, tokens, grid, checkpointing=self._is_checkpointing)
            if i in wanted:
                taken.append(self.norm(tokens) if norm else tokens)
        prefixes, patches = zip(*(t.split((grid.num_prefix_tokens, grid.num_patches), 1) for t in taken), strict=True)
        if output_fmt == "NCHW":
            patches = tuple(tokens_to_map(t, grid) for t in taken)
        features: _Features = list(zip(patches, prefixes, strict=True)) if return_prefix_tokens else list(patches)
        return features if intermediates_only else (self.norm(tokens), features)

    def forward_maps(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> patch features (B, D, H / patch, W / patch), refined if pooling is "prr"."""
        tokens = self.forward_features(x)
        tokens = self.prr(tokens) if self.global_pool == "prr" else tokens
        height = x.shape[2] // self.patch_size
        return tokens[:, self.num_prefix_tokens :].unflatten(1, (height, -1)).permute(0, 3, 1, 2)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take off, for good, what the features of forward_intermediates(indices=indices) do not need.

        Args:
            indices: As in forward_intermediates.
            prune_norm: Take off the last norm too; nothing in config says so.
            prune_head: Take off the classifier and the pooling too; forward then gives all tokens.

        Returns:
            The numbers of the blocks that indices names.

        Raises:
            ValueError: a block that is not there.
        """
        wanted = block_numbers(indices, len(self.blocks), "blocks")
        count = max(wanted) + 1
        self.blocks, self.feature_info = self.blocks[:count], self.feature_info[:count]
        self._note_in_config(depth=count)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def group_matcher(self, coarse: bool = False) -> Groups:  # noqa: ARG002  timm passes it
        """Patterns of parameter names by depth, as timm's layer-wise learning rates read them.

        Args:
            coarse: Changes nothing: a plain model has one level, its blocks.

        Returns:
            Patterns by "stem" and "blocks".
        """
        stem = r"^(?:cls_token|reg_token|pos_embed|patch_embed)"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}  # with the last block

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should not decay: biases, norms, tokens and positions.

        Returns:
            Names as in named_parameters.
        """
        tokens = {"cls_token", "reg_token", "pos_embed"}
        return super().no_weight_decay() | {name for name, _ in self.named_parameters() if name in tokens}

    def _check_pool(self, num_classes: int, global_pool: str) -> None:
        super()._check_pool(num_classes, global_pool)
        if global_pool == "token" and self.cls_token is None:
            raise ValueError("global_pool='token' needs class_token=True: got False. Use global_pool='avg' or 'prr'.")

    def fill(self) -> None:
        """Tokens and positions, the parameters that lie in no other module."""
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                token.normal_(std=1e-6)
        self.pos_embed.normal_(std=0.02)

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Patches with positions behind class token and registers, (B, P + L, D), and their grid."""
        maps = self.patch_embed(x)  # (B, H, W, D)
        grid = Grid(maps.shape[1], maps.shape[2], self.num_prefix_tokens)
        first = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = [token.expand(x.shape[0], -1, -1).to(maps.dtype) for token in first]
        return torch.cat([*prefix, maps.flatten(1, 2)], 1) + self._positions(grid), grid

    def _positions(self, grid: Grid) -> Tensor:
        """Of a grid, (1, P + L, D)."""
        if _is_known_equal(grid.size, self.grid_size):
            return self.pos_embed
        prefix, patches = self.pos_embed.split((self.num_prefix_tokens, self.grid_size[0] * self.grid_size[1]), 1)
        maps = patches.transpose(1, 2).unflatten(2, self.grid_size)
        resized = F.interpolate(maps.float(), grid.size, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([prefix, resized.to(patches.dtype).flatten(2).transpose(1, 2)], 1)


def _is_known_equal(a: GridSize, b: GridSize) -> bool:
    """False too where sizes that vary are traced: to ask would tie the program to the answer."""
    if is_jit_tracing():
        return False
    if not torch.compiler.is_compiling() or not _CAN_ASK_FREELY:
        return tuple(a) == tuple(b)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # it pulls in sympy, 0.3 s

    return all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


_LOCATVIT: ViTOptions = {"decay": "gaussian", "global_pool": "prr"}
# Its authors prepare images as timm does for plain ViTs; features_only gives the last three blocks, as there.
_IMAGES = ImageSettings(
    first_conv="patch_embed.proj", crop_pct=0.9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), num_maps=3
)


@register(ViT, _IMAGES)
def locatvit_tiny(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[ViTOptions]) -> ViT:
    """LocAtViT-Ti: 12 blocks of width 192, 3 heads; 5.72 million parameters.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of ViT.

    Returns:
        A ViT, with its first weights.
    """
    return ViT(num_classes, in_chans, **(_LOCATVIT | ViTOptions(dim=192, num_heads=3) | overrides))


@register(ViT, _IMAGES)
def locatvit_small(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[ViTOptions]) -> ViT:
    """LocAtViT-S: 12 blocks of width 384, 6 heads; 22.05 million parameters.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of ViT.

    Returns:
        A ViT, with its first weights.
    """
    return ViT(num_classes, in_chans, **(_LOCATVIT | ViTOptions(dim=384, num_heads=6) | overrides))


@register(ViT, _IMAGES)
def locatvit_base(num_classes: int = 1000, in_chans: int = 3, **overrides: Unpack[ViTOptions]) -> ViT:
    """LocAtViT-B: 12 blocks of width 768, 12 heads; 86.57 million parameters.

    Args:
        num_classes: Of the classifier; 0 for none.
        in_chans: Channels of the images.
        overrides: Other arguments of ViT.

    Returns:
        A ViT, with its first weights.
    """
    return ViT(num_classes, in_chans, **(_LOCATVIT | ViTOptions(dim=768, num_heads=12) | overrides))
