"""torchvision's VisionTransformer."""

from torchvision.models.vision_transformer import VisionTransformer

from tests.swap.hosts.model import HostModel

HOSTS = [
    HostModel(
        "torchvision ViT",
        lambda: VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96),
        lambda model, x: model(x),
        1,
        sizes=((64, 64),),  # it takes no other
        has_checkpointing=False,
    ),
]
