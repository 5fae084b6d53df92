"""An attention module of another library with decay: its own forward, in which the softmax gets the decay."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_decay.decay import Decay
from spatial_decay.layers.core import AttentionCore, DecayAttention
from spatial_decay.layers.depthwise_conv import DepthwiseConv
from spatial_decay.layers.kinds import Kind
from spatial_decay.layers.mask import SpatialDecayMask
from spatial_decay.layers.output_gate import OutputGate
from spatial_decay.layout import Layout
from spatial_decay.ops import Backend
from spatial_decay.swap.calls import Calls
from spatial_decay.swap.hosts.base import Host
from spatial_decay.swap.stand_in import named

__all__ = ["AddedDecay", "added_decays", "parameters_of_forward", "put_back", "take_out"]


class AddedDecay(AttentionCore):
    """What an attention module gets as its submodule `spatial_decay`: gates, LPE and output gate of SDT Eq. 13.

    Args:
        attn: The attention module, whose forward takes the tokens first.
        host: What is known of its class.
        calls: They know where the tokens of a call lie.
        decay: Kind of decay. Its gates read the tokens that the module is given, or for kind `gaussian` the queries.
        lpe_kernel_size: As in SpatialDecayAttention; 0 leaves LPE out.
        gate_rank: As in SpatialDecayAttention; 0 leaves the output gate out.
        backend: As in decay_attention.
        is_over_space: Whether that is known, so that a video may have as many frames as an image has tokens.
        options: Keywords of swap_attention that have led to this.

    Raises:
        ValueError: an option that cannot be.
    """

    def __init__(
        self,
        attn: nn.Module,
        host: Host,
        calls: Calls,
        *,
        decay: Kind,
        lpe_kernel_size: int,
        gate_rank: int,
        backend: Backend,
        is_over_space: bool,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        dim, num_heads, num_channels = host.width(attn), host.heads(attn), host.channels(attn)
        if gate_rank and num_channels != dim:
            raise ValueError(
                f"gate_rank needs attention as wide as its tokens: got {num_channels} and {dim} in "
                f"{type(attn).__name__}. Leave the output gate out."
            )
        calls.add_user(self)
        self.calls, self.options, self.mask_name, self.stand_in = calls, options, host.mask, host.stand_in
        self.of_class, self.other_forward, self.text_name = type(attn).__name__, host.forward, host.text
        self.dim, self.num_channels = dim, num_channels
        self.is_over_space = is_over_space
        self.last_call = object()  # another one with each call: threads that call at once need no lock
        self.parameters_of_forward = parameters_of_forward(attn)
        self.decay = SpatialDecayMask(
            num_channels if decay.reads_queries else dim,
            num_heads,
            decay=decay,
            num_prefix_tokens=calls.num_unplaced_tokens,
        )
        self.attention = _OwnSoftmax(backend) if decay.name == "none" else DecayAttention(backend)
        self.lpe = DepthwiseConv(num_channels, lpe_kernel_size) if lpe_kernel_size else None
        self.output_gate = OutputGate(num_channels, gate_rank) if gate_rank else None
        if isinstance(attn, nn.MultiheadAttention):
            # In evaluation nn.TransformerEncoderLayer takes the weights of its attention and does not call it, but
            # where a module inside has a hook.
            self.register_forward_pre_hook(_do_nothing)

    @property
    def adds_nothing(self) -> bool:
        """Whether it leaves the module as it is: kind `none`, without LPE and output gate."""
        return self.decay.kind.name == "none" and self.lpe is None and self.output_gate is None

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self.calls.add_user(self)  # of a copy, whose Calls may be its own

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
        num_text_tokens: int = 0,
    ) -> Tensor:
        """F.scaled_dot_product_attention with the decay of these tokens, (B, N, L, d) in and out.

        The first num_text_tokens of them are text that joins the image: it lies nowhere. It calls forward, around which
        tensor parallelism goes from all heads to those of a process.

        Raises:
            ValueError: causal attention, or attention to other tokens than those of the queries; or the module is not
                what was registered of its class.
        """
        self._check_answers(tokens, query, value)
        if not torch.compiler.is_compiling():
            self.last_call = object()
        if is_causal or query.shape != key.shape:
            raise ValueError(
                "decay needs attention of image tokens to each other: got "
                + ("is_causal=True" if is_causal else f"queries {tuple(query.shape)} and keys {tuple(key.shape)}")
                + ". Leave this module out, see layers of swap_attention."
            )
        return self(tokens, query, key, value, attn_mask, dropout_p, scale, num_text_tokens)

    def forward(
        self,
        tokens: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        scale: float | None,
        num_text_tokens: int,
    ) -> Tensor:
        """attend_as_host behind its checks."""
        layout = self.calls.layout_of(tokens, num_text_tokens=num_text_tokens, is_over_space=self.is_over_space)
        num_suffix = self.calls.num_suffix_tokens
        if self.decay.kind.name == "none" and self.lpe is None:
            num_suffix = 0  # nothing asks where tokens lie: bit for bit the model's own
        if num_suffix:  # tokens behind the patches come first, as the layout has them
            tokens = tokens.roll(num_suffix, 1)
            query, key, value = (x.roll(num_suffix, 2) for x in (query, key, value))
            attn_mask = None if attn_mask is None else _rolled_mask(attn_mask, num_suffix)
        decay = self.describe(tokens, query, layout)
        options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "scale": scale}
        out = self.attend(query, key, value, decay, tokens, layout, **options)  # (B, L, N*d)
        out = out.roll(-num_suffix, 1) if num_suffix else out
        return out.unflatten(2, (query.shape[1], -1)).transpose(1, 2)

    def _check_answers(self, tokens: Tensor, query: Tensor, value: Tensor) -> None:
        """What was registered of the class, against what comes."""
        num_heads = self.decay.num_heads
        if query.ndim != 4 or query.shape[1] != num_heads:
            answer = f"heads={num_heads}"
        elif tokens.ndim != 3 or tokens.shape[-1] != self.dim:
            answer = f"width={self.dim}"
        elif value.shape[-1] * num_heads != self.num_channels:
            answer = f"channels={self.num_channels}"
        else:
            return
        raise ValueError(
            f"what is registered of {self.of_class} must fit its forward, with tokens (B, L, width) first, and queries "
            f"(B, heads, L, d) and values of heads * d = channels: {answer} does not, got tokens "
            f"{tuple(tokens.shape)}, queries {tuple(query.shape)} and values {tuple(value.shape)}. Register the class "
            "again, see sd.swap.register_attention."
        )


def _do_nothing(_module: nn.Module, _args: Any) -> None:
    """A hook that is there to be seen."""


def _rolled_mask(attn_mask: Tensor, num_suffix_tokens: int) -> Tensor:
    """Of queries and keys, or of keys alone."""
    for axis in (-2, -1):
        if attn_mask.shape[axis] != 1:
            attn_mask = attn_mask.roll(num_suffix_tokens, axis)
    return attn_mask


class _OwnSoftmax(DecayAttention):
    """PyTorch's own: kind `none` is the model as it was, bit for bit."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Decay | None,
        layout: Layout,  # noqa: ARG002  as in DecayAttention
        *,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """As F.scaled_dot_product_attention."""
        assert decay is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, scale=scale)


