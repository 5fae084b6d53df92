"""What stands for the attn_mask that a module hands to F.scaled_dot_product_attention, and answers that call itself."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

__all__ = ["StandIn", "named"]


class StandIn:
    """A mask in name: the attention that it goes to becomes AddedDecay.attend_as_host.

    PyTorch asks any argument with a __torch_function__ what the call shall do, as torch.nn.attention.bias does it.
    Each host library has a subclass, which also answers what the library's modules ask of a mask on its way.

    Args:
        attn: The module, with its submodule `spatial_decay`.
        tokens: What the module is given, (B, L, D), behind the text that it puts before them.
        attn_mask: The mask that it is given, of a shape that its F.scaled_dot_product_attention takes; or None.
        num_text_tokens: How many tokens that text has.

    Attributes:
        how_to_fuse: How this library is made to call F.scaled_dot_product_attention.
    """

    how_to_fuse: ClassVar[str] = "in the forward of its class"

    def __init__(self, attn: Any, tokens: Tensor, attn_mask: Tensor | None, num_text_tokens: int = 0) -> None:
        self.attn, self.tokens, self.attn_mask, self.num_text_tokens = attn, tokens, attn_mask, num_text_tokens
        self.num_calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            raise cls.error(f"its mask went to {getattr(func, '__name__', func)}")
        bound = named(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, kwargs or {})
        mask = bound.pop("attn_mask")
        mask.num_calls += 1
        return mask.attn.spatial_decay.attend_as_host(
            mask.tokens, **bound, attn_mask=mask.attn_mask, num_text_tokens=mask.num_text_tokens
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.error(f"its mask was asked for its {name}")

    def __getitem__(self, _: Any) -> Any:
        raise self.error("its mask was sliced")

    @classmethod
    def error(cls, what: str) -> RuntimeError:
        """That it did not come to the one call.

        Args:
            what: Where it went instead.

        Returns:
            The error to raise.
        """
        return RuntimeError(
            f"attention with decay must hand its attn_mask to F.scaled_dot_product_attention, once: {what}. Use fused "
            f"attention ({cls.how_to_fuse}), or leave this module out, see layers of swap_attention."
        )


def named(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, written so that the compiler of torch 2.6 can follow."""
    return {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
