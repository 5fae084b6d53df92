"""`python -m spatial_decay demo`: a photograph through a model of one's own, and how far each patch looks."""

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spatial_decay.command import CommandError
from spatial_decay.folders import reading
from spatial_decay.swap import load_swapped

__all__ = ["draw"]

_CONFIG, _SWAP, _PREPROCESSING = "config.json", "spatial_decay.json", "preprocessor_config.json"
_LAYERS = 4
_NEEDED = "a folder that save_swapped or spatial_decay.integrations.hub.save_pretrained has written"
_NO_PHOTOGRAPH = (
    "takes latents and a time step, no photograph. In Python, spatial_decay.viz.record takes any call of it."
)
# Of a model that says nothing of them: those of ImageNet, and a side that fits in the memory of any machine.
_MEAN, _STD, _SIDE, _MULTIPLE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 32


def draw(photo: Path, model_folder: Path | None, out: Path, layers: Sequence[int] | None = None) -> str:
    """Draw within how many grid steps half of each patch's attention lies, a row for each layer.

    Args:
        photo: An image file.
        model_folder: Of save_swapped (models of transformers) or of integrations.hub.
        out: The picture to write; its ending names the format.
        layers: Which to draw, by number. None: all, or of more than four the first, the last and two between.

    Returns:
        What was drawn, in a sentence.

    Raises:
        CommandError: the photograph or the folder cannot be used, a package is missing, or the picture cannot be
            written.
    """
    if model_folder is None:
        raise CommandError(f"--model is missing: {_NEEDED}. What a patch reaches is what a model was trained to.")
    if not out.absolute().parent.is_dir():
        raise CommandError(f"{out} cannot be written: there is no folder {out.parent}.")
    with _said_by_the_extra("viz"):
        viz = importlib.import_module("spatial_decay.viz")
        pillow = importlib.import_module("PIL.Image")
    with _in_one_line(f"{photo} cannot be read as an image"), pillow.open(photo) as image:
        picture = importlib.import_module("PIL.ImageOps").exif_transpose(image).convert("RGB")
    model, said = _load(model_folder)
    with _in_one_line(f"the model of {model_folder} cannot be run on a photograph"):
        images, shown = _prepared(picture, said)
        records = viz.record(model, images)
    drawn = _chosen(layers, len(records))
    named = [replace(records[i], name=f"layer {i}") for i in drawn]  # full names are longer than a row is high
    with _in_one_line(f"{out} cannot be written"):
        viz.plot_reach(named, shown).savefig(out)
    return (
        f"Wrote {out}: {type(model).__name__} of {model_folder}, {len(drawn)} of {len(records)} layers with decay: "
        f"{', '.join(f'{i} ({records[i].name})' for i in drawn)}."
    )


def _chosen(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count)) if count <= _LAYERS else [i * (count - 1) // (_LAYERS - 1) for i in range(_LAYERS)]
    if any(not 0 <= i < count for i in layers):
        raise CommandError(f"--layers must be numbers from 0 to {count - 1}: got {', '.join(map(str, layers))}.")
    return list(layers)


def _load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what config.json and preprocessor_config.json say, one dictionary."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise CommandError(f"--model {folder} is {what}. It must be {_NEEDED}.")
    with _in_one_line(f"--model {folder} cannot be read"), reading(folder, _CONFIG) as directory:
        is_swapped = (directory / _SWAP).is_file()
        texts = [(directory / name).read_text() for name in (_CONFIG, _PREPROCESSING) if (directory / name).is_file()]
        said: dict[str, Any] = {}
        for text in texts:
            said |= json.loads(text)
    if not is_swapped and not isinstance(said.get("config"), dict):
        raise CommandError(f"--model {folder} holds no model with decay: no {_SWAP}. It must be {_NEEDED}.")
    with _said_by_the_extra("hf"), _in_one_line(f"--model {folder} cannot be loaded"):
        if is_swapped:
            return load_swapped(_class_of_transformers(folder, said), folder).eval(), said
        if said.get("class") == "SDTP":
            raise CommandError(f"--model {folder} is of SDTP, which {_NO_PHOTOGRAPH}")
        hub = importlib.import_module("spatial_decay.integrations.hub")
        return hub.from_pretrained(folder), said | said["config"]


def _class_of_transformers(folder: Path, said: dict[str, Any]) -> type[nn.Module]:
    """The class that transformers' config.json names."""
    if "_class_name" in said:
        raise CommandError(f"--model {folder} is of diffusers' {said['_class_name']}, which {_NO_PHOTOGRAPH}")
    with _said_by_the_extra("hf"):
        transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = next(iter(said.get("architectures") or ()), None)
    model_class = getattr(transformers, str(name), None)
    if not isinstance(model_class, type) or not issubclass(model_class, nn.Module):
        raise CommandError(
            f"--model {folder} has a config.json whose architectures name no class of transformers: got {name!r}."
        )
    return model_class


def _prepared(picture: Any, said: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The photograph as the model takes it, and as it is to be shown: (1, C, height, width) each.

    The middle of it is cut out in the model's proportions. A model of no size of its own gets all of it, up to twice as
    long as it is wide: the shorter side as 224 pixels, the other to the nearest 32.
    """
    size = said.get("img_size", said.get("image_size"))
    if size is None:
        shorter = min(picture.size)
        width, height = (round(_SIDE * min(side / shorter, 2) / _MULTIPLE) * _MULTIPLE for side in picture.size)
    else:
        height, width = (size, size) if isinstance(size, int) else size
    image_ops = importlib.import_module("PIL.ImageOps")
    fitted = image_ops.fit(picture, (width, height))
    shown = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(height, width, 3)
    shown = shown.permute(2, 0, 1)[None] / 255
    channels = said.get("in_chans", said.get("num_channels", 3))
    if channels not in (1, 3):
        raise CommandError(f"the model takes {channels} channels; a photograph has 3, or 1 as grey.")
    images = shown if channels == 3 else shown.mean(1, keepdim=True)
    mean, std = (
        torch.tensor(said.get(name, default)) for name, default in (("image_mean", _MEAN), ("image_std", _STD))
    )
    mean, std = (x if len(x) == channels else x.mean(0, keepdim=True) for x in (mean, std))
    return (images - mean[:, None, None]) / std[:, None, None], shown


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Whatever a library raises over a user's file becomes one line; our own errors and missing packages stay."""
    try:
        yield
    except (CommandError, ImportError):
        raise
    except Exception as error:
        raise CommandError(f"{what}: {error or type(error).__name__}") from error


@contextmanager
def _said_by_the_extra(extra: str) -> Iterator[None]:
    """A missing package becomes a line that names the extra."""
    try:
        yield
    except ImportError as error:
        # Our own modules name the extra themselves.
        said = f'{error.name} is missing: pip install "spatial-decay[{extra}]"' if error.name else str(error)
        raise CommandError(said) from error
