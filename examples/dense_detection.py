"""Detection in composites: real frameworks on SDT-H, RMT and a ViT, trained in miniature.

    python examples/dense_detection.py --data data    # 3 seeds, an hour on one CPU core
    python examples/dense_detection.py --data data --images 64 --epochs 1 --seeds 1    # a first look

Faster R-CNN with a feature pyramid of torchvision, RT-DETR of transformers; and the linear head on raw patches of
dense_segmentation.py, whose connected regions of one class become boxes. AP is COCO's, by torchmetrics and
pycocotools. The table and a picture of predictions go to outputs/dense_detection/. Needs the extra [dense].
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import ndimage
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision import ops
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, TimmBackboneConfig

import dense_runs
import dense_segmentation
from dense_data import CLASSES, SIZE, Composites, normalised
from dense_models import CHANNELS, CONFIG, NAMES, Recipe, is_vit, maps, train
from dense_runs import Data, Key, Result, Task

FASTER, RT_DETR = "torchvision Faster R-CNN", "transformers RT-DETR"
WIDTH = 48  # channels of the pyramid
DETR_WIDTH = 64
NUM_QUERIES = 20
LOWEST_SCORE = 0.01
SHOWN_SCORE = 0.3
MIN_AREA = 30  # pixels of a region that becomes a box

Boxes = dict[str, Tensor]  # boxes (k, 4), x0, y0, x1, y1; scores (k,); labels (k,), in CLASSES


class Pyramid(nn.Module):
    """Four maps of a backbone, through torchvision's feature pyramid."""

    out_channels = WIDTH

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.body = maps(backbone)
        self.pyramid = ops.FeaturePyramidNetwork(list(CHANNELS), WIDTH)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, height, width) -> maps by name."""
        found: dict[str, Tensor] = self.pyramid({str(i): features for i, features in enumerate(self.body(images))})
        return found


class Faster(nn.Module):
    """Faster R-CNN, with few and small proposals."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        names = ["0", "1", "2", "3"]
        self.model = FasterRCNN(
            Pyramid(backbone),
            min_size=SIZE,
            max_size=SIZE,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            rpn_anchor_generator=AnchorGenerator(((10,), (16,), (24,), (36,)), ((0.5, 1.0, 2.0),) * 4),
            rpn_pre_nms_top_n_train=200,
            rpn_pre_nms_top_n_test=100,
            rpn_post_nms_top_n_train=100,
            rpn_post_nms_top_n_test=50,
            rpn_batch_size_per_image=64,
            box_roi_pool=ops.MultiScaleRoIAlign(names, 5, 2, canonical_scale=32),
            box_head=TwoMLPHead(WIDTH * 25, 96),
            box_predictor=FastRCNNPredictor(96, len(CLASSES)),
            box_batch_size_per_image=32,
            box_score_thresh=LOWEST_SCORE,
        )

    def loss(self, images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        targets = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]
        losses: dict[str, Tensor] = self.model(list(images / 255), targets)
        return torch.stack([*losses.values()]).sum()

    def predict(self, images: Tensor) -> list[Boxes]:
        found: list[Boxes] = self.model(list(images / 255))
        return found


class _Maps(nn.Module):
    """The last three maps of a pyramid in the form that transformers reads."""

    def __init__(self, pyramid: nn.Module) -> None:
        super().__init__()
        self.pyramid = pyramid

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(feature_maps=self.pyramid(images)[1:])