class Decayed(nn.Module):
    """What _decayed_class puts in front of a module's own class. Weights and their names stay where they are."""

    spatial_decay: AddedDecay

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself."""
        added = self.spatial_decay
        if added.other_forward is not None:
            if added.adds_nothing:  # bit for bit what it was, a fast path of its own as well
                return super().forward(*args, **kwargs)
            if torch.compiler.is_compiling():
                return added.other_forward(self, *args, **kwargs)
            last_call = added.last_call
            out = added.other_forward(self, *args, **kwargs)
            if added.last_call is last_call:
                raise RuntimeError(
                    f"the forward that is registered of {added.of_class} must call attn.spatial_decay.attend_as_host "
                    "for its softmax: it did not, so that nothing was added. Register one that does, see "
                    "sd.swap.register_attention."
                )
            return out
        inputs = named(added.parameters_of_forward, args, kwargs)
        tokens, given = inputs[added.parameters_of_forward[0]], inputs.get(added.mask_name)
        text = None if added.text_name is None else inputs.get(added.text_name)
        if text is not None:
            tokens = torch.cat([text, tokens], 1)
        num_text_tokens = 0 if text is None else text.shape[1]
        inputs[added.mask_name] = mask = added.stand_in(self, tokens, given, num_text_tokens)
        out = super().forward(**inputs)
        if mask.num_calls != 1:
            raise mask.error(f"{type(self).__name__} did it {mask.num_calls} times")
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (_original_class(self),), self.__dict__.copy()


def added_decays(model: nn.Module) -> dict[str, AddedDecay]:
    """Of the modules that have one, by their names."""
    return {name: module.spatial_decay for name, module in model.named_modules() if isinstance(module, Decayed)}


def take_out(model: nn.Module) -> dict[str, AddedDecay]:
    """The decays of a model, by the names of their modules, which have none then; its hooks stay."""
    taken = added_decays(model)
    for name in taken:
        module = model.get_submodule(name)
        del module.spatial_decay
        module.__class__ = _original_class(module)
    return taken


def put_back(model: nn.Module, taken: dict[str, AddedDecay]) -> None:
    """The inverse of take_out."""
    for name, added in taken.items():
        module = model.get_submodule(name)
        module.spatial_decay = added
        module.__class__ = _decayed_class(type(module))


def parameters_of_forward(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module's forward takes; a last **kwargs is "**"."""
    parameters = inspect.signature(module.forward).parameters
    return tuple("**" if parameter.kind is parameter.VAR_KEYWORD else name for name, parameter in parameters.items())


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _decayed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass that a module's __class__ becomes, as fully_shard of FSDP2 does it; isinstance holds on."""
    if cls not in _CLASSES:
        members = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _CLASSES[cls] = type(f"Decayed{cls.__name__}", (Decayed, cls), members)
    return _CLASSES[cls]


def _original_class(module: nn.Module) -> type[nn.Module]:
    """What the module was before."""
    classes = type(module).__mro__
    return classes[classes.index(Decayed) + 1]


def _empty(cls: type[nn.Module]) -> nn.Module:
    """For copy and pickle, which fill in the rest."""
    decayed = _decayed_class(cls)
    return decayed.__new__(decayed)
