"""How ablation.py trains and tests a model: AdamW, one recipe for all, images on the device from the beginning."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from ablation_models import is_gate
from image_folder import Images, LabelledImages, resize

WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
TEST_BATCH = 100  # 784 tokens each at 112 pixels
GATES_RATE = 1e-2  # gates or norms alone: a few hundred weights, and they see few images
GATES_BATCH = 20
FURTHER_RATE = 0.25  # of the learning rate, for a model that is trained already
WARMUP = 0.1  # share of all steps
EAGER_STEPS = 3  # before one is recorded: kernels are compiled, tables are made


@dataclass(frozen=True)
class Phase:
    """How weights are trained that ask for it."""

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float = WEIGHT_DECAY  # a field, so that asdict has it for configurations


def prepare(pixels: Tensor, data: LabelledImages, size: int) -> Tensor:
    """(n, C, H, W), uint8 -> (n, C, size, size), of mean 0 and variance 1 over the training images."""
    mean, std = data.mean_std
    values = pixels.float() if pixels.shape[2] == size else resize(pixels, (size, size))
    return (values / 255 - mean) / std


def learning_rates(highest: float, steps: int) -> Tensor:
    """Of all steps, (steps,): up in a line for a tenth of them, then down in half a cosine."""
    done = (torch.arange(steps) + 0.5) / steps
    down = 0.5 + 0.5 * torch.cos((done - WARMUP).clamp(min=0) / (1 - WARMUP) * math.pi)
    return highest * torch.minimum(done / WARMUP, down)


def fit(
    model: nn.Module,
    data: LabelledImages,
    images: Images,
    phase: Phase,
    *,
    seed: int,
    size: int,
    after_batch: Callable[[int], object],
) -> float:
    """Train by AdamW. Order and flips depend on the seed alone.

    Args:
        model: Its parameters that require a gradient are trained.
        data: For mean and variance.
        images: To train on; those beyond the last whole batch of an epoch are left out of it.
        phase: How.
        seed: Of the order and the flips.
        size: Of the images.
        after_batch: Called with the number of images of each batch.

    Returns:
        Mean loss of the last epoch, in nats.
    """
    device, batch_size = images.pixels.device, min(phase.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    steps = phase.epochs * steps_per_epoch
    generator = torch.Generator().manual_seed(seed)
    epochs = [
        torch.randperm(len(images), generator=generator)[: steps_per_epoch * batch_size] for _ in range(phase.epochs)
    ]
    order = torch.cat(epochs).view(steps, batch_size).to(device)
    is_flipped = (torch.rand(steps, batch_size, generator=generator) < 0.5).to(device)
    rates = learning_rates(phase.learning_rate, steps).to(device)
    # All that changes from step to step is a tensor, for the graph.
    turn, rate, total = torch.zeros(1, dtype=torch.long, device=device), rates[0].clone(), rates.new_zeros(())
    # No weight decay on positions, nor on gates: there it pulls towards a stronger decay.
    kept = [name for name, _ in model.named_parameters() if name.endswith("pos_embed") or is_gate(name)]
    groups = param_groups_weight_decay(model, phase.weight_decay, no_weight_decay_list=kept)
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True, capturable=rate.is_cuda)

    def step() -> None:
        batch = order.index_select(0, turn)[0]
        pixels = images.pixels.index_select(0, batch)
        flip = is_flipped.index_select(0, turn)[0]
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        logits = model(prepare(pixels, data, size))
        loss = F.cross_entropy(logits, images.labels.index_select(0, batch), label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        rate.copy_(rates.index_select(0, turn)[0])
        optimizer.step()
        total.add_(loss.detach())
        turn.add_(1)

    model.train()
    call = step
    for done in range(steps):
        if done == EAGER_STEPS and device.type == "cuda":
            call = recorded(step)
        if done == steps - steps_per_epoch:
            total.zero_()
        call()
        after_batch(batch_size)
    return total.item() / steps_per_epoch


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """The step's kernels as a CUDA graph, which launches them at once: one by one, a GPU waits for Python to do so."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


@torch.no_grad()
def accuracy(
    model: nn.Module,
    data: LabelledImages,
    images: Images,
    *,
    size: int,
    model_size: int,
    after_batch: Callable[[int], object],
) -> float:
    """In percent, on images of a size; where the model takes another one, they are resized a second time."""
    model.eval()
    correct = torch.zeros((), dtype=torch.long, device=images.labels.device)
    for pixels, labels in zip(images.pixels.split(TEST_BATCH), images.labels.split(TEST_BATCH), strict=True):
        if model_size != size:
            pixels = resize(pixels, (size, size)).round().to(torch.uint8)
        correct += (model(prepare(pixels, data, model_size)).argmax(-1) == labels).sum()
        after_batch(len(labels))
    return 100 * correct.item() / len(images)
