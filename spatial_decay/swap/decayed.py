"""An attention module of another library with decay: its own forward, in which the softmax gets the decay."""

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from spatial_decay.decay import Decay
from spatial_decay.layers.core import AttentionCore, DecayAttention
from spatial_decay.layers.depthwise_conv import DepthwiseConv
from spatial_decay.layers.mask import SpatialDecayMask
from spatial_decay.layers.output_gate import OutputGate
from spatial_decay.ops import Backend
from spatial_decay.swap.layout import TokenLayout, named

__all__ = ["AddedDecay", "Decayed", "added_decays", "decayed_class", "original_class"]


class AddedDecay(AttentionCore):
    """What an attention module gets as its submodule `spatial_decay`: gates, LPE and output gate of SDT Eq. 13.

    Args:
        decay: Its gates read the tokens that the module is given, or for kind `gaussian` the queries.
        layout: Where the tokens of a call lie.
        parameters_of_forward: Names of what the module's forward takes; the tokens come first.
        mask_name: Which of them is the mask.
        num_channels: N * d.
        lpe_kernel_size: As in SpatialDecayAttention; 0 leaves LPE out.
        gate_rank: As in SpatialDecayAttention; 0 leaves the output gate out. Needs N * d = D.
        backend: As in decay_attention.
        options: Keywords of swap_attention that have led to this.
    """

    def __init__(
        self,
        decay: SpatialDecayMask,
        layout: TokenLayout,
        *,
        parameters_of_forward: Sequence[str],
        mask_name: str,
        num_channels: int,
        lpe_kernel_size: int = 0,
        gate_rank: int = 0,
        backend: Backend = "auto",
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.decay, self.layout, self.options = decay, layout, options
        self.attention = _OwnSoftmax(backend) if decay.kind.name == "none" else DecayAttention(backend)
        self.parameters_of_forward, self.mask_name = tuple(parameters_of_forward), mask_name
        self.lpe = DepthwiseConv(num_channels, lpe_kernel_size) if lpe_kernel_size else None
        self.output_gate = OutputGate(num_channels, gate_rank) if gate_rank else None

    def attend_as_host(
        self,
        tokens: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: ARG002  equal shapes are one group
    ) -> Tensor:
        """F.scaled_dot_product_attention with the decay of these tokens, (B, N, L, d) in and out.

        Raises:
            ValueError: causal attention, or attention to other tokens than those of the queries.
        """
        if is_causal or query.shape != key.shape:
            raise ValueError(
                "decay needs attention of image tokens to each other: got "
                + ("is_causal=True" if is_causal else f"queries {tuple(query.shape)} and keys {tuple(key.shape)}")
                + ". Leave this module out, see layers of swap_attention."
            )
        layout = self.layout.of(tokens)
        decay = self.describe(tokens, query, layout)
        out = self.attend(
            query, key, value, decay, tokens, layout, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale
        )
        return rearrange(out, "b l (n d) -> b n l d", n=self.decay.num_heads)


class _OwnSoftmax(DecayAttention):
    """PyTorch's own: kind `none` is the model as it was, bit for bit."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Decay | None,
        *,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """As F.scaled_dot_product_attention."""
        assert decay is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, scale=scale)


class _Mask:
    """Stands for the attn_mask that a module hands to F.scaled_dot_product_attention, which then is AddedDecay.attend_as_host.

    PyTorch asks any argument with a __torch_function__ what the call shall do, as torch.nn.attention.bias does it.

    Args:
        added: The decay of the module.
        tokens: What the module is given.
        attn_mask: The mask that it is given.
    """

    def __init__(self, added: AddedDecay, tokens: Tensor, attn_mask: Tensor | None) -> None:
        self.added, self.tokens, self.attn_mask = added, tokens, attn_mask
        self.num_calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            raise RuntimeError(_HOW_TO_FUSE.format(f"its mask went to {getattr(func, '__name__', func)}"))
        bound = named(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, kwargs or {})
        mask = bound.pop("attn_mask")
        mask.num_calls += 1
        return mask.added.attend_as_host(mask.tokens, attn_mask=mask.attn_mask, **bound)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(_HOW_TO_FUSE.format(f"its mask was asked for its {name}"))

    def __getitem__(self, _: Any) -> Any:
        raise RuntimeError(_HOW_TO_FUSE.format("its mask was sliced"))

    # What diffusers' Attention asks of a mask on its way: (B * N, 1, L), to be seen as (B, N, 1, L).

    @property
    def shape(self) -> tuple[int, int, int]:
        batch_size, num_tokens = self.tokens.shape[:2]
        return batch_size * self.added.decay.num_heads, 1, num_tokens

    def view(self, *shape: int) -> "_Mask":  # noqa: ARG002  it has one shape
        return self


_HOW_TO_FUSE = (
    "attention with decay must hand its attn_mask to F.scaled_dot_product_attention, once: {}. Use fused attention "
    "(timm: timm.layers.set_fused_attn(True) before building the model; transformers: attn_implementation='sdpa', "
    "without output_attentions; diffusers: AttnProcessor2_0 without slicing), or leave this module out, see layers of "
    "swap_attention."
)


class Decayed(nn.Module):
    """What decayed_class puts in front of a module's own class. Weights and their names stay where they are."""

    spatial_decay: AddedDecay

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself."""
        added = self.spatial_decay
        inputs = named(added.parameters_of_forward, args, kwargs)
        tokens, given = inputs[added.parameters_of_forward[0]], inputs.get(added.mask_name)
        inputs[added.mask_name] = mask = _Mask(added, tokens, self._prepared(given, tokens))
        out = super().forward(**inputs)
        if mask.num_calls != 1:
            raise RuntimeError(_HOW_TO_FUSE.format(f"{type(self).__name__} did it {mask.num_calls} times"))
        added.layout.keep_with(out if isinstance(out, Tensor) else out[0])
        return out

    def _prepared(self, attn_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        """As diffusers' Attention does it; other modules hand their mask on as it is."""
        if attn_mask is None or not hasattr(self, "prepare_attention_mask"):
            return attn_mask
        batch_size, num_tokens = tokens.shape[:2]
        prepared: Tensor = cast(Any, self).prepare_attention_mask(attn_mask, num_tokens, batch_size)
        return prepared.view(batch_size, self.spatial_decay.decay.num_heads, -1, num_tokens)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (original_class(self),), self.__dict__.copy()


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def decayed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass that a module's __class__ becomes, as fully_shard of FSDP2 does it; isinstance holds on."""
    if cls not in _CLASSES:
        members = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _CLASSES[cls] = type(f"Decayed{cls.__name__}", (Decayed, cls), members)
    return _CLASSES[cls]


def added_decays(model: nn.Module) -> dict[str, AddedDecay]:
    """Of the modules that have one, by their names."""
    return {name: module.spatial_decay for name, module in model.named_modules() if isinstance(module, Decayed)}


def original_class(module: nn.Module) -> type[nn.Module]:
    """What the module was before."""
    classes = type(module).__mro__
    return classes[classes.index(Decayed) + 1]


def _empty(cls: type[nn.Module]) -> nn.Module:
    """For copy and pickle, which fill in the rest."""
    decayed = decayed_class(cls)
    return decayed.__new__(decayed)
