"""The calls that pass through a model: what its patch embedding gave for their images, told to its attention.

Attention modules of other libraries are called with tokens alone, and L does not tell H x W. So hooks on the patch
embedding (and on patch dropout) note the layout of each call as it passes, and the attention of the same call asks.
"""

import copy
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spatial_decay.layout import Grid, Layout
from spatial_decay.swap.recompute import running_backward, running_checkpoints
from spatial_decay.values import is_jit_tracing

__all__ = ["Calls"]


class _Call:
    """One forward pass through a patch embedding.

    Args:
        layout: Where the tokens lie that go on from here.
        num_frames: T, of a video.
        again: The checkpoint that computes again, if one does.
        whole: Where all patches of the image lie; None: the same.
    """

    def __init__(self, layout: Layout, num_frames: int | None, again: Any | None, whole: Layout | None = None) -> None:
        self.layout, self.num_frames, self.whole = layout, num_frames, layout if whole is None else whole
        self.backward, self.again = running_backward(), None if again is None else weakref.ref(again)

    def is_of(self, again: Any | None) -> bool:
        """Whether it came through in the forward pass, or the computing again, that runs now."""
        noted = None if self.again is None else self.again()
        has_ended = noted is None and self.again is not None
        return self.backward == running_backward() and noted is again and not has_ended


class _Slot:
    """A plain object: where torch.compile breaks the graph it replays writes to one, and not to a threading.local.

    Attributes:
        call: The one that runs.
        num_videos: B, where it was given a video, (B, T, C, H, W) or (B, C, T, H, W).
        outer: call and num_videos of the calls that it runs inside of: hooks may call the model within its own pass.
    """

    call: _Call | None = None
    num_videos: int | None = None
    outer: tuple[tuple[_Call | None, int | None], ...] = ()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.slot = _Slot()


