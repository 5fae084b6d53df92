"""transformers: ViT and its copies, DINOv2 and DINOv3, the towers of CLIP and SigLIP, BEiT, MAE, DPT, YOLOS, EoMT."""

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from spatial_decay.layout import Positions
from spatial_decay.swap.calls import Calls
from spatial_decay.swap.hosts.base import Library, Removable
from spatial_decay.swap.hosts.register import register_attention
from spatial_decay.swap.stand_in import StandIn, named

__all__ = ["LIBRARY"]


class _Mask(StandIn):
    how_to_fuse = "attn_implementation='sdpa', without output_attentions"


class _Bias(_Mask):
    """A position bias: the library asks for it in one piece of memory, and Data2Vec adds it to one of its own."""

    def contiguous(self) -> Self:
        """It has none."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__iadd__", "add_", "iadd"):
            bias, mask = args
            mask.attn_mask = bias if mask.attn_mask is None else bias + mask.attn_mask
            return mask
        return super().__torch_function__(func, types, args, kwargs)


def _reason_against(attn: Any) -> str:
    chosen = attn.config._attn_implementation
    return "" if chosen == "sdpa" else f"it runs attn_implementation={chosen!r} (needs 'sdpa')"


def _reason_against_tower(attn: Any) -> str:
    """The towers of CLIP and SigLIP have one class of attention for images and text."""
    # A vocab_size says nothing: LLaVA and PaliGemma put their own into the config of the image tower.
    return _reason_against(attn) if hasattr(attn.config, "patch_size") else "it attends over text"


def _reason_against_bias(attn: Any) -> str:
    """Its forward takes no mask, and passes keywords on."""
    functions = sys.modules[type(attn).__module__].ALL_ATTENTION_FUNCTIONS
    if "position_bias" not in inspect.signature(functions["sdpa"]).parameters:
        return "no mask reaches its softmax; in a newer version of its library a position_bias does"
    return _reason_against(attn)


def _register(
    model: str,
    cls: str,
    num_prefix_tokens: Callable[[Any], int],
    *,
    query: str = "q_proj",
    mask: str = "attention_mask",
    reason_against: Callable[[Any], str] = _reason_against,
    num_suffix_tokens: Callable[[Any], int] | None = None,
    stand_in: type[StandIn] = _Mask,
) -> None:
    register_attention(
        f"transformers.models.{model}.{cls}",
        heads=lambda attn: attn.config.num_attention_heads,
        width=lambda attn: getattr(attn, query).in_features,
        channels=lambda attn: getattr(attn, query).out_features,
        mask=mask,
        reason_against=reason_against,
        num_prefix_tokens=num_prefix_tokens,
        num_suffix_tokens=num_suffix_tokens,
        stand_in=stand_in,
    )


def _class_and_registers(attn: Any) -> int:
    return 1 + int(attn.config.num_register_tokens)


_register("vit.modeling_vit", "ViTAttention", lambda _: 1)
_register("deit.modeling_deit", "DeiTAttention", lambda _: 2)
_register("dinov2.modeling_dinov2", "Dinov2Attention", lambda _: 1)
_register("dinov2_with_registers.modeling_dinov2_with_registers", "Dinov2WithRegistersAttention", _class_and_registers)
_register("dinov3_vit.modeling_dinov3_vit", "DINOv3ViTAttention", _class_and_registers)
_register("vit_msn.modeling_vit_msn", "ViTMSNAttention", lambda _: 1)
_register("vit_mae.modeling_vit_mae", "ViTMAEAttention", lambda _: 1)  # of the encoder and of the decoder
_register("ijepa.modeling_ijepa", "IJepaAttention", lambda _: 0)
_register("clip.modeling_clip", "CLIPAttention", lambda _: 1, reason_against=_reason_against_tower)
_register("siglip.modeling_siglip", "SiglipAttention", lambda _: 0, reason_against=_reason_against_tower)
# Their first num_queries tokens come in before the last blocks: see _hook_eomt.
_register("eomt.modeling_eomt", "EomtAttention", _class_and_registers)
_register("eomt_dinov3.modeling_eomt_dinov3", "EomtDinov3Attention", _class_and_registers)
# Packed patches with padding, whose positions come with them: see _read_siglip2 and _read_pix2struct.
_register("siglip2.modeling_siglip2", "Siglip2Attention", lambda _: 0, reason_against=_reason_against_tower)
_register("pix2struct.modeling_pix2struct", "Pix2StructVisionAttention", lambda _: 0, query="query")
# The relative position bias of BEiT's layers comes as the mask, Data2Vec's has an argument of its own.
_register("beit.modeling_beit", "BeitAttention", lambda _: 1)
_register(
    "data2vec.modeling_data2vec_vision",
    "Data2VecVisionSelfAttention",
    lambda _: 1,
    query="query",
    mask="relative_position_bias",
    stand_in=_Bias,
)
_register(
    "dpt.modeling_dpt",
    "DPTSelfAttention",
    lambda _: 1,
    query="query",
    mask="position_bias",
    reason_against=_reason_against_bias,
    stand_in=_Bias,
)
_register(
    "yolos.modeling_yolos",
    "YolosSelfAttention",
    lambda _: 1,
    query="query",
    mask="position_bias",
    reason_against=_reason_against_bias,
    num_suffix_tokens=lambda attn: attn.config.num_detection_tokens,
    stand_in=_Bias,
)


def _hook_mae(module: nn.Module, calls: Calls) -> Sequence[Removable]:
    """Its embeddings leave patches out, and put the others in another order."""
    return [module.register_forward_hook(partial(_note_kept, calls))]


def _note_kept(calls: Calls, _module: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, _, ids_restore = output  # (B, 1 + K, D), and where each patch lies in the order in which K came first
    calls.keep_only(ids_restore.argsort(1)[:, : tokens.shape[1] - 1])


def _hook_mae_decoder(module: nn.Module, calls: Calls) -> Sequence[Removable]:
    """It has all patches again, in the order of the image."""
    return [module.register_forward_pre_hook(partial(_note_all, calls))]


def _note_all(calls: Calls, _module: nn.Module, _args: Any) -> None:
    calls.keep_all()


def _hook_eomt(module: Any, calls: Calls) -> Sequence[Removable]:
    """It puts its queries in front of all tokens before the first of its last num_blocks blocks."""
    config, note = module.config, partial(_note_queries, calls, module.config.num_queries)
    first = config.num_hidden_layers - config.num_blocks
    return [block.register_forward_pre_hook(note) for i, block in enumerate(module.layers) if i == first]


def _note_queries(calls: Calls, num_queries: int, _module: nn.Module, _args: Any) -> None:
    calls.put_in_front(num_queries)


def _read_siglip2(
    _module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor, num_prefix_tokens: int
) -> tuple[Positions, Tensor]:
    """Of Siglip2VisionEmbeddings: the rows and columns of each image come in, (B, 2), padding behind its patches."""
    shapes = named(("pixel_values", "spatial_shapes"), args, kwargs)["spatial_shapes"].to(output.device)
    numbers, height, width = torch.arange(output.shape[1], device=output.device), shapes[:, :1], shapes[:, 1:]
    coordinates = torch.stack([numbers // width, numbers % width], -1)  # (B, L, 2)
    return Positions.of_coordinates(coordinates, numbers < height * width, num_prefix_tokens=num_prefix_tokens), output


def _read_pix2struct(
    _module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor, num_prefix_tokens: int
) -> tuple[Positions, Tensor]:
    """Of Pix2StructVisionEmbeddings: each patch begins with its row and column, from 1; those of padding are 0."""
    coordinates = named(("flattened_patches",), args, kwargs)["flattened_patches"][..., :2].long()  # (B, L, 2)
    is_patch = coordinates[..., 0] > 0
    return Positions.of_coordinates(coordinates, is_patch, num_prefix_tokens=num_prefix_tokens), output


LIBRARY = Library(
    patch_embeds={
        "transformers.models.siglip2.modeling_siglip2.Siglip2VisionEmbeddings": _read_siglip2,
        "transformers.models.pix2struct.modeling_pix2struct.Pix2StructVisionEmbeddings": _read_pix2struct,
    },
    dropouts={
        "transformers.models.vit_mae.modeling_vit_mae.ViTMAEEmbeddings": _hook_mae,
        "transformers.models.vit_mae.modeling_vit_mae.ViTMAEDecoder": _hook_mae_decoder,
    },
    insertions={
        "transformers.models.eomt.modeling_eomt.EomtForUniversalSegmentation": _hook_eomt,
        "transformers.models.eomt_dinov3.modeling_eomt_dinov3.EomtDinov3ForUniversalSegmentation": _hook_eomt,
    },
)