class RTDetr(nn.Module):
    """RT-DETR, small. Its encoder wants maps of strides 8, 16 and 32: of a ViT, a simple pyramid has them."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        name = NAMES["SDT-H"] if is_vit(backbone) else NAMES[backbone]
        channels = list(CHANNELS[1:])
        config = RTDetrConfig(
            backbone_config=TimmBackboneConfig(backbone=name, out_indices=[1, 2, 3]),
            freeze_backbone_batch_norms=False,  # they hold nothing yet
            encoder_in_channels=channels,
            encoder_hidden_dim=DETR_WIDTH,
            encoder_ffn_dim=2 * DETR_WIDTH,
            encoder_attention_heads=4,
            decoder_in_channels=[DETR_WIDTH] * 3,
            d_model=DETR_WIDTH,
            decoder_layers=2,
            decoder_ffn_dim=2 * DETR_WIDTH,
            decoder_attention_heads=4,
            num_queries=NUM_QUERIES,
            num_denoising=NUM_QUERIES,
            num_labels=len(CLASSES) - 1,  # without the background
            initializer_range=0.08,  # 0.01, its own, is for weights that are trained already
        )
        self.model = RTDetrForObjectDetection(config)
        if is_vit(backbone):
            self.model.model.backbone.model = _Maps(maps(backbone))

    def loss(self, images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        targets = [
            {"boxes": ops.box_convert(box / SIZE, "xyxy", "cxcywh"), "class_labels": label - 1}
            for box, label in zip(boxes, labels, strict=True)
        ]
        out: Tensor = self.model(normalised(images), labels=targets).loss
        return out

    def predict(self, images: Tensor) -> list[Boxes]:
        sizes = [tuple(images.shape[2:])] * len(images)
        found = RTDetrImageProcessor().post_process_object_detection(
            self.model(normalised(images)), threshold=LOWEST_SCORE, target_sizes=sizes
        )
        return [{**boxes, "labels": boxes["labels"] + 1} for boxes in found]


class RawRegions(dense_segmentation.RawPatches):
    """Connected pixels of one class become a box; its score is their mean probability."""

    def predict(self, images: Tensor) -> list[Boxes]:
        return [self._regions(probabilities) for probabilities in self(normalised(images)).softmax(1)]

    def _regions(self, probabilities: Tensor) -> Boxes:
        scores, classes = probabilities.max(0)
        found: list[tuple[list[int], float, int]] = []
        for label in range(1, len(CLASSES)):
            regions, _ = ndimage.label((classes == label).numpy())
            for number, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
                inside = torch.from_numpy(regions == number)
                if inside.sum() >= MIN_AREA:
                    box = [columns.start, rows.start, columns.stop, rows.stop]
                    found.append((box, scores[inside].mean().item(), label))
        return {
            "boxes": torch.tensor([box for box, _, _ in found]).float().view(-1, 4),
            "scores": torch.tensor([score for _, score, _ in found]),
            "labels": torch.tensor([label for _, _, label in found], dtype=torch.int64),
        }


BUILD: dict[str, Callable[[str], Any]] = {FASTER: Faster, RT_DETR: RTDetr}


def fit(key: Key, data: Data, recipe: Recipe, after_batch: Callable[[], object]) -> nn.Module:
    if key.framework == dense_runs.RAW:
        model = RawRegions()
        dense_segmentation.fit_model(model, key, data, recipe, after_batch)
        return model
    model = BUILD[key.framework](key.backbone)

    def loss(batch: Sequence[int]) -> Tensor:
        boxes, labels = ([of[i] for i in batch] for of in (data.train.boxes, data.train.labels))
        return model.loss(data.train.images[batch], boxes, labels)

    train(model, loss, recipe, seed=key.seed, after_batch=after_batch)
    return model


@torch.no_grad()
def predict(key: Key, model: Any, images: Tensor) -> list[Boxes]:
    return [boxes for batch in images.split(50) for boxes in model.predict(batch)]


def measure(key: Key, model: nn.Module, test: Composites) -> tuple[float, float]:
    """COCO's AP, the mean over overlaps of 0.5 to 0.95, and that at 0.5, in percent."""
    metric = MeanAveragePrecision()  # by pycocotools
    targets = [{"boxes": box, "labels": label} for box, label in zip(test.boxes, test.labels, strict=True)]
    metric.update(predict(key, model, test.images), targets)
    found = metric.compute()
    return 100 * found["map"].item(), 100 * found["map_50"].item()


def draw(test: Composites, predicted: Mapping[str, list[Boxes]]) -> Figure:
    """The first images with their boxes, and those that each model of seed 0 finds with a score of at least 0.3."""
    shown = zip(test.boxes[: dense_runs.NUM_SHOWN], test.labels, strict=False)
    known = [{"boxes": box, "labels": label, "scores": torch.ones(len(box))} for box, label in shown]
    columns = {"boxes": known, **predicted}
    figure = Figure((1.5 * len(columns) + 0.2, 1.5 * dense_runs.NUM_SHOWN + 1), layout="constrained")
    axes = figure.subplots(dense_runs.NUM_SHOWN, len(columns), squeeze=False)
    for column, (name, of_images) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=7)
        for ax, image, found in zip(axes[:, column], test.images, of_images, strict=False):
            ax.imshow(image.permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[])
            is_shown = found["scores"] >= SHOWN_SCORE
            for box, label in zip(found["boxes"][is_shown].tolist(), found["labels"][is_shown].tolist(), strict=True):
                ax.add_patch(_rectangle(box, label))
    handles = [Rectangle((0, 0), 1, 1, color=f"C{number}") for number in range(len(CLASSES) - 1)]
    figure.legend(handles, CLASSES[1:], loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def _rectangle(box: Sequence[float], label: int) -> Rectangle:
    x0, y0, x1, y1 = box
    colour = f"C{label - 1}"
    return Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, linewidth=1.5, edgecolor=colour)


TASK = Task(
    name="detection",
    recipe=Recipe(epochs=3),
    rows=dense_runs.dense_rows(FASTER, RT_DETR),
    config=CONFIG,
    libraries=("timm", "torchvision", "transformers", "torchmetrics", "pycocotools"),
    columns=("AP", "AP50"),
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
