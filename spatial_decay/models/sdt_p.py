"""SDT-P, the plain diffusion backbone (SDT Section 4): a DiT (Peebles and Xie 2023) with decay in its attention.

Its interface is DiT's own, so that samplers and training code written for DiT run it, and with decay "none", no LPE, no
output gate and no rotary embedding it is DiT.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from spatial_decay.features import as_tokens
from spatial_decay.layers import AttentionOptions, ConvMlp, SpatialDecayAttention
from spatial_decay.layers.initial import fill_as_xavier
from spatial_decay.layers.kinds import DecayLike, as_kind
from spatial_decay.layers.patch import PatchEmbed, size_in_patches
from spatial_decay.layout import Grid, GridSize, LayoutLike
from spatial_decay.models.common import Model, check_whole, run_block
from spatial_decay.models.config import keeps_config
from spatial_decay.models.registry import register
from spatial_decay.values import are_readable

__all__ = [
    "SDTP",
    "SDTPBlock",
    "SDTPOptions",
    "sdt_p_base",
    "sdt_p_large",
    "sdt_p_small",
    "sdt_p_xlarge",
    "sincos_positions",
]

_FREQUENCIES = 256  # features of a timestep before its MLP


class SDTPOptions(AttentionOptions, total=False):
    """The keywords of SDTP behind its first four arguments."""

    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    decay: DecayLike
    class_dropout_prob: float
    learn_sigma: bool


class SDTPBlock(nn.Module):
    """x + a_1 * attention(m_1(norm(x))), then x + a_2 * mlp(m_2(norm(x))), with m(x) = x * (1 + s) + b.

    The shifts b, scales s and gates a, (B, D) each, come from the condition by one linear layer that starts at zero, so
    that the block starts as the identity (adaLN-Zero).

    Args:
        dim: D.
        num_heads: N.
        mlp_ratio: Width of the MLP over D.
        decay: Kind of decay with its options, see SpatialDecayMask.
        options: Further keywords of SpatialDecayAttention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        decay: DecayLike = "full",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = SpatialDecayAttention(dim, num_heads, decay=decay, **options)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), kernel_size=0, approximate="tanh")
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor, layout: LayoutLike = None) -> Tensor:
        """Tokens (B, L, D) or a map (B, H, W, D), and the condition (B, D) -> the same shape; layout as in SDTBlock."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        tokens, layout = as_tokens(x, layout, dim=self.attn.dim)
        tokens = tokens + gate1 * self.attn(self.norm1(tokens) * (1 + scale1) + shift1, layout)
        tokens = tokens + gate2 * self.mlp(self.norm2(tokens) * (1 + scale2) + shift2, layout)
        return tokens.reshape(x.shape)


class SDTP(Model):
    """Noisy latents, timesteps and labels -> noise and, with learn_sigma, what the variance is interpolated by.

    Args:
        input_size: Of the latents that it is meant for: their side, or (H, W). Any size that is a multiple of
            patch_size runs: positions are computed for each call. Kind `gaussian` starts from this one.
        patch_size: Side of a patch.
        in_channels: Channels of the latents.
        num_classes: 0: unconditional, forward takes no labels.
        dim: D.
        depth: Blocks.
        num_heads: N.
        mlp_ratio: Width of the MLP over D.
        decay: Kind of decay with its options, see SpatialDecayMask.
        class_dropout_prob: In training, the share of labels replaced by the "no class" num_classes, which
            classifier-free guidance needs. 0: there is no such class.
        learn_sigma: Twice as many channels come out.
        options: Keywords of SpatialDecayAttention; lpe_kernel_size is 3 and gate_rank 48 here, which gives the sizes
            of the paper.

    Attributes:
        config: The arguments, JSON values: `SDTP(**model.config)` has the same structure.

    Raises:
        ValueError, TypeError: an option that cannot be; the message says what must hold.

    Examples:
        >>> model = SDTP(input_size=8, num_classes=10, dim=48, depth=2, num_heads=3)
        >>> latents, steps = torch.randn(2, 4, 8, 8), torch.tensor([0, 999])
        >>> labels = torch.tensor([3, 7])
        >>> model(latents, steps, labels).shape
        torch.Size([2, 8, 8, 8])
    """

    @keeps_config(lpe_kernel_size=3, gate_rank=48)
    def __init__(
        self,
        input_size: int | GridSize = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int = 1000,
        *,
        dim: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        decay: DecayLike = "full",
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        check_whole(0, num_classes=num_classes)
        check_whole(1, patch_size=patch_size, in_channels=in_channels, dim=dim, depth=depth, num_heads=num_heads)
        if dim % 4:
            raise ValueError(f"dim must be a multiple of 4, for sines and cosines of h and w: got {dim}.")
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must satisfy 0 <= class_dropout_prob < 1: got {class_dropout_prob}.")
        grid_size = size_in_patches("input_size", input_size, patch_size)
        kind = as_kind(decay).resolved(grid_size=grid_size)
        self.config["decay"] = kind.config
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.class_dropout_prob = class_dropout_prob
        self.dim = dim

        self.patch_embed = PatchEmbed(in_channels, dim, patch_size=patch_size, images="latents")
        self.t_embed = nn.Sequential(nn.Linear(_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embed = nn.Embedding(num_classes + (class_dropout_prob > 0), dim) if num_classes else None
        self.blocks = nn.ModuleList(
            SDTPBlock(dim, num_heads, mlp_ratio=mlp_ratio, decay=kind, **options) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch_size**2 * self.out_channels)
        self._init_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Denoise one step.

        Args:
            x: Latents, (B, in_channels, H, W), floating point.
            t: Timesteps, (B,), 0 for the least noise; need not be whole.
            y: Labels, (B,), whole numbers: 0 .. num_classes - 1, or num_classes for "no class". None without classes.

        Returns:
            (B, out_channels, H, W): noise and, with learn_sigma, the variance's channels behind it.

        Raises:
            TypeError: x is not floating point, or y no whole numbers.
            ValueError: shapes disagree, the patch does not divide H and W, or a label is out of range.
        """
        tokens, grid = self._embed(x)
        condition = self._condition(x, t, y)
        for block in self.blocks:
            tokens = run_block(block, tokens, condition, grid, checkpointing=self._is_checkpointing)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        return self._to_latents(self.head(self.norm(tokens) * (1 + scale) + shift), grid)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, *, guided_channels: int = 3
    ) -> Tensor:
        """Denoise with classifier-free guidance, as DiT's samplers call it: e_0 + cfg_scale * (e_y - e_0).

        Args:
            x: The same latents twice, (2B, in_channels, H, W); the first half is used.
            t: Timesteps, (2B,).
            y: Labels, (2B,): the classes, then num_classes for each.
            cfg_scale: 1 for none.
            guided_channels: So many channels of the noise are guided. DiT guides three of its four, in_channels would
                be all of them; the others are those of the first half and of the second.

        Returns:
            (2B, out_channels, H, W), whose guided channels are the same in both halves.

        Raises:
            TypeError, ValueError: as forward; or an odd batch, or a model without "no class".
        """
        if self.y_embed is None or not self.class_dropout_prob:
            raise ValueError(
                "classifier-free guidance needs a model with classes and 'no class': got "
                f"num_classes={self.num_classes}, class_dropout_prob={self.class_dropout_prob}."
            )
        if len(x) % 2:
            raise ValueError(f"forward_with_cfg takes the same latents twice: got a batch of {len(x)}.")
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        guided_channels = min(guided_channels, self.in_channels)
        guided, others = out[:, :guided_channels], out[:, guided_channels:]
        with_class, without = guided.chunk(2)
        guided = without + cfg_scale * (with_class - without)
        return torch.cat([torch.cat([guided, guided]), others], 1)

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Latents -> patches with positions, (B, L, D), and their grid."""
        maps = self.patch_embed(x)  # (B, H, W, D)
        grid = Grid(maps.shape[1], maps.shape[2])
        positions = sincos_positions(self.dim, grid, device=x.device)
        return maps.flatten(1, 2) + positions.to(maps.dtype), grid

    def _condition(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Timesteps and labels as one vector an image, (B, D)."""
        if t.shape != x.shape[:1]:
            raise ValueError(f"timesteps must be ({len(x)},), one a latent: got shape {tuple(t.shape)}.")
        condition: Tensor = self.t_embed(_timestep_features(t).to(self.patch_embed.proj.weight.dtype))
        if self.y_embed is None:
            if y is not None:
                raise ValueError("a model with num_classes=0 takes no labels: got some. Leave y out.")
            return condition
        return condition + self.y_embed(self._drop_labels(self._checked_labels(x, y)))

    def _checked_labels(self, x: Tensor, y: Tensor | None) -> Tensor:
        assert self.y_embed is not None
        if y is None or y.shape != x.shape[:1]:
            got = "none" if y is None else f"shape {tuple(y.shape)}"
            raise ValueError(f"labels must be ({len(x)},), one a latent: got {got}.")
        if y.is_floating_point() or y.dtype == torch.bool:
            raise TypeError(f"labels must be whole numbers: got {y.dtype}. Convert them with y.long().")
        # On CUDA the embedding itself asserts this; reading it here would wait for the GPU.
        if are_readable(y) and len(y) and not 0 <= y.min() <= y.max() < self.y_embed.num_embeddings:
            last = f"{self.num_classes - 1}, or {self.num_classes} for no class" * (self.class_dropout_prob > 0)
            raise ValueError(
                f"labels must be 0 .. {last or self.num_classes - 1}: got {int(y.min())} .. {int(y.max())}."
            )
        return y.long()

    def _drop_labels(self, y: Tensor) -> Tensor:
        """In training, "no class" in place of some."""
        if not self.training or not self.class_dropout_prob:
            return y
        is_dropped = torch.rand(y.shape, device=y.device) < self.class_dropout_prob
        return torch.where(is_dropped, self.num_classes, y)

    def _to_latents(self, patches: Tensor, grid: Grid) -> Tensor:
        """(B, L, patch * patch * channels) -> (B, channels, H, W)."""
        p = self.patch_size
        maps = patches.unflatten(1, grid.size).unflatten(3, (p, p, self.out_channels))  # (B, h, w, p, p, C)
        return maps.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """As DiT: Xavier, small embeddings, and zeros where a block or the model is to begin as nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fill_as_xavier(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        fill_as_xavier(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]  # a Conv2d built with one
        for module in (*self.t_embed, self.y_embed):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=0.02)
        for module in self.modules():
            if isinstance(module, (SDTPBlock, SDTP)):
                nn.init.zeros_(module.modulation.weight)
                nn.init.zeros_(module.modulation.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def sincos_positions(dim: int, grid: Grid, *, device: torch.device | None = None) -> Tensor:
    """DiT's fixed positions, (H * W, D), float32: sines and cosines of w in the first half of D, of h in the second."""
    frequencies = 10000 ** (-torch.arange(dim // 4, device=device, dtype=torch.float64) / (dim // 4))
    h, w = grid.positions(device=torch.device(device or "cpu"), dtype=torch.float64)
    angles = [position[:, None] * frequencies for position in (w, h)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


def _timestep_features(t: Tensor) -> Tensor:
    """(B,) -> cosines, then sines, (B, 256), float32."""
    half = _FREQUENCIES // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / half))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


@register(SDTP)
def sdt_p_small(
    input_size: int | GridSize = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    num_classes: int = 1000,
    **overrides: Unpack[SDTPOptions],
) -> SDTP:
    """SDT-P-S: 12 blocks of width 384, 6 heads; 33.5 million parameters.

    Args:
        input_size: Of the latents: their side, or (H, W).
        patch_size: Side of a patch.
        in_channels: Channels of the latents.
        num_classes: Number of labels; 0 for none.
        overrides: Other arguments of SDTP.

    Returns:
        An SDTP, with its first weights.
    """
    size = SDTPOptions(dim=384, depth=12, num_heads=6)
    return SDTP(input_size, patch_size, in_channels, num_classes, **(size | overrides))


@register(SDTP)
def sdt_p_base(
    input_size: int | GridSize = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    num_classes: int = 1000,
    **overrides: Unpack[SDTPOptions],
) -> SDTP:
    """SDT-P-B: 12 blocks of width 768, 12 heads; 131.6 million parameters.

    Args:
        input_size: Of the latents: their side, or (H, W).
        patch_size: Side of a patch.
        in_channels: Channels of the latents.
        num_classes: Number of labels; 0 for none.
        overrides: Other arguments of SDTP.

    Returns:
        An SDTP, with its first weights.
    """
    size = SDTPOptions(dim=768, depth=12, num_heads=12)
    return SDTP(input_size, patch_size, in_channels, num_classes, **(size | overrides))


@register(SDTP)
def sdt_p_large(
    input_size: int | GridSize = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    num_classes: int = 1000,
    **overrides: Unpack[SDTPOptions],
) -> SDTP:
    """SDT-P-L: 24 blocks of width 1024, 16 heads; 461.1 million parameters.

    Args:
        input_size: Of the latents: their side, or (H, W).
        patch_size: Side of a patch.
        in_channels: Channels of the latents.
        num_classes: Number of labels; 0 for none.
        overrides: Other arguments of SDTP.

    Returns:
        An SDTP, with its first weights.
    """
    size = SDTPOptions(dim=1024, depth=24, num_heads=16)
    return SDTP(input_size, patch_size, in_channels, num_classes, **(size | overrides))


@register(SDTP)
def sdt_p_xlarge(
    input_size: int | GridSize = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    num_classes: int = 1000,
    **overrides: Unpack[SDTPOptions],
) -> SDTP:
    """SDT-P-XL: 28 blocks of width 1152, 16 heads; 679.1 million parameters.

    Args:
        input_size: Of the latents: their side, or (H, W).
        patch_size: Side of a patch.
        in_channels: Channels of the latents.
        num_classes: Number of labels; 0 for none.
        overrides: Other arguments of SDTP.

    Returns:
        An SDTP, with its first weights.
    """
    size = SDTPOptions(dim=1152, depth=28, num_heads=16)
    return SDTP(input_size, patch_size, in_channels, num_classes, **(size | overrides))
