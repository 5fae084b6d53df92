"""vit-pytorch's ViT and SimpleViT."""

from vit_pytorch import SimpleViT, ViT

from tests.swap.hosts.model import HostModel

_VIT_PYTORCH = {"image_size": (64, 96), "patch_size": 16, "num_classes": 10, "dim": 48, "depth": 2, "heads": 3}
_VIT_PYTORCH |= {"dim_head": 16, "mlp_dim": 96}

HOSTS = [
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
]
