"""The calls that pass through a model: what its patch embedding gave for their images, told to its attention.

Attention modules of other libraries are called with tokens alone, and L does not tell H x W. So hooks on the patch
embedding (and on patch dropout) note the layout of each call as it passes, and the attention of the same call asks.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spatial_decay.layout import Layout

__all__ = ["Calls"]

_KEY = "spatial_decay.call"


class _Call:
    """One forward pass through a patch embedding.

    It lives as long as the autograd graph of that pass, and while it is its thread's last.
    """

    def __init__(self, layout: Layout, *, with_grad: bool) -> None:
        self.layout, self.with_grad = layout, with_grad
        self.backward = _backward()

    def is_of_this_backward(self) -> bool:
        """Whether the patch embedding itself is being computed again, within the backward pass that runs now."""
        return self.backward == _backward()

    def keep_with(self, x: Tensor) -> None:
        if x.grad_fn is not None:
            metadata: Any = x.grad_fn.metadata  # a dict; torch's annotations say a function
            metadata[_KEY] = self


class _Slot:
    """A plain object: where torch.compile breaks the graph it replays writes to one, and not to a threading.local."""

    call: _Call | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.slot = _Slot()


class Calls:
    """The calls through one patch embedding, and the layout of each.

    A forward pass reads what its own thread noted last. Gradient checkpointing computes parts of a pass again, within
    the backward pass, when another image may have come through since: then it is the layout of a pass whose graph is
    alive and that has as many tokens; where two of these disagree, that is an error.

    Args:
        num_prefix_tokens: P, class and register tokens that the model puts first.

    Attributes:
        users: What asks for the layout, as long as it lives: each AddedDecay enters itself, and restoring takes it out.
    """

    def __init__(self, num_prefix_tokens: int) -> None:
        self.__setstate__(num_prefix_tokens)

    def __getstate__(self) -> int:
        return self.num_prefix_tokens  # copies of a model have passes of their own

    def __setstate__(self, num_prefix_tokens: int) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.users: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._thread = _Thread()
        self._alive: weakref.WeakSet[_Call] = weakref.WeakSet()
        self._reentrant: list[_Call] = []  # no graph keeps these

    def forget(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the part of the model that has both the patch embedding and its attention."""
        self._thread.slot.call = None

    def note(
        self,
        read: Callable[..., tuple[Layout, Tensor]],
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Forward hook of the patch embedding; read says what it gave, see ReadLayout."""
        self._begin(*read(args, kwargs, output, self.num_prefix_tokens))

    def keep_only(self, indices: Tensor, tokens: Tensor) -> None:
        """Of this call's patches only these are left, by number, (B, K), in this order; tokens are what is left."""
        self._begin(self._current().layout.subset(indices, self.num_prefix_tokens), tokens)

    def layout_of(self, x: Tensor) -> Layout:
        """The layout of tokens (B, L, D) that an attention of this call is given.

        Raises:
            RuntimeError: no image has come through; L is not what came through; or, within a backward pass, two
                passes of so many tokens disagree.
        """
        if _is_in_backward() and (self._thread.slot.call is None or not self._thread.slot.call.is_of_this_backward()):
            return self._of_recomputed(x)
        layout = self._current().layout
        if layout.num_tokens != x.shape[1]:
            raise RuntimeError(
                f"the tokens must be those of the last patch embedding: it gave {layout}, and attention got "
                f"L = {x.shape[1]} tokens. Pass swap_attention the model's num_prefix_tokens, or the name of the right "
                "patch embedding as patch_embed; attention over other tokens has to be left out, see layers."
            )
        return layout

    def keep_with(self, x: Tensor) -> None:
        """Remember this call for as long as the graph of x lives, which an attention of this call has given."""
        if torch.compiler.is_compiling() or _is_in_backward():
            return
        call = self._current()
        if call.with_grad and not torch.is_grad_enabled():  # use_reentrant=True: the first time there is no graph
            self._reentrant = [other for other in self._reentrant if other.layout != call.layout] + [call]
        call.keep_with(x)

    def _begin(self, layout: Layout, tokens: Tensor) -> None:
        is_eager = not torch.compiler.is_compiling()
        self._thread.slot.call = call = _Call(layout, with_grad=is_eager and torch.is_grad_enabled())
        if call.with_grad:
            self._alive.add(call)
            call.keep_with(tokens)

    def _after_backward(self) -> None:
        self._reentrant = []

    def _current(self) -> _Call:
        if self._thread.slot.call is None:
            raise RuntimeError(
                "no image has come through the patch embedding in this pass, so attention with decay does not know "
                "where its tokens lie. Call the model rather than its blocks; pass swap_attention the name of the "
                "patch embedding that runs before them as patch_embed; swap again where it was replaced since; and "
                "compile the whole model rather than blocks inside gradient checkpointing."
            )
        return self._thread.slot.call

    def _of_recomputed(self, x: Tensor) -> Layout:
        found: list[Layout] = []
        if self._reentrant:
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        for call in [*self._alive, *self._reentrant]:
            if call.layout.num_tokens == x.shape[1] and call.layout not in found:
                found.append(call.layout)
        if len(found) != 1:
            raise RuntimeError(
                "gradient checkpointing computes attention again, and must find one forward pass with a live graph and "
                f"L = {x.shape[1]} tokens: found {len(found)}"
                + (f" that differ, {', '.join(map(str, found))}" if found else "")
                + ". Run backward before the next forward pass, and checkpoint with use_reentrant=False."
            )
        return found[0]


def _backward() -> int:
    """The number of the backward pass that runs in this thread, as torch.utils.checkpoint knows it; -1 outside."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _is_in_backward() -> bool:
    return _backward() != -1
