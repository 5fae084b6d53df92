"""A folder of latents with labels, and its batches, for train_sdt_p.py: shards mapped into memory, all checked first.

NAME.npy          latents (n, C, H, W), floating point; with NAME.labels.npy, labels (n,), whole numbers
NAME.safetensors  tensors `latents` and `labels`, the same

Shards are of any size, all latents of one shape. Files are never read whole.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class Shard:
    """One file of latents."""

    path: Path
    shape: tuple[int, ...]  # (n, C, H, W)
    labels: Tensor  # (n,)
    read: Callable[[int], Tensor]


class LatentFolder:
    """All shards of a folder, sorted by name, as one sequence.

    Attributes:
        shape: Of one latent, (C, H, W).
        labels: Of all latents, int64.

    Raises:
        ValueError: no shards, a file that is not whole, shapes that differ, labels missing, alone, out of range.
    """

    def __init__(self, folder: Path, num_classes: int) -> None:
        paths = sorted(path for path in folder.glob("*") if path.suffix in (".npy", ".safetensors"))
        labels = [path for path in paths if path.name.endswith(".labels.npy")]
        if alone := [path for path in labels if Path(f"{str(path)[:-11]}.npy") not in paths]:
            raise ValueError(
                f"{alone[0]} must stand beside its latents, NAME.npy: got none. Put them there, or remove it."
            )
        shards = [_open(path) for path in paths if path not in labels]
        if not shards:
            raise ValueError(
                f"{folder} must hold latents, NAME.npy with NAME.labels.npy or NAME.safetensors: got "
                f"{'none of these' if folder.is_dir() else 'no such folder'}. Pass another --latents."
            )
        for shard in shards:
            _check(shard, num_classes, like=shards[0])
        self._arguments = folder, num_classes
        self.shape = shards[0].shape[1:]
        self.labels = torch.cat([shard.labels.long() for shard in shards])
        self._shards = shards
        self._ends = np.cumsum([shard.shape[0] for shard in shards])

    def __reduce__(self) -> tuple[type, tuple[Path, int]]:
        """A copy in another process opens the files itself."""
        return LatentFolder, self._arguments

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        """One latent, (C, H, W), float32."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        place = index - int(self._ends[number]) + shard.shape[0]
        latent = shard.read(place).float()
        if not latent.isfinite().all():
            raise ValueError(f"latents must be finite: got nan or inf in latent {place} of {shard.path}. Leave it out.")
        return latent


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> Any:
    """A permutation of the samples."""
    return np.random.default_rng([0, seed, epoch]).permutation(num_samples)


@dataclass(frozen=True)
class Places(Dataset[tuple[Tensor, Tensor, int, int]]):
    """What stands at a place of the global batch of a step, the same whichever process or worker asks for it."""

    latents: LatentFolder
    arguments: argparse.Namespace

    def __getitem__(self, step_and_place: tuple[int, int]) -> tuple[Tensor, Tensor, int, int]:
        """Latent and noise (C, H, W), timestep and label."""
        step, place = step_and_place
        epoch, at = divmod(step * self.arguments.batch_size + place, len(self.latents))
        index = int(epoch_order(self.arguments.seed, epoch, len(self.latents))[at])
        random = np.random.default_rng([1, self.arguments.seed, step, place])
        timestep = int(random.integers(NUM_TIMESTEPS))
        is_dropped = random.random() < self.arguments.class_dropout_prob
        label = self.arguments.num_classes if is_dropped else int(self.latents.labels[index])
        noise = torch.from_numpy(random.standard_normal(self.latents.shape, dtype=np.float32))
        return self.latents[index], noise, timestep, label


def load_batches(
    latents: LatentFolder, arguments: argparse.Namespace, places: range, steps: range
) -> DataLoader[tuple[Tensor, Tensor, int, int]]:
    """These places of each step: latents and noise (B, C, H, W), timesteps and labels (B,)."""
    return DataLoader(
        Places(latents, arguments),
        batch_sampler=([(step, place) for place in places] for step in steps),
        num_workers=arguments.workers,
        pin_memory=torch.cuda.is_available(),
    )


def _open(path: Path) -> Shard:
    try:
        if path.suffix == ".npy":
            mapped = np.lib.format.open_memmap(path, mode="r")
            labels = torch.from_numpy(np.load(path.with_suffix(".labels.npy")))
            return Shard(path, mapped.shape, labels, lambda index: torch.from_numpy(mapped[index].copy()))
        file = safe_open(path, framework="pt")
        latents, labels = file.get_slice("latents"), file.get_tensor("labels")
        return Shard(path, tuple(latents.get_shape()), labels, lambda index: latents[index : index + 1][0])
    except Exception as error:  # each format has its own kinds
        raise ValueError(
            f"{path} cannot be read: {error}. It must be whole, and have its labels: in NAME.labels.npy beside "
            "NAME.npy, or as the tensor `labels` beside `latents` in NAME.safetensors. Write it again."
        ) from error


def _check(shard: Shard, num_classes: int, like: Shard) -> None:
    path, shape, labels = shard.path, shard.shape, shard.labels
    dtype = shard.read(0).dtype if len(shape) > 1 and min(shape) else None
    if len(shape) != 4 or dtype is None or not dtype.is_floating_point:
        raise ValueError(
            f"latents must be (n, C, H, W), none of them 0, floating point: got {shape}, {dtype} in {path}. "
            "Write them again, or take the file away."
        )
    if shape[1:] != like.shape[1:]:
        raise ValueError(
            f"all latents must have one shape (C, H, W): got {like.shape[1:]} in {like.path}, {shape[1:]} in {path}. "
            "Train on those of one shape alone."
        )
    if labels.shape != shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be whole numbers, one a latent, ({shape[0]},): got {tuple(labels.shape)}, {labels.dtype} "
            f"for {path}. Write them again."
        )
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"labels must be 0 .. {num_classes - 1}: got {int(labels.min())} .. {int(labels.max())} for {path}. "
            "Pass the right --num-classes, or write them again."
        )