class Calls:
    """The calls through one patch embedding, and the layout of each.

    A forward pass reads what its own thread noted last. Gradient checkpointing computes parts of a pass again, when
    other images may have come through since: then it is the layout that was read when that checkpoint ran first.

    A copy of a whole model has Calls of its own. A copy of a part goes on with those of the model that it came from: of
    a block, which asks them, or of a patch embedding, which tells them. While a deepcopy runs no one knows which it
    will be, so that a copy is one of a part until it is asked and told.

    Args:
        num_prefix_tokens: P, class and register tokens that the model puts first.
        num_suffix_tokens: S, tokens that it puts last. The layouts have both first, S and then P.
    """

    def __init__(self, num_prefix_tokens: int, num_suffix_tokens: int = 0) -> None:
        self.__setstate__((num_prefix_tokens, num_suffix_tokens, None))

    def __getstate__(self) -> tuple[int, int, "Calls | None"]:
        """A model that comes out of a pickle is one of its own."""
        return self.num_prefix_tokens, self.num_suffix_tokens, None if self._origin is None else self._source()

    def __setstate__(self, state: tuple[int, int, "Calls | None"]) -> None:
        self.num_prefix_tokens, self.num_suffix_tokens, self._origin = state
        self._is_told = self._is_asked = False
        self._users: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._thread = _Thread()
        self._of_checkpoints: weakref.WeakKeyDictionary[Any, list[_Call]] = weakref.WeakKeyDictionary()
        _ALL.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calls":
        copied = Calls(self.num_prefix_tokens, self.num_suffix_tokens)
        copied._origin = self if self._origin is None else copy.deepcopy(self._source(), memo)
        return copied

    @property
    def num_unplaced_tokens(self) -> int:
        """P + S."""
        return self.num_prefix_tokens + self.num_suffix_tokens

    @property
    def are_needed(self) -> bool:
        """Whether anything asks them for the layout, a copy of a part included."""
        return any(calls._users for calls in list(_ALL) if calls._source() is self._source())

    def add_user(self, user: nn.Module) -> None:
        """It asks for the layout as long as it lives, or until remove_user: each AddedDecay enters itself."""
        self._users.add(user)
        self._mark(asked=True)

    def remove_user(self, user: nn.Module) -> None:
        """It asks no more: it has been restored."""
        self._users.discard(user)

    def add_patch_embed(self) -> None:
        """Say that a patch embedding tells what comes through."""
        self._mark(told=True)

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the part of the model that has both the patch embedding and its attention."""
        if is_jit_tracing():
            raise RuntimeError(
                "a swapped model must be exported with torch.export or torch.onnx.export(dynamo=True): torch.jit.trace "
                "would keep the layout of the image that it saw for images of every size."
            )
        slot = self._source()._thread.slot
        slot.outer = (*slot.outer, (slot.call, slot.num_videos))
        slot.call = slot.num_videos = None
        for given in (*args, *kwargs.values()):
            if isinstance(given, Tensor) and given.ndim == 5:
                slot.num_videos = given.shape[0]

    def leave(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        """Forward hook of the same part, which also runs where an error ends the pass."""
        slot = self._source()._thread.slot
        if slot.outer:
            slot.call, slot.num_videos = slot.outer[-1]
            slot.outer = slot.outer[:-1]

    def note(
        self,
        read: Callable[..., tuple[Layout, Tensor]],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any = None,
    ) -> None:
        """Forward hook of the patch embedding, or forward pre-hook of a model that is given where its tokens lie.

        read says what it gave, or got, see ReadLayout.
        """
        layout, tokens = read(module, args, kwargs, output, self.num_unplaced_tokens)
        slot = self._source()._thread.slot
        num_frames = None if slot.num_videos is None else tokens.shape[0] // slot.num_videos
        if tokens.ndim == 5:  # a convolution over frames, (B, D, T, H, W)
            num_frames = tokens.shape[2]
        slot.call = _Call(layout, num_frames, _again())

    def keep_only(self, indices: Tensor) -> None:
        """Of this call's patches only these are left, by number, (B, K), in this order."""
        slot, again = self._source()._thread.slot, _again()
        call = self._current(again)
        kept = call.layout.subset(indices, self.num_unplaced_tokens)
        slot.call = _Call(kept, call.num_frames, again, call.whole)

    def keep_all(self) -> None:
        """All patches of this call's image go on again, in their first order: a decoder has put the others back."""
        slot, again = self._source()._thread.slot, _again()
        call = self._current(again)
        slot.call = _Call(call.whole, call.num_frames, again)

    def put_in_front(self, num_tokens: int) -> None:
        """From here on so many more tokens, which lie nowhere, stand in front of the tokens of this call's image."""
        slot, again = self._source()._thread.slot, _again()
        call = slot.call
        if call is None or not (torch.compiler.is_compiling() or call.is_of(again)):
            return  # a checkpoint computes again, and knows the layout; or layout_of says what is wrong
        assert isinstance(call.whole, Grid)
        more = replace(call.whole, num_prefix_tokens=self.num_unplaced_tokens + num_tokens)
        slot.call = _Call(more, call.num_frames, again, call.whole)

    def num_patches(self) -> int:
        """How many patches the call that runs has."""
        return self._current(_again()).layout.num_tokens - self.num_unplaced_tokens

    def layout_of(self, x: Tensor, *, num_text_tokens: int = 0, is_over_space: bool = True) -> Layout:
        """The layout of tokens (B, L, D) that an attention of this call is given.

        Args:
            x: The tokens.
            num_text_tokens: How many of them are text before the others, which the layout may have or not.
            is_over_space: Whether that is known of this attention; else it might be over time.

        Raises:
            RuntimeError: no image has come through; L is not what came through; a video has L frames; or the forward
                pass of what gradient checkpointing computes again is not known.
        """
        if torch.compiler.is_compiling():
            call = self._current(None)
        else:
            around, again = running_checkpoints()
            call = self._known(again, x.shape[1], num_text_tokens) or self._current(again)
            for checkpoint in around:
                known = self._source()._of_checkpoints.setdefault(checkpoint, [])
                if not any(call.layout == other.layout for other in known):
                    known.append(call)
        if not self._fit(call, x.shape[1], num_text_tokens):
            raise RuntimeError(self._wrong_number(call.layout, x.shape[1], num_text_tokens))
        if not is_over_space and call.num_frames is not None and call.num_frames == x.shape[1]:
            raise RuntimeError(
                f"attention over space must be told from attention over time: the video has {call.num_frames} frames, "
                f"as many as an image has tokens, and attention got L = {x.shape[1]}. Pass swap_attention the numbers "
                "of the modules that attend over space as layers."
            )
        return call.layout if call.layout.num_tokens == x.shape[1] else call.layout.behind(num_text_tokens)

    def _source(self) -> "Calls":
        return self if self._origin is None else self._origin._source()

    def _mark(self, *, told: bool = False, asked: bool = False) -> None:
        self._is_told, self._is_asked, origin = self._is_told or told, self._is_asked or asked, self._origin
        if self._is_told and self._is_asked:
            self._origin = None
        if origin is not None:
            origin._mark(told=told, asked=asked)

    def _current(self, again: Any | None) -> _Call:
        call = self._source()._thread.slot.call
        if call is None or not (torch.compiler.is_compiling() or call.is_of(again)):
            raise RuntimeError(
                "no image has come through the patch embedding in this pass, so attention with decay does not know "
                "where its tokens lie. One of these helps:\n"
                "  call the model rather than its blocks;\n"
                "  pass swap_attention the name of the patch embedding that runs before them as patch_embed;\n"
                "  swap again where the patch embedding was replaced since;\n"
                "  compile the whole model rather than blocks inside gradient checkpointing;\n"
                "  checkpoint patch dropout together with the patch embedding;\n"
                "  pickle the whole model rather than a part."
            )
        return call

    def _known(self, again: Any | None, num_tokens: int, num_text_tokens: int) -> _Call | None:
        """What was read when the checkpoint that computes again ran first; None where the current call is meant."""
        source = self._source()
        noted = source._thread.slot.call
        if (again is None and running_backward() == -1) or (noted is not None and noted.is_of(again)):
            return None
        known = [] if again is None else source._of_checkpoints.get(again, [])
        fitting = [call for call in known if self._fit(call, num_tokens, num_text_tokens)]
        if len(fitting) != 1:
            layouts = [str(call.layout) for call in fitting]
            raise RuntimeError(
                "gradient checkpointing computes attention again, and must know the one image whose tokens these are: "
                f"got L = {num_tokens} tokens, and in the forward pass of this checkpoint "
                + (f"{len(fitting)} that differ, {', '.join(layouts)}. " if fitting else "no image of so many. ")
                + "Give each pass through the model a checkpoint of its own, with torch.utils.checkpoint.checkpoint, "
                "and compile the whole model rather than its blocks."
            )
        return fitting[0]

    def _fit(self, call: _Call, num_tokens: int, num_text_tokens: int) -> bool:
        """Whether so many tokens are those of the layout, or with so much text before them.

        A layout that has the text has no other token that lies nowhere: else prefix or suffix tokens that a user has
        named would pass for the text, in the wrong place.
        """
        more = num_tokens - call.layout.num_tokens
        return more == num_text_tokens or (more == 0 and self.num_unplaced_tokens == 0)

    def _wrong_number(self, layout: Layout, num_tokens: int, num_text_tokens: int) -> str:
        prefix, suffix, more = self.num_prefix_tokens, self.num_suffix_tokens, num_tokens - layout.num_tokens
        advice = f"{-more} fewer. Pass swap_attention the right num_prefix_tokens (now {prefix})"
        if suffix:
            advice += f" and num_suffix_tokens (now {suffix})"
        if num_text_tokens and self.num_unplaced_tokens:
            advice = (
                f"of which the first {num_text_tokens} are text that joins the image. It is known by itself, of any "
                f"length: leave out num_prefix_tokens (now {prefix}) and num_suffix_tokens (now {suffix})"
            )
        elif more > 0:
            advice = (
                f"{more} more. If they stand before the patches pass swap_attention num_prefix_tokens={prefix + more}, "
                f"if behind them num_suffix_tokens={suffix + more}"
            )
        elif prefix + more >= 0 and suffix == 0:
            advice = f"{-more} fewer. If the model has so few before the patches pass num_prefix_tokens={prefix + more}"
        return (
            f"the tokens must be those of the last patch embedding: it gave {layout}"
            + (f" ({suffix} of them behind the patches in the model)" if suffix else "")
            + f", and attention got L = {num_tokens} tokens, {advice}. Otherwise pass the name of the right patch "
            "embedding as patch_embed; attention over other tokens has to be left out, see layers."
        )


def _again() -> Any | None:
    return None if torch.compiler.is_compiling() else running_checkpoints()[1]


_ALL: weakref.WeakSet[Calls] = weakref.WeakSet()
"""Copies of parts are found here."""
