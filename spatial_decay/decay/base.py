"""A decay is a few numbers a token and one pair formula; masks and score functions are made from it here, once."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.grid import Grid, Position
from spatial_decay.positions import Positions
from spatial_decay.precision import at_least_float32

__all__ = ["PairwiseDecay", "ScoreMod", "Tokens", "dense", "score_mod"]

Tokens: TypeAlias = tuple[Tensor, ...]
"""What a kind knows of each token: one or more tensors, (B, N, L) whole, or broadcast against the other side."""

ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""score, batch, head, query index, key index -> score, as torch.nn.attention.flex_attention takes it."""


class PairwiseDecay(ABC):
    """What is added to the score of a query and a key, as a function of these two tokens alone.

    A kind is a frozen dataclass with a grid, or the Positions of tokens that fill none, that implements `tokens` and
    `pairwise`; `dense` and `score_mod` do the rest. Prefix tokens have no position: nothing is added to any score that
    they take part in, whatever `pairwise` says of them.
    """

    grid: Grid | Positions

    @property
    @abstractmethod
    def tokens(self) -> Tokens:
        """The tensors (B, N, L) that `pairwise` needs of each token; B may be 1 where images share them."""

    @abstractmethod
    def pairwise(self, q_token: Tokens, k_token: Tokens, q_position: Position, k_position: Position) -> Tensor:
        """What is added to the scores, in nats, for tensors of queries and of keys that broadcast together."""

    def profiles(self, tokens: Tokens, position: Position) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002  kinds override it
        """Where M[i, j] is a product of what row and what column of the grid j is in: the two factors of each query.

        Args:
            tokens: (B, N, H*W) each, without prefix tokens.
            position: Of these tokens, (H*W,) each.

        Returns:
            (B, N, H*W, H) and (B, N, H*W, W); None for a kind that is no such product. H + W exponentials a query
            are far fewer than H * W.
        """
        return None


def dense(bias: PairwiseDecay, *, dtype: torch.dtype | None = None, row_multiple: int = 1) -> Tensor:
    """The decay as a mask.

    Args:
        bias: Any pairwise decay.
        dtype: Of the mask. The pair formula itself is computed in float32 at least: half precision holds neither
            positions above 256 (bf16) nor long sums. None: that of the formula.
        row_multiple: Each row starts at a multiple of so many elements in memory. CUDA's memory-efficient
            attention copies the mask where that is not a multiple of 8.

    Returns:
        (B, N, L, L), zero wherever a prefix token takes part. B is 1 where all images share the decay.
    """
    num_prefix, num_tokens = bias.grid.num_prefix_tokens, bias.grid.num_tokens
    tokens = tuple(at_least_float32(token)[..., num_prefix:] for token in bias.tokens)
    position = bias.grid.positions(device=tokens[0].device, dtype=tokens[0].dtype)
    padding = -num_tokens % row_multiple
    profiles = bias.profiles(tokens, position)
    if profiles is not None:
        mask = (profiles[0][..., :, None] * profiles[1][..., None, :]).flatten(-2)
        mask = F.pad(mask, (0, padding)) if padding else mask
    else:
        mask = bias.pairwise(
            tuple(token[..., :, None] for token in tokens),
            tuple(F.pad(token, (0, padding))[..., None, :] for token in tokens),
            (position[0][..., :, None], position[1][..., :, None]),
            (F.pad(position[0], (0, padding))[..., None, :], F.pad(position[1], (0, padding))[..., None, :]),
        )  # (B, N, H*W, H*W + padding)
    if isinstance(bias.grid, Positions) and (pairs := bias.grid.pairs()) is not None:
        mask = mask.masked_fill(~F.pad(pairs, (0, padding)), 0.0)
    mask = mask if dtype is None else mask.to(dtype)
    mask = F.pad(mask, (num_prefix, 0, num_prefix, 0)) if num_prefix else mask  # (B, N, L, L + padding)
    return mask[..., :num_tokens] if padding else mask


def score_mod(bias: PairwiseDecay) -> ScoreMod:
    """The decay as a score function, for FlexAttention or anything else that asks for one score at a time.

    The indices may be scalars, as FlexAttention gives them, or tensors that broadcast together.
    """
    num_prefix = bias.grid.num_prefix_tokens
    # Inductor cannot build its kernel for the CPU over strided views (torch 2.15).
    q_tokens = tuple(at_least_float32(token).contiguous() for token in bias.tokens)
    # FlexAttention refuses to index one tensor twice where a gradient is asked for (and adds up captured
    # tensors' gradients by themselves), so that the key side has its own.
    k_tokens = tuple(token.clone() for token in q_tokens)
    positions = bias.grid.positions(device=q_tokens[0].device, dtype=q_tokens[0].dtype)
    h, w = (F.pad(position, (num_prefix, 0)).reshape(-1, bias.grid.num_tokens) for position in positions)  # (B|1, L)
    known = bias.grid.has_position if isinstance(bias.grid, Positions) else None

    def add_decay(score: Tensor, batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        first = torch.zeros_like(batch)
        image = first if q_tokens[0].shape[0] == 1 else batch
        place = first if h.shape[0] == 1 else batch
        added = bias.pairwise(
            tuple(token[image, head, q_index] for token in q_tokens),
            tuple(token[image, head, k_index] for token in k_tokens),
            (h[place, q_index], w[place, q_index]),
            (h[place, k_index], w[place, k_index]),
        )
        if num_prefix:
            has_position = (q_index >= num_prefix) & (k_index >= num_prefix)
            added = torch.where(has_position, added, torch.zeros_like(added))
        elif known is not None:
            row = first if known.shape[0] == 1 else batch
            added = torch.where(known[row, q_index] & known[row, k_index], added, torch.zeros_like(added))
        return score + added.to(score.dtype)

    return add_decay
