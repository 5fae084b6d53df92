"""Semantic segmentation of composites: real frameworks on SDT-H, RMT and a ViT, trained in miniature.

    python examples/dense_segmentation.py --data data    # 3 seeds, an hour on one CPU core
    python examples/dense_segmentation.py --data data --images 64 --epochs 1 --seeds 1    # a first look

FPN and DPT of segmentation_models_pytorch, UperNet of transformers, each with its own way to read a ViT; and a linear
head on raw patches. mIoU is torchmetrics' Jaccard index over all pixels of the test images. The table and a picture of
predictions go to outputs/dense_segmentation/. Needs the extra [dense]; dense_data.py says where the data come from.
"""

from collections.abc import Callable, Mapping, Sequence

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from transformers import TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

import dense_runs
from dense_data import CLASSES, Composites, normalised
from dense_models import CONFIG, NAMES, Recipe, is_vit, swap, train
from dense_runs import Data, Key, Result, Task

NUM_CLASSES = len(CLASSES)
PATCH = 8
COLOURS = ListedColormap(["black", *(f"C{number}" for number in range(NUM_CLASSES - 1))])
SMP, UPERNET = "smp FPN, DPT", "transformers UperNet"


class RawPatches(nn.Module):
    """A linear map from the pixels of each 8 x 8 patch to the classes of the same pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3 * PATCH**2, NUM_CLASSES * PATCH**2, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> logits (B, classes, height, width)."""
        return F.pixel_shuffle(self.linear(F.pixel_unshuffle(images, PATCH)), PATCH)


def smp_model(backbone: str) -> nn.Module:
    """Of segmentation_models_pytorch: FPN on maps of four strides, DPT on those of a ViT."""
    name = f"tu-{NAMES[backbone]}"
    if not is_vit(backbone):
        sizes = {"decoder_pyramid_channels": 48, "decoder_segmentation_channels": 32}
        fpn: nn.Module = smp.FPN(name, encoder_weights=None, classes=NUM_CLASSES, **sizes)
        return fpn
    model = smp.DPT(
        name,
        encoder_weights=None,
        classes=NUM_CLASSES,
        decoder_readout="ignore",
        decoder_intermediate_channels=(32, 48, 64, 64),
        decoder_fusion_channels=32,
    )
    swap(backbone, model.encoder.model)
    dpt: nn.Module = model
    return dpt


def upernet(backbone: str) -> nn.Module:
    """Of transformers; the maps of a ViT all have its stride."""
    config = UperNetConfig(
        backbone_config=TimmBackboneConfig(backbone=NAMES[backbone], out_indices=[0, 1, 2, 3]),
        hidden_size=32,
        num_labels=NUM_CLASSES,
        use_auxiliary_head=False,
        initializer_range=0.08,  # 0.02, its own, is for weights that are trained already
    )
    model = UperNetForSemanticSegmentation(config)
    swap(backbone, model.backbone)
    return model


BUILD: dict[str, Callable[[str], nn.Module]] = {
    dense_runs.RAW: lambda _: RawPatches(),
    SMP: smp_model,
    UPERNET: upernet,
}


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, height, width), uint8 -> (B, classes, height, width)."""
    out = model(normalised(images))
    return out if isinstance(out, Tensor) else out.logits


def fit(key: Key, data: Data, recipe: Recipe, after_batch: Callable[[], object]) -> nn.Module:
    model = BUILD[key.framework](key.backbone)
    fit_model(model, key, data, recipe, after_batch)
    return model


def fit_model(model: nn.Module, key: Key, data: Data, recipe: Recipe, after_batch: Callable[[], object]) -> None:
    """Train a model that gives logits, or transformers' output with them."""

    def loss(batch: Sequence[int]) -> Tensor:
        return F.cross_entropy(logits(model, data.train.images[batch]), data.train.masks[batch])

    train(model, loss, recipe, seed=key.seed, after_batch=after_batch)


@torch.no_grad()
def predict(key: Key, model: nn.Module, images: Tensor) -> Tensor:
    """The class of each pixel."""
    return torch.cat([logits(model, batch).argmax(1) for batch in images.split(50)])


def measure(key: Key, model: nn.Module, test: Composites) -> tuple[float, float]:
    """MIoU and the accuracy of pixels, in percent, over all pixels of all images."""
    predicted = predict(key, model, test.images)
    metrics = MulticlassJaccardIndex(NUM_CLASSES), MulticlassAccuracy(NUM_CLASSES, average="micro")
    miou, accuracy = (100 * metric(predicted, test.masks).item() for metric in metrics)
    return miou, accuracy


def draw(test: Composites, predicted: Mapping[str, Tensor]) -> Figure:
    """The first images, their masks, and what each model of seed 0 makes of them."""
    columns = {"mask": test.masks, **predicted}
    figure = Figure((1.3 * (1 + len(columns)) + 1, 1.3 * dense_runs.NUM_SHOWN + 0.7), layout="constrained")
    axes = figure.subplots(dense_runs.NUM_SHOWN, 1 + len(columns))
    for row in range(dense_runs.NUM_SHOWN):
        axes[row, 0].imshow(test.images[row].permute(1, 2, 0).numpy())
        for ax, masks in zip(axes[row, 1:], columns.values(), strict=True):
            heat = ax.imshow(masks[row].numpy(), cmap=COLOURS, vmin=-0.5, vmax=NUM_CLASSES - 0.5)
    for ax, name in zip(axes[0], ("image", *columns), strict=True):
        ax.set_title(name, fontsize=7)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    bar = figure.colorbar(heat, ax=axes, ticks=range(NUM_CLASSES), fraction=0.02)
    bar.ax.set_yticklabels(CLASSES, fontsize=8)
    return figure


TASK = Task(
    name="segmentation",
    recipe=Recipe(epochs=4),
    rows=dense_runs.dense_rows(SMP, UPERNET),
    config=CONFIG,
    libraries=("timm", "segmentation-models-pytorch", "transformers", "torchmetrics"),
    columns=("mIoU", "accuracy of pixels"),
    fit=fit,
    measure=measure,
    predict=predict,
    draw=draw,
)


def main(argv: Sequence[str] | None = None) -> dict[Key, Result]:
    """Run the command line."""
    return dense_runs.main(TASK, argv)


if __name__ == "__main__":
    main()
