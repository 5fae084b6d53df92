"""What each attention with decay saw in one call of a model, and the maps that follow from it (SDT Eq. 5-13)."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spatial_decay.decay import AxialDecay, Decay, PairwiseDecay, score_mod
from spatial_decay.features import tokens_to_map
from spatial_decay.layers import AttentionCore, ContextAwareGate
from spatial_decay.layers.kinds import Kind, NoDecay
from spatial_decay.layout import Grid, Layout
from spatial_decay.ops import attention_weights
from spatial_decay.ops.attn_mask import added_by, checked_mask
from spatial_decay.precision import at_least_float32, autocast_disabled
from spatial_decay.swap.decayed import added_decays
from spatial_decay.values import in_words

__all__ = ["LayerRecord", "record"]


@dataclass(frozen=True, repr=False)
class LayerRecord:
    """What one attention was given in one call, and the maps that follow from it, computed when they are asked for.

    Maps are (B, N, H, W) over the patch tokens, without prefix tokens. They are those of the call, also when the model
    trains on.

    Args:
        name: Of the layer in its model; of a swapped one, that of the module that got the decay.
        kind: The kind of decay, with its options.
        layout: The grid of the L tokens.
        q: Queries as the softmax gets them, (B, N, L, d).
        k: Keys, the same.
        added: What is added to the scores; None for kind `none`.
        attn_mask: As in the call.
        scale: As in decay_attention.
        gate_outputs: G of each gate of the kind, by name, (B, L, N).
    """

    name: str
    kind: Kind
    layout: Grid
    q: Tensor
    k: Tensor
    added: Decay | None
    attn_mask: Tensor | None
    scale: float | None
    gate_outputs: Mapping[str, Tensor]

    def __repr__(self) -> str:
        height, width = self.layout.size
        return f"LayerRecord({self.name!r}, {self.kind.name!r}, {height} x {width} patches, q: {in_words(self.q)})"

    def gates(self) -> dict[str, Tensor]:
        """G of each gate of the kind, by name: (B, N, H, W), <= 0, nats per grid step. Empty for kinds without one.

        Returns:
            By name, for instance "gate".
        """
        return {name: tokens_to_map(gate, self.layout) for name, gate in self.gate_outputs.items()}

    def decay(self, query: tuple[int, int]) -> Tensor:
        """exp(M), the factor by which the decay multiplies the weight of each key: (B, N, H, W), float32 at least.

        In [0, 1]; of kind `gaussian`, which adds to the scores, >= 1.

        For decomposed kinds, of query (h, w) and key (g, u): `exp(M_H[w][h, g] + M_W[g][w, u])`, down the column of the
        query, then along the row of the key. Each of these two has a softmax of its own.

        Args:
            query: (h, w), row and column on the grid.

        Returns:
            (B, N, H, W).

        Raises:
            ValueError: the query is not on the grid.
        """
        i = torch.tensor(self._number(query))
        (height, width), (h, w), decay = self.layout.size, map(torch.tensor, query), self.added
        if not isinstance(decay, AxialDecay):
            return self._patches(self._added(decay, i, torch.arange(self.q.shape[0])[:, None, None])).exp()
        # (B, 1) images; a decay along an axis is that of B * W columns or B * H rows.
        images = torch.arange(self.q.shape[0])[:, None]
        down = self._added(decay.columns, h, (images * width + w)[:, :, None])  # (B, N, H)
        along = self._added(decay.rows, w, (images * height + torch.arange(height))[:, None, :, None])  # (B, N, H, W)
        return (down[..., None] + along).exp()

    def attention(self, query: tuple[int, int]) -> Tensor:
        """The weight that the query gives each patch token: (B, N, H, W), float32 at least.

        Together with the weights of prefix tokens they add up to 1.

        Args:
            query: (h, w), row and column on the grid.

        Returns:
            (B, N, H, W).

        Raises:
            ValueError: the query is not on the grid.
        """
        return self._patches(self.weights(torch.tensor([self._number(query)]))[:, :, 0])

    def weights(self, queries: Tensor) -> Tensor:
        """What some queries give each token, prefix tokens among them: (B, N, Q, L), float32 at least.

        Memory grows with Q * L, of axial kinds with L * L.

        Args:
            queries: (Q,), their numbers in the sequence, in which prefix tokens come first.

        Returns:
            (B, N, Q, L).
        """
        q, k, decay = self.q, self.k, self.added
        if isinstance(decay, AxialDecay):  # two softmaxes, of which the pairs of one query are no row
            return attention_weights(q, k, decay, attn_mask=self.attn_mask, scale=self.scale)[:, :, queries]
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        with autocast_disabled(q.device):
            scores = at_least_float32(q[:, :, queries]) * scale @ at_least_float32(k).mT
        if decay is not None:
            images = torch.arange(len(q))[:, None, None, None]
            scores += self._added(decay, queries[:, None], images)
        if self.attn_mask is not None:
            mask = checked_mask(self.attn_mask, q)  # (B|1, N|1, L|1, L)
            scores += added_by(mask if mask.shape[2] == 1 else mask[:, :, queries], scores.dtype)[0]
        is_empty = (scores == float("-inf")).all(-1, keepdim=True)
        return scores.softmax(-1).masked_fill(is_empty, 0.0)

    def select(self, images: Sequence[int], heads: Sequence[int]) -> "LayerRecord":
        """The record of some images and heads, in the order in which they are named.

        Args:
            images: Their numbers in the batch, one or more.
            heads: Their numbers, the same.

        Returns:
            A record, whose images and heads are numbered anew.

        Raises:
            ValueError: an image or a head is not there, or none is named.
        """
        for name, chosen, size in (("images", images, self.q.shape[0]), ("heads", heads, self.q.shape[1])):
            if not chosen or any(not 0 <= number < size for number in chosen):
                raise ValueError(
                    f"{name} of {self.name} must be numbers from 0 to {size - 1}, one or more: got {list(chosen)}."
                )
        device, height, width = self.q.device, self.layout.height, self.layout.width
        number, head = (torch.tensor(list(chosen), device=device) for chosen in (images, heads))

        def pick(x: Tensor, first: Tensor) -> Tensor:  # a dimension of 1 is for all
            x = x if len(x) == 1 else x[first]
            return x if x.shape[1] == 1 else x[:, head]

        def part(decay: PairwiseDecay, first: Tensor) -> Any:
            tensors = {name: value for name, value in vars(decay).items() if isinstance(value, Tensor)}
            # Decays are dataclasses.
            return replace(decay, **{name: pick(x, first) for name, x in tensors.items()})  # type: ignore[type-var]

        def sequences(count: int) -> Tensor:  # of the rows or columns of the images
            return (number[:, None] * count + torch.arange(count, device=device)).flatten()

        added, mask = self.added, self.attn_mask
        if isinstance(added, AxialDecay):
            rows, columns = part(added.rows, sequences(height)), part(added.columns, sequences(width))
            added = replace(added, rows=rows, columns=columns)
        elif added is not None:
            added = part(added, number)
        if mask is not None:
            mask = pick(mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)), number)
        gates = {name: gate[number][..., head] for name, gate in self.gate_outputs.items()}
        return replace(
            self, q=pick(self.q, number), k=pick(self.k, number), added=added, attn_mask=mask, gate_outputs=gates
        )

    def without_decay(self) -> "LayerRecord":
        """The same queries and keys as if the kind were `none`: one softmax over all tokens, of axial kinds too.

        Returns:
            A record without gates.
        """
        return replace(self, kind=NoDecay(), added=None, gate_outputs={})

    def decay_alone(self) -> "LayerRecord":
        """The same decay as if all queries and keys were alike: its attention is the decay's part in it.

        Returns:
            A record whose queries are zero.
        """
        return replace(self, q=torch.zeros_like(self.q))

    def _added(self, decay: PairwiseDecay | None, i: Tensor, sequences: Tensor) -> Tensor:
        """What is added to the scores of queries i and each key, (B, N, ..., L), without the masks of all queries.

        Args:
            decay: Of many sequences.
            i: Numbers of the queries in their sequences, (..., 1).
            sequences: Which of them, (B, 1, ..., 1).
        """
        num_heads = self.q.shape[1]
        num_tokens = self.layout.num_tokens if decay is None else decay.layout.num_tokens
        heads = torch.arange(num_heads).view(-1, *[1] * (sequences.ndim - 2))
        keys = torch.arange(num_tokens)
        shape = torch.broadcast_shapes(sequences.shape, heads.shape, i.shape, keys.shape)
        scores = at_least_float32(self.q).new_zeros(shape)
        if decay is None:
            return scores
        return score_mod(decay)(scores, *(index.to(scores.device) for index in (sequences, heads, i, keys)))

    def _patches(self, row: Tensor) -> Tensor:
        """What a query has with all tokens, (B, N, L) -> a map (B, N, H, W)."""
        return row[..., self.layout.num_prefix_tokens :].unflatten(-1, self.layout.size)

    def _number(self, query: tuple[int, int]) -> int:
        """Of the token at (h, w)."""
        (h, w), (height, width) = query, self.layout.size
        if not (0 <= h < height and 0 <= w < width):
            raise ValueError(f"query must be (h, w) on the grid of {self.name}, {height} x {width}: got {query}.")
        return self.layout.num_prefix_tokens + h * width + w


@torch.no_grad()
def record(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[LayerRecord]:
    """Run the model once and keep what each attention with decay saw.

    The model stays in the mode that it is in: in training mode, batch norm and dropout do as in training. What
    torch.compile has made of it, or of its parts, is not used: compiled code knows nothing of hooks that come later.

    Args:
        model: Any model that holds SpatialDecayAttention modules, timm's attn_layer= among them, or that
            swap_attention has put decay into.
        inputs: What the model takes.
        kwargs: The same by keyword.

    Returns:
        One record for each call of such a layer, in the order of the calls.

    Raises:
        ValueError: the model holds no attention with decay, or calls none; its tokens fill no grid.

    Examples:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224")
        >>> report = swap_attention(model, "full")
        >>> [layer.name for layer in record(model, torch.randn(1, 3, 224, 224))][:2]
        ['blocks.0.attn', 'blocks.1.attn']
    """
    cores = {name: module for name, module in model.named_modules() if isinstance(module, AttentionCore)}
    if not cores:
        raise ValueError(
            f"model must hold attention with decay: got {type(model).__name__} without any. Build it with "
            "SpatialDecayAttention, or put decay into it with swap_attention."
        )
    hosts: dict[nn.Module, str] = {added: name for name, added in added_decays(model).items()}
    records: list[LayerRecord] = []
    with ExitStack() as hooks:  # removes them again, also where the model raises
        for name, core in cores.items():
            watched = _Watched(hosts.get(core, name) or type(model).__name__, core, records)
            for gate_name, gate in core.decay.named_children():
                if isinstance(gate, ContextAwareGate):
                    hooks.enter_context(gate.register_forward_hook(partial(watched.keep_gate, gate_name)))
            hooks.enter_context(core.attention.register_forward_pre_hook(watched.keep, with_kwargs=True))
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        model(*inputs, **kwargs)
    if not records:
        raise ValueError(
            f"the call must run the model's attention with decay, as Python code: got {type(model).__name__} with "
            f"{len(cores)} of them, none of which was called. Pass inputs that reach them, to a model that is neither "
            "scripted nor exported."
        )
    return records


class _Watched:
    """The hooks of one attention: its gates come first in a call, then the softmax."""

    def __init__(self, name: str, core: AttentionCore, records: list[LayerRecord]) -> None:
        self.name, self.kind, self.records = name, core.decay.kind, records
        self.gate_outputs: dict[str, Tensor] = {}

    def keep_gate(self, name: str, _gate: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of a gate."""
        self.gate_outputs[name] = output.detach()

    def keep(self, _attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a DecayAttention: keep the arguments of its forward."""

        def keep(
            q: Tensor,
            k: Tensor,
            _v: Tensor,
            decay: Decay | None,
            layout: Layout,
            *,
            attn_mask: Tensor | None = None,
            scale: float | None = None,
            dropout_p: float = 0.0,
        ) -> None:
            grid = layout.as_grid(f"a picture of {self.name}", "Record a call without dropped or packed patches.")
            # Copies: the model may go on to change its features in place, and views would keep the values alive.
            q, k, attn_mask = q.clone(), k.clone(), None if attn_mask is None else attn_mask.clone()
            gates, self.gate_outputs = self.gate_outputs, {}
            self.records.append(LayerRecord(self.name, self.kind, grid, q, k, decay, attn_mask, scale, gates))

        keep(*args, **kwargs)
