"""What swap_attention knows of classes of attention: register_attention teaches it one, ours and users' alike."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from spatial_decay.swap.hosts.base import Host, rows_of
from spatial_decay.swap.stand_in import StandIn

__all__ = ["hosts_of", "register_attention"]

_HOSTS: dict[str, Host] = {}


def register_attention(
    cls: type[nn.Module] | str,
    *,
    heads: Callable[[Any], int],
    width: Callable[[Any], int],
    mask: str = "attn_mask",
    channels: Callable[[Any], int] | None = None,
    reason_against: Callable[[Any], str] | None = None,
    num_prefix_tokens: Callable[[Any], int | None] | None = None,
    num_suffix_tokens: Callable[[Any], int | None] | None = None,
    text: str | None = None,
    stand_in: type[StandIn] = StandIn,
    forward: Callable[..., Any] | None = None,
) -> None:
    """Teach swap_attention a class of attention modules, and its subclasses.

    Its forward must take the tokens first, (B, L, D), and must call F.scaled_dot_product_attention once, with q, k and
    v of shape (B, N, L, d). An argument of its forward must come to that call as attn_mask, as it was given, None or
    not. Where shapes or the mask tell that a part of this does not hold, the first call after the swap says which. What
    they do not tell, reason_against must: attention to other tokens of the same number, tokens that are put in another
    order first, and attention that is causal only without a mask.

    Args:
        cls: The class; or its full name, "package.module.Class", so that its package need not be imported. What was
            registered under that name before is replaced. For modules of a class that serves for much else, the full
            name of a class above them and the path from there, with numbers as they are or as `*`, such as
            "package.module.ViT.blocks.*.attn". It goes before the name of their own class, and a longer path before a
            shorter one.
        heads: Asked of a module of the class: N.
        width: D of its tokens.
        mask: The name of that argument of forward. Where forward takes **kwargs, any name.
        channels: N * d of its values. None: as width.
        reason_against: Why this module cannot take a decay, such as "it attends over windows"; empty where it can.
            None: each can.
        num_prefix_tokens: P, class and register tokens, where the module knows. None, or the answer None: what the
            model says, or none.
        num_suffix_tokens: S, tokens behind the patches, the same way.
        text: For joint attention of text and image: the argument of forward that has the text, (B, T, D), which goes
            before the image into the softmax. It lies nowhere. None: there is none.
        stand_in: What goes to forward in place of the mask: a subclass of sd.swap.StandIn for classes that ask a mask
            for its shape, or change it, on the way. It must be at the top of a module, to be pickled.
        forward: Runs in place of the module's own forward where no mask comes to the softmax: it gets the module, and
            what the module is called with, and must call `attn.spatial_decay.attend_as_host(tokens, q, k, v)` for the
            softmax, with num_text_tokens=T where the first T of the tokens are text. Where nothing is added, with kind
            `none`, the module's own runs. At the top of a module too. None: the module's own, always.

    Raises:
        TypeError: cls is no class of modules, or an answer is no function.
        ValueError: forward has no argument of that name, or cannot take the tokens and the mask by name.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> class MyAttention(nn.Module):
        ...     def __init__(self, dim, num_heads, is_causal=False):
        ...         super().__init__()
        ...         self.num_heads, self.is_causal = num_heads, is_causal
        ...         self.qkv = nn.Linear(dim, 3 * dim)
        ...         self.proj = nn.Linear(dim, dim)
        ...
        ...     def forward(self, x, attn_mask=None):
        ...         q, k, v = self.qkv(x).chunk(3, -1)  # (B, L, D) each
        ...         q, k, v = (
        ...             x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        ...             for x in (q, k, v)
        ...         )
        ...         out = F.scaled_dot_product_attention(
        ...             q, k, v, attn_mask, is_causal=self.is_causal
        ...         )
        ...         return self.proj(out.transpose(1, 2).flatten(2))
        >>> class MyViT(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patch_embed = nn.Conv2d(3, 32, 16, 16)
        ...         self.attn = MyAttention(32, num_heads=2)
        ...
        ...     def forward(self, images):
        ...         return self.attn(self.patch_embed(images).flatten(2).mT)
        >>> register_attention(
        ...     MyAttention,
        ...     heads=lambda attn: attn.num_heads,
        ...     width=lambda attn: attn.qkv.in_features,
        ...     reason_against=lambda attn: (
        ...         "it is causal" if attn.is_causal else ""
        ...     ),
        ... )
        >>> model = MyViT()
        >>> print(swap_attention(model, "full"))
        decay 'full' in 1 attention module, 66 new parameters
        attention  class        heads  new parameters  grid from
        attn       MyAttention      2              66  patch_embed
        next: train; the new weights have ".spatial_decay." in their names
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 24, 32])
    """
    answers = {
        "heads": heads,
        "width": width,
        "channels": channels,
        "num_prefix_tokens": num_prefix_tokens,
        "num_suffix_tokens": num_suffix_tokens,
        "reason_against": reason_against,
        "forward": forward,
    }
    for name, answer in answers.items():
        if not callable(answer) and (answer is not None or name in ("heads", "width")):
            raise TypeError(
                f"{name} must be a function of a module of the class, such as lambda attn: attn.num_heads: got "
                f"{answer!r}."
            )
    if forward is not None and text is not None:
        raise ValueError(
            f"text is for a class whose own forward runs: got text={text!r} with a forward in its place. Leave text "
            "out, and say num_text_tokens there."
        )
    if not (isinstance(stand_in, type) and issubclass(stand_in, StandIn)):
        raise TypeError(f"stand_in must be a subclass of StandIn: got {stand_in!r}.")
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        if forward is None:
            _check_forward(cls, mask, text)
        cls = f"{cls.__module__}.{cls.__qualname__}"
    elif not isinstance(cls, str):
        raise TypeError(f"cls must be a class of modules or its full name: got {cls!r}.")
    _HOSTS[cls] = Host(
        heads=heads,
        width=width,
        channels=width if channels is None else channels,
        mask=mask,
        stand_in=stand_in,
        reason_against=_none_against if reason_against is None else reason_against,
        num_prefix_tokens=_unknown if num_prefix_tokens is None else num_prefix_tokens,
        num_suffix_tokens=_unknown if num_suffix_tokens is None else num_suffix_tokens,
        text=text,
        forward=forward,
    )


def _check_forward(cls: type[nn.Module], mask: str, text: str | None) -> None:
    """Raise ValueError where forward cannot be given its tokens and the mask by name."""
    _, *parameters = inspect.signature(cls.forward).parameters.values()
    names = [parameter.name for parameter in parameters]
    if not parameters or any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters):
        raise ValueError(
            f"{cls.__name__}.forward must take the tokens first, and all arguments by their names: got "
            f"{inspect.signature(cls.forward)}. Give it such a signature, or register a forward in its place."
        )
    if mask not in names[1:] and parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        raise ValueError(
            f"mask must be the name of an argument of {cls.__name__}.forward behind the tokens, one of "
            f"{', '.join(names[1:])}: got {mask!r}. Give forward an argument that goes to "
            "F.scaled_dot_product_attention as attn_mask."
        )
    others = [name for name in names[1:] if name != mask]
    if text is not None and text not in others:
        raise ValueError(
            f"text must be the name of an argument of {cls.__name__}.forward behind the tokens, and not the mask; one "
            f"of {', '.join(others)}: got {text!r}. Leave it out where no text joins the image."
        )


def hosts_of(modules: Mapping[str, nn.Module]) -> dict[str, Host]:
    """What is registered of the modules of a model, by their names, see rows_of."""
    return rows_of(_HOSTS, modules)


def _none_against(_: Any) -> str:
    return ""


def _unknown(_: Any) -> None:
    return None
