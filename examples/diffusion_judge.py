"""What judges the images of diffusion.py: a classifier of real ones, and the Fréchet distance between its features.

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)),    means m and covariances C of both sets of features

This is the formula of FID (Heusel et al. 2017, Eq. 6) with the penultimate features of a small classifier that is
trained here. FID has those of Inception, trained on ImageNet: a distance of this file cannot be compared with an FID.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

import ablation_training as training
from image_folder import Images, LabelledImages, checksum
from run_log import check_loss, write_whole

NUM_FEATURES = 64
PHASE = training.Phase(epochs=3, learning_rate=2e-3, batch_size=50)
BATCH = 500  # images without gradients


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and covariance (F, F) of features, float64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Score:
    """Of labelled images."""

    accuracy: float  # share that the classifier reads as their label, in percent
    distance: float  # Fréchet, to the training images


def fit_gaussian(features: Tensor) -> Gaussian:
    """Features (n, F) -> their mean and covariance; n >= 2."""
    features = features.double()
    return Gaussian(features.mean(0), torch.cov(features.T))


def frechet_distance(ours: Gaussian, theirs: Gaussian) -> float:
    """The squared 2-Wasserstein distance of two normal distributions, in float64.

    C_1 C_2 has the eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is symmetric: the trace of its root is the sum of
    their roots.
    """
    values, vectors = torch.linalg.eigh(ours.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ theirs.covariance @ root).clamp(min=0).sqrt().sum()
    spread = ours.covariance.trace() + theirs.covariance.trace() - 2 * product
    return ((ours.mean - theirs.mean).square().sum() + spread).item()


class Judge:
    """A classifier of real images.

    Args:
        data: What it has learned, and what is compared with.
        classifier: As build_classifier makes it.

    Attributes:
        fingerprint: Tells its weights from others.
    """

    def __init__(self, data: LabelledImages, classifier: nn.Sequential) -> None:
        self.data, self.classifier = data, classifier
        self.fingerprint = checksum(*classifier.state_dict().values())
        self.real = fit_gaussian(self._features(data.train))

    def score(self, images: Images) -> Score:
        """How much they look like their classes, and all together like the training images."""
        features = self._features(images)
        with torch.no_grad():
            is_right = self.classifier[-1](features).argmax(-1) == images.labels
        return Score(100 * is_right.double().mean().item(), frechet_distance(fit_gaussian(features), self.real))

    def references(self, count: int) -> dict[str, Score]:
        """What to hold scores against: so many real images held out, and worse and worse ones."""
        real = self.data.test.first(count)
        padded = F.pad(real.pixels.float(), (1, 1, 1, 1), mode="replicate")
        classes = torch.arange(self.data.num_classes)
        means = torch.stack(
            [self.data.train.pixels[self.data.train.labels == label].float().mean(0) for label in classes]
        )
        noise = torch.randint(256, real.pixels.shape, generator=torch.Generator().manual_seed(0))
        others = {
            "real, held out": real.pixels,
            "the same, mean of 3 x 3 pixels": F.avg_pool2d(padded, 3, stride=1),
            "for each its class's mean image": means[real.labels],
            "noise": noise,
        }
        return {name: self.score(Images(pixels.byte(), real.labels)) for name, pixels in others.items()}

    @torch.no_grad()
    def _features(self, images: Images) -> Tensor:
        """(n, NUM_FEATURES), what the classifier's last layer sees."""
        self.classifier.eval()
        size = images.pixels.shape[2]
        parts = images.pixels.split(BATCH)
        return torch.cat([self.classifier[:-1](training.prepare(part, self.data, size)) for part in parts])


def load(data: LabelledImages, folder: Path) -> Judge | None:
    """The judge of a log's folder, see run_log.py; None where none was trained."""
    path = classifier_path(folder)
    if not path.exists():
        return None
    classifier = build_classifier(data)
    classifier.load_state_dict(torch.load(path, weights_only=True))
    return Judge(data, classifier)


def load_or_train(data: LabelledImages, folder: Path) -> Judge:
    """The judge of a log's folder, trained the first time. Another process that trains it is waited for.

    Raises:
        TrainingError: the loss is not finite.
    """
    with FileLock(folder / "locks" / "classifier"):
        if judge := load(data, folder):
            return judge
        torch.manual_seed(0)
        classifier, size = build_classifier(data), data.train.pixels.shape[2]
        with tqdm(total=PHASE.epochs * len(data.train), desc="classifier", unit="image") as bar:
            loss = training.fit(classifier, data, data.train, PHASE, seed=0, size=size, after_batch=bar.update)
        check_loss("the classifier", loss)
        write_whole(classifier_path(folder), lambda part: torch.save(classifier.state_dict(), part))
    return Judge(data, classifier)


def classifier_path(folder: Path) -> Path:
    """Where its weights are kept."""
    return folder / "weights" / "classifier.pt"


def build_classifier(data: LabelledImages) -> nn.Sequential:
    """Two convolutions and two linear layers."""
    channels, size = data.train.pixels.shape[1:3]
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (size // 4) ** 2, NUM_FEATURES),
        nn.ReLU(),
        nn.Linear(NUM_FEATURES, data.num_classes),
    )
