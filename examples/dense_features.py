"""Train small ViTs to name the one piece of a composite, freeze them, and fit a linear head that labels their patches.

    python examples/dense_features.py --data data    # 5 variants, 3 seeds each, ten minutes on one CPU core
    python examples/dense_features.py --data data --images 64 --epochs 1 --seeds 1    # a first look

LocAtViT's question (Hajimiri et al. 2026) in miniature: do a Gaussian around each query, and Patch Representation
Refinement (PRR) before the class token is read, make a classifier's patch features better for dense prediction?

The head says of each patch which class it shows: background where less than half of its pixels belong to the piece. The
table and a picture go to outputs/dense_features/. Needs the extra [dense]; dense_data.py says where the data come from.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

import dense_runs
from dense_data import CLASSES, SIZE, Composites, normalised
from dense_models import Recipe, train
from dense_runs import Data, Key, Result, Task
from dense_segmentation import draw
from spatial_decay import ViT
from spatial_decay.models.vit import ViTOptions

PATCH = 8
LABEL_SMOOTHING = 0.1

SMALL: ViTOptions = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "dim": 48,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2,
}

VARIANTS: dict[str, ViTOptions] = {
    "plain ViT": {"decay": "none", "global_pool": "token"},
    "ViT + Gaussian": {"decay": "gaussian", "global_pool": "token"},
    "ViT + PRR": {"decay": "none", "global_pool": "prr"},
    "LocAtViT (both)": {"decay": "gaussian", "global_pool": "prr"},
    "SDT (full)": {"decay": "full", "global_pool": "token"},
}
"""What differs; the recipe is the same for all."""

FROZEN = "frozen classifier"


def patch_masks(masks: Tensor) -> Tensor:
    """The class of each patch, (n, 8, 8), from that of each pixel, (n, 64, 64), with one piece an image."""
    share = F.avg_pool2d((masks > 0).float(), PATCH)
    return torch.where(share >= 0.5, masks.flatten(1).amax(1)[:, None, None], 0)


class LinearHead(nn.Module):
    """A linear head on the patch features of a frozen model, or on raw patches without one."""

    def __init__(self, model: ViT | None) -> None:
        super().__init__()
        self.model = model
        self.head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (n, 3, 64, 64), uint8 -> (n, D, 8, 8)."""
        values = normalised(images)
        if self.model is None:
            return F.pixel_unshuffle(values, PATCH)
        return torch.cat([self.model.forward_maps(batch) for batch in values.split(50)])

    def fit(self, images: Tensor, masks: Tensor) -> None:
        """On masks (n, 8, 8)."""
        self.head.fit(_rows(self.features(images)), masks.flatten().numpy())

    def predict(self, images: Tensor) -> Tensor:
        """(n, 8, 8)."""
        features = self.features(images)
        return torch.as_tensor(self.head.predict(_rows(features))).view(-1, *features.shape[2:])


def _rows(features: Tensor) -> Any:
    """(n, D, H, W) -> a row for each patch, (n * H * W, D)."""
    return features.movedim(1, -1).flatten(0, 2).numpy()


def names(data: Composites) -> Tensor:
    """The class of the one piece of each image, from 0 on."""
    return torch.cat(data.labels) - 1


def train_classifier(
    options: ViTOptions,
    data: Composites,
    recipe: Recipe,
    *,
    seed: int,
    after_batch: Callable[[], object] = lambda: None,
) -> ViT:
    """A ViT that has seen the pieces' names, never a mask; frozen."""
    model = ViT(len(CLASSES) - 1, 3, **(SMALL | options))
    nn.init.normal_(model.pos_embed, std=0.3)  # the usual 0.02 is lost in these patches for longer than we train
    labels = names(data)

    def loss(batch: Sequence[int]) -> Tensor:
        return F.cross_entropy(model(normalised(data.images[batch])), labels[batch], label_smoothing=LABEL_SMOOTHING)

    train(model, loss, recipe, seed=seed, after_batch=after_batch)
    return model.requires_grad_(requires_grad=False)


def fit(key: Key, data: Data, recipe: Recipe, after_batch: Callable[[], object]) -> LinearHead:
    model = None
    if key.framework == FROZEN:
        options = VARIANTS[key.backbone]
        model = train_classifier(options, data.train, recipe, seed=key.seed, after_batch=after_batch)
    head = LinearHead(model)
    head.fit(data.train.images, patch_masks(data.train.masks))
    return head


def predict(key: Key, model: Any, images: Tensor) -> Tensor:
    """The class of each patch."""
    return model.predict(images)


@torch.no_grad()
def measure(key: Key, model: Any, test: Composites) -> tuple[float, float]:
    """MIoU over all patches of all images, and how often the classifier has the name; in percent."""
    miou = MulticlassJaccardIndex(len(CLASSES))(model.predict(test.images), patch_masks(test.masks))
    if model.model is None:
        return 100 * miou.item(), math.nan
    is_right = model.model(normalised(test.images)).argmax(-1) == names(test)
    return 100 * miou.item(), 100 * is_right.float().mean().item()


TASK = Task(
    name="features",
    recipe=Recipe(images=2000, epochs=8, batch_size=16, learning_rate=2e-3),
    rows=((dense_runs.RAW, "raw patches"), *((FROZEN, name) for name in VARIANTS)),
    config={"ViT": SMALL, "variants": VARIANTS},
    libraries=("scikit-learn", "torchmetrics"),
    columns=("mIoU of patches", "accuracy of the classifier"),
    fit=fit,
    measure=measure,
    predict=predict,
    draw=draw,
    composites={"num_pieces": (1, 1), "sides": (44, 62)},  # from smaller pieces it learns no names in this time
)


def main(argv: Sequence[str] | None = None) -> dict[Key, Result]:
    """Run the command line."""
    return dense_runs.main(TASK, argv)


if __name__ == "__main__":
    main()
