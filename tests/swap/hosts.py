"""One table of other people's models. A new one adds a row here and inherits every check."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models.vision_transformer import VisionTransformer
from vit_pytorch import SimpleViT, ViT

from spatial_decay import kinds
from tests import references

STRONG = kinds.Full(gate_bias_init=0.0)  # no quiet start
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}


@dataclass(frozen=True)
class HostModel:
    """A model, how it is called, and what swap_attention should find in it."""

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    num_prefix_tokens: int
    channels: int = 3
    patch_size: int = 16
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 96))  # the first is what it is built for
    left: tuple[str, ...] = field(default=())
    num_suffix_tokens: int = 0
    is_copy: bool = False  # another row has the same code: what does not depend on the class is slow
    kept: Callable[[tuple[int, int]], torch.Tensor] | None = None  # numbers of the patches of a grid that go on, (B, K)
    has_checkpointing: bool = True
    text: dict[str, tuple[int, int]] = field(default_factory=dict)  # by module: text tokens before and behind its own
    prefix_of: dict[str, int] = field(default_factory=dict)  # by module, where num_prefix_tokens is another one
    has_norm: bool = False  # its attention begins with a norm, which the gates read behind

    def __str__(self) -> str:
        return self.name

    def make(self) -> nn.Module:
        """With lively weights: layer scales, biases and tokens begin at 0 or near it."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        return model

    def images(self, size: tuple[int, int], batch_size: int = 2) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.randn(batch_size, self.channels, *size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.patch_size, size[1] // self.patch_size


def traces(model: nn.Module) -> dict:
    """What a swap could leave on a model: classes, hooks, attributes and weights, by the names of its modules."""
    return {
        name: (
            type(module),
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_with_kwargs),
            set(vars(module)),
            [own for own, _ in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class InFloat64(TorchFunctionMode):
    """Attention written out in float64, with these masks added to its own; it knows nothing of swap_attention."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.multi_head_attention_forward:  # of nn.MultiheadAttention, which would hide its softmax
            return func(*args, **kwargs | {"attn_mask": self.mask.flatten(0, 1).float()})
        if func is F.softmax:  # written out
            return torch.softmax(args[0].double() + self.mask, -1).to(torch.float32)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (x.double() for x in (*args, *(kwargs or {}).values())[:3])
        scale = (kwargs or {}).get("scale") or q.shape[-1] ** -0.5
        own = (kwargs or {}).get("attn_mask")  # BEiT's bias
        mask = self.mask if own is None else self.mask + own.double()
        return (torch.softmax(scale * q @ k.mT + mask, -1) @ v).to(torch.float32)


def full_masks(
    gate: nn.Module, patches: torch.Tensor, size: tuple[int, int], kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 4-9 as loops for patches (B, K, D), all of a grid or those kept, and a gate with a bias, (B, N, K, K)."""
    if kept is not None:  # the others add nothing to these
        whole = patches.new_zeros(len(patches), size[0] * size[1], patches.shape[-1])
        patches = whole.scatter(1, kept[..., None].expand_as(patches), patches)
    masks = []
    for image in patches.tolist():
        of_heads = []
        for weight, bias in zip(gate.weight.tolist(), gate.bias.tolist(), strict=True):
            logits = [sum(a * b for a, b in zip(token, weight, strict=True)) + bias for token in image]
            of_heads.append(references.full([references.log_sigmoid(z) for z in logits], *size))
        masks.append(of_heads)
    found = torch.tensor(masks, dtype=torch.float64)
    if kept is None:
        return found
    return torch.stack([mask[:, numbers][:, :, numbers] for mask, numbers in zip(found, kept, strict=True)])


class OwnDiT(nn.Module):
    """As facebookresearch/DiT: its own blocks around timm's PatchEmbed, Attention and Mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = PatchEmbed(None, 2, 4, 48, strict_img_size=False)
        self.blocks = nn.ModuleList(OwnDiTBlock() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x)
        return x


class OwnDiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(48), nn.LayerNorm(48)
        self.attn, self.mlp = Attention(48, num_heads=3, qkv_bias=True), Mlp(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _timm(name: str, num_prefix_tokens: int, **options: Any) -> HostModel:
    sizes = options.pop("sizes", ((64, 64), (64, 96)))
    options = SMALL | {"num_classes": 10} | options
    return HostModel(
        f"timm {name}",
        lambda: timm.create_model(name, **options),
        lambda model, x: model(x),
        num_prefix_tokens,
        patch_size=options.get("patch_size", 16),
        sizes=sizes,
    )


def _transformers(name: str, num_prefix_tokens: int, model: str, config: str, **options: Any) -> HostModel:
    run = options.pop("run", {})
    more = {
        key: options.pop(key)
        for key in ("left", "num_suffix_tokens", "is_copy", "sizes", "prefix_of", "has_checkpointing")
        if key in options
    }
    return HostModel(
        f"transformers {name}",
        lambda: getattr(transformers, model)(getattr(transformers, config)(**HF | options)),
        lambda host, x: host(x, **run).last_hidden_state,
        num_prefix_tokens,
        **more,
    )


def _noise(num_patches: int) -> torch.Tensor:
    """Of MAE, for two images: the patches with the least go on."""
    return (torch.arange(2 * num_patches).view(2, -1) * 0.618).frac()


def _kept(grid: tuple[int, int]) -> torch.Tensor:
    num_patches = grid[0] * grid[1]
    return _noise(num_patches).argsort(1)[:, : num_patches // 2]


def _mae(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    noise = _noise(x.shape[-2] * x.shape[-1] // 256)
    return model(x, noise=noise, interpolate_pos_encoding=True).last_hidden_state


def _packed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of 16 x 16 of images, (B, L, 768), and the row and column of each, (L, 2)."""
    rows, columns = x.shape[-2] // 16, x.shape[-1] // 16
    patches = x.unflatten(3, (columns, 16)).unflatten(2, (rows, 16)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return patches, torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def _siglip2(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    patches, places = _packed(x)
    return model(
        patches,
        pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
        spatial_shapes=(places[-1] + 1).expand(len(x), 2),
    ).last_hidden_state


def _pix2struct(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    patches, places = _packed(x)
    return model(torch.cat([(places + 1).expand(len(x), -1, -1), patches], -1)).last_hidden_state


def _all(grid: tuple[int, int]) -> torch.Tensor:
    """For those that tell positions and no grid."""
    return torch.arange(grid[0] * grid[1]).expand(2, -1)


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**HF),
        text_config=transformers.LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=3, vocab_size=20
        ),
        image_token_index=7,
    )
    config.vision_feature_layer = -1  # else the last block is not read
    return transformers.LlavaForConditionalGeneration(config)


def _describe(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    words = torch.tensor([[1, *[7] * (x.shape[-2] * x.shape[-1] // 256), 2, 3]]).expand(len(x), -1)
    return model(input_ids=words, pixel_values=x).logits


def _dit(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(len(x))
    return model(x, timestep=steps, class_labels=steps).sample


def _pixart(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    given = {"resolution": None, "aspect_ratio": None}
    return model(x, encoder_hidden_states=_text(x), timestep=torch.arange(len(x)), added_cond_kwargs=given).sample


def _text(x: torch.Tensor, num_tokens: int = 5, width: int = 24) -> torch.Tensor:
    return torch.linspace(-1, 1, len(x) * num_tokens * width).view(len(x), num_tokens, width)


def _hunyuan(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(
        x,
        timestep=torch.arange(len(x)).float(),
        encoder_hidden_states=_text(x, 5),
        text_embedding_mask=torch.ones(len(x), 5),
        encoder_hidden_states_t5=_text(x, 4),
        text_embedding_mask_t5=torch.ones(len(x), 4),
    ).sample


def _sd3(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    pooled, steps = _text(x, 1)[:, 0], torch.arange(len(x))
    return model(x, encoder_hidden_states=_text(x), pooled_projections=pooled, timestep=steps).sample


def _flux(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Its pipelines make tokens of 2 x 2 latents and number them, and so must whoever trains it."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    tokens = x.unflatten(3, (w, 2)).unflatten(2, (h, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    ids = torch.cartesian_prod(*map(torch.arange, (1, h, w))).to(x.dtype)
    return model(
        tokens,
        encoder_hidden_states=_text(x),
        pooled_projections=_text(x, 1)[:, 0],
        timestep=torch.arange(len(x)) / 10,
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
    ).sample


def _every_patch(grid: tuple[int, int]) -> torch.Tensor:
    return torch.arange(grid[0] * grid[1]).expand(2, -1)


_LATENTS: dict[str, Any] = {"channels": 4, "patch_size": 2, "sizes": ((8, 8), (8, 12))}
_DIFFUSERS: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}
_JOINT = {"joint_attention_dim": 24, "pooled_projection_dim": 24}
_RESIZED = {"interpolate_pos_encoding": True}
_BIASED = {"use_absolute_position_embeddings": True, "use_relative_position_bias": True}
_BIASED |= {"use_shared_relative_position_bias": True}


def open_clip_model(cls: type[nn.Module] = open_clip.CLIP, text: Any = None, **vision: Any) -> nn.Module:
    """Of two towers."""
    given = {"image_size": (64, 96), "patch_size": 16, "width": 48, "head_width": 16, "layers": 2}
    given_text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
    return cls(24, vision_cfg=given | vision, text_cfg=given_text | (text or {}))


def _open_clip(name: str, **vision: Any) -> HostModel:
    return HostModel(
        f"open_clip {name}",
        lambda: open_clip_model(**vision),
        lambda model, x: model.encode_image(x),
        1,
        sizes=(vision.get("image_size", (64, 96)),),  # it takes no other
        left=("transformer.resblocks.0.attn", "transformer.resblocks.1.attn"),
        has_checkpointing="qk_norm" not in vision,  # open_clip hands its custom blocks too many arguments
    )


_VIT_PYTORCH = {"image_size": (64, 96), "patch_size": 16, "num_classes": 10, "dim": 48, "depth": 2, "heads": 3}
_VIT_PYTORCH |= {"dim_head": 16, "mlp_dim": 96}

HOSTS = [
    _timm("vit_tiny_patch16_224", 1, img_size=64, dynamic_img_size=True),
    _timm("deit_tiny_distilled_patch16_224", 2, img_size=64, sizes=((64, 64),)),
    _timm("vit_small_patch14_reg4_dinov2", 5, img_size=64, patch_size=16, dynamic_img_size=True),
    _timm("eva02_tiny_patch14_224", 1, img_size=64, patch_size=16, dynamic_img_size=True),
    _timm("vit_small_patch16_rope_224", 1, img_size=64, dynamic_img_size=True),
    _timm("vit_small_patch16_dinov3", 5, img_size=64, dynamic_img_size=True),
    _timm("naflexvit_base_patch16_gap", 4, reg_tokens=4),
    _transformers("ViT", 1, "ViTModel", "ViTConfig", run=_RESIZED),
    _transformers("DeiT", 2, "DeiTModel", "DeiTConfig", run=_RESIZED),
    _transformers("DINOv2", 1, "Dinov2Model", "Dinov2Config", mlp_ratio=2),
    _transformers(
        "DINOv2 with registers", 5, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=4
    ),
    _transformers("DINOv3", 5, "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
    _transformers("CLIP", 1, "CLIPVisionModel", "CLIPVisionConfig", run=_RESIZED),
    _transformers(
        "SigLIP", 0, "SiglipVisionModel", "SiglipVisionConfig", is_copy=True, run=_RESIZED, left=("head.attention",)
    ),
    HostModel(
        "transformers ViTMAE",
        lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**HF, mask_ratio=0.5)),
        _mae,
        1,
        kept=_kept,
    ),
    _transformers("BEiT", 1, "BeitModel", "BeitConfig", **_BIASED),
    _transformers("Data2VecVision", 1, "Data2VecVisionModel", "Data2VecVisionConfig", **_BIASED),
    _transformers("DPT", 1, "DPTModel", "DPTConfig", is_copy=True),
    _transformers(
        "YOLOS",
        1,
        "YolosModel",
        "YolosConfig",
        num_suffix_tokens=4,
        num_detection_tokens=4,
        image_size=[64, 64],
    ),
    _transformers("ViTMSN", 1, "ViTMSNModel", "ViTMSNConfig", is_copy=True, run=_RESIZED),
    _transformers("I-JEPA", 0, "IJepaModel", "IJepaConfig", is_copy=True, run=_RESIZED),
    HostModel(
        "transformers SigLIP 2",
        lambda: transformers.Siglip2VisionModel(
            transformers.Siglip2VisionConfig(**{key: HF[key] for key in HF if key != "image_size"}, num_patches=16)
        ),
        _siglip2,
        0,
        left=("head.attention",),
        kept=_all,
    ),
    HostModel(
        "transformers Pix2Struct",
        lambda: transformers.Pix2StructVisionModel(
            transformers.Pix2StructVisionConfig(
                hidden_size=48,
                d_kv=16,
                d_ff=96,
                num_hidden_layers=2,
                num_attention_heads=3,
                patch_embed_hidden_size=768,
                seq_len=32,
            )
        ),
        _pix2struct,
        0,
        kept=_all,
    ),
    *(
        _transformers(
            name,
            5,
            f"{cls}ForUniversalSegmentation",
            f"{cls}Config",
            num_blocks=1,
            num_queries=4,
            prefix_of={"layers.1.attention": 4 + 5},  # the queries come in before it
            has_checkpointing=False,
            num_register_tokens=4,
            sizes=((64, 64),),  # it takes no other
        )
        for name, cls in (("EoMT", "Eomt"), ("EoMT with DINOv3", "EomtDinov3"))
    ),
    HostModel(
        "transformers LLaVA",
        _llava,
        _describe,
        1,
        sizes=((64, 64),),  # it takes no other
        left=("model.language_model.layers.0.self_attn",),
        is_copy=True,
    ),
    HostModel(
        "torchvision ViT",
        lambda: VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96),
        lambda model, x: model(x),
        1,
        sizes=((64, 64),),  # it takes no other
        has_checkpointing=False,
    ),
    HostModel(
        "diffusers DiT",
        lambda: diffusers.DiTTransformer2DModel(num_embeds_ada_norm=10, **_DIFFUSERS),
        _dit,
        0,
        **_LATENTS | {"sizes": ((8, 8), (12, 12))},  # it folds its output into a square
    ),
    HostModel(
        "diffusers PixArt",
        lambda: diffusers.PixArtTransformer2DModel(
            cross_attention_dim=48, caption_channels=24, out_channels=8, use_additional_conditions=False, **_DIFFUSERS
        ),
        _pixart,
        0,
        left=("transformer_blocks.0.attn2", "transformer_blocks.1.attn2"),
        **_LATENTS,
    ),
    HostModel(
        "diffusers HunyuanDiT",
        lambda: diffusers.HunyuanDiT2DModel(
            hidden_size=48,
            cross_attention_dim=24,
            cross_attention_dim_t5=24,
            pooled_projection_dim=16,
            text_len=5,
            text_len_t5=4,
            use_style_cond_and_image_meta_size=False,
            **_DIFFUSERS,
        ),
        _hunyuan,
        0,
        left=("blocks.0.attn2", "blocks.1.attn2"),
        has_checkpointing=False,
        is_copy=True,
        **_LATENTS,
    ),
    HostModel(
        "diffusers Stable Diffusion 3",
        lambda: diffusers.SD3Transformer2DModel(**_DIFFUSERS, **_JOINT, caption_projection_dim=48),
        _sd3,
        0,
        text={"transformer_blocks.0.attn": (0, 5), "transformer_blocks.1.attn": (0, 5)},
        **_LATENTS,
    ),
    HostModel(
        "diffusers Stable Diffusion 3.5",  # its first blocks have a second attention, over the image alone
        lambda: diffusers.SD3Transformer2DModel(
            **_DIFFUSERS | {"num_layers": 1},
            **_JOINT,
            caption_projection_dim=48,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        _sd3,
        0,
        text={"transformer_blocks.0.attn": (0, 5)},
        **_LATENTS,
    ),
    HostModel(
        "diffusers Flux",  # its last blocks have text and image in one sequence
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=3,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            **_JOINT,
        ),
        _flux,
        0,
        text={"transformer_blocks.0.attn": (5, 0)},
        prefix_of={"single_transformer_blocks.0.attn": 5},
        kept=_every_patch,
        **_LATENTS,
    ),
    _open_clip("CLIP"),
    _open_clip("CLIP with custom blocks", image_size=(64, 64), qk_norm=True, scale_heads=True, scale_attn_inner=True),
    HostModel(
        "vit-pytorch ViT",
        lambda: ViT(**_VIT_PYTORCH),
        lambda model, x: model(x),
        1,
        sizes=((64, 96), (64, 64)),
        has_norm=True,
        has_checkpointing=False,
    ),
    HostModel(
        "vit-pytorch SimpleViT",
        lambda: SimpleViT(**_VIT_PYTORCH),
        lambda model, x: model(x),
        0,
        sizes=((64, 96),),  # it takes no other
        is_copy=True,
        has_norm=True,
        has_checkpointing=False,
    ),
    HostModel("a DiT of timm's layers", OwnDiT, lambda model, x: model(x), 0, has_checkpointing=False, **_LATENTS),
]
