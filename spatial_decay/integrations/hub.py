"""Folders and repositories of Hugging Face's Hub: save_pretrained, from_pretrained and push_to_hub for the backbones.

A folder holds config.json (the class and the arguments that rebuild it), model.safetensors and a README.md. It is
written whole or not at all, and config.json has hashes, its own and that of the weights. The extra `hf` brings what
this needs: pip install spatial-decay[hf].
"""

import json
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from typing_extensions import Self

import spatial_decay
from spatial_decay import models
from spatial_decay.checkpoint import load_checkpoint
from spatial_decay.folders import check_signed, reading, signed, writing
from spatial_decay.models.common import Model
from spatial_decay.models.registry import ENTRIES

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
    from safetensors.torch import save_model
except ImportError as error:
    raise ImportError(
        "spatial_decay.integrations.hub needs huggingface_hub and safetensors: pip install spatial-decay[hf]."
    ) from error

__all__ = ["SDTH", "SDTP", "ViT", "from_pretrained", "save_pretrained"]

_CONFIG, _WEIGHTS, _README = "config.json", "model.safetensors", "README.md"


class Download(TypedDict):
    """How huggingface_hub downloads."""

    force_download: bool
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    revision: str | None


class _Pretrained(PyTorchModelHubMixin, Model, library_name="spatial-decay"):
    """The mixin, with a config that holds the class, and with weights that fit or are not loaded at all."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Write config.json, model.safetensors and, where there is none, README.md: all of them or nothing.

        Args:
            save_directory: Folder; made where it is missing. Killed at any moment, it holds the old or the new model.
            push_to_hub: Then put it on the Hub.
            repo_id: Where to; None: the name of the folder.
            model_card_kwargs: Of huggingface_hub, what the README says.
            options: Of huggingface_hub's push_to_hub. Its config is not one of them: the model has its own.

        Returns:
            With push_to_hub, the address of the commit.

        Raises:
            ValueError: the weights are not those of the model's config, so that nobody could load them.
            OSError: the folder cannot be written; it is as it was.
        """
        _check_config(self)
        folder = Path(save_directory)
        with writing(folder) as part:
            super().save_pretrained(part, model_card_kwargs=model_card_kwargs)
            if (folder / _README).exists():
                (part / _README).unlink()
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Rebuild a model from its config and load its weights, in float32; in evaluation mode, as from any mixin.

        Args:
            pretrained_model_name_or_path: A folder, or the name of a repository on the Hub.
            map_location: Device of the model.
            strict: Model and weights must have the same names and shapes. False loads what fits.
            force_download: Of huggingface_hub, here and below: download again.
            token: For private repositories.
            cache_dir: Where downloads are kept.
            local_files_only: Download nothing.
            revision: Branch, tag or commit.
            overrides: In place of the config's values, for instance backend or num_classes (with strict=False).

        Returns:
            A model of this class.

        Raises:
            FileNotFoundError: a folder without config.json or model.safetensors.
            ValueError: a config.json that cannot be read or is another class's; a value in it that cannot be; config
                and weights that were not saved together, or are damaged; weights that cannot be read or do not fit.
                Nothing is half-loaded: there is no model then.
            OSError: another process saves to the folder meanwhile.
        """
        download = Download(
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        with _opened(pretrained_model_name_or_path) as source:
            path = _file(source, _CONFIG, download)
            found = _read_config(path)
            name = found["class"]
            if name != cls.__name__:
                raise ValueError(
                    f"{path} must be of an {cls.__name__}: got one of an {name}. Use {name}.from_pretrained, or "
                    "hub.from_pretrained, which takes the class that the config names."
                )
            weights = _file(source, _WEIGHTS, download)
            check_signed(found, str(path), {_WEIGHTS: weights})
            try:
                model = cls(**(found["config"] | overrides))
            except (TypeError, ValueError) as error:
                given = ", ".join(overrides) or "none"
                raise ValueError(
                    f"{path} and the overrides ({given}) must hold arguments of {name}: {error}"
                ) from error
            load_checkpoint(model, weights, strict=strict)
        return model.to(map_location).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by the mixin, which leaves a config.json that it finds as it is."""
        save_model(self, str(save_directory / _WEIGHTS))
        config = {"class": type(self).__name__, "config": self.config, "spatial_decay": spatial_decay.__version__}
        config = signed(config, [save_directory / _WEIGHTS])
        (save_directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class SDTH(_Pretrained, models.SDTH, pipeline_tag="image-classification", tags=["arxiv:2508.09525"]):
    """spatial_decay.SDTH with save_pretrained, from_pretrained and push_to_hub."""


class SDTP(_Pretrained, models.SDTP, tags=["arxiv:2508.09525"]):
    """spatial_decay.SDTP with save_pretrained, from_pretrained and push_to_hub."""


class ViT(_Pretrained, models.ViT, pipeline_tag="image-classification"):
    """spatial_decay.ViT with save_pretrained, from_pretrained and push_to_hub."""


def _with_hub(model: type[Model]) -> type[SDTH] | type[SDTP] | type[ViT]:
    """The class of this name here; for a backbone that none above is made for, a new one."""
    made = globals().get(model.__name__)
    if made is None:
        made = type(model.__name__, (_Pretrained, model), {"__module__": __name__, "__doc__": model.__doc__})
        globals()[model.__name__] = made
    return cast("type[SDTH] | type[SDTP] | type[ViT]", made)


_MODELS = {entry.model.__name__: entry.model for entry in ENTRIES.values()}
_CLASSES = {name: _with_hub(model) for name, model in sorted(_MODELS.items())}


def save_pretrained(model: Model, save_directory: str | os.PathLike[str], **options: Any) -> str | None:
    """Save any backbone, the plain ones of sd.sdt_h_tiny() and the like too.

    Args:
        model: An SDTH, SDTP or ViT, spatial_decay's or this module's.
        save_directory: Folder; made where it is missing.
        options: As in SDTH.save_pretrained, for instance push_to_hub=True, repo_id="you/name".

    Returns:
        With push_to_hub, the address of the commit.

    Raises:
        TypeError: another class of model.
        ValueError: the weights are not those of the model's config.

    Examples:
        >>> import tempfile
        >>> from spatial_decay.integrations import hub
        >>> folder = tempfile.mkdtemp()
        >>> sizes = {"img_size": 32, "dim": 48, "depth": 2, "num_heads": 3}
        >>> hub.save_pretrained(ViT(10, **sizes, decay="full"), folder)
        >>> model = hub.from_pretrained(folder)
        >>> type(model).__name__, model.config["decay"]["kind"]
        ('ViT', 'full')
    """
    if isinstance(model, _Pretrained):
        return model.save_pretrained(save_directory, **options)
    name = type(model).__name__
    if type(model) is not _MODELS.get(name):
        raise TypeError(
            f"model must be one of {', '.join(_CLASSES)}: got {type(model).__module__}.{name}. Pass the backbone "
            "itself, without what torch.compile or DistributedDataParallel put around it."
        )
    _check_config(model)
    with torch.device("meta"):
        same = _CLASSES[name](**model.config)
    same.load_state_dict(model.state_dict(), assign=True)  # the tensors themselves, not copies
    return same.save_pretrained(save_directory, **options)


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    map_location: str | torch.device = "cpu",
    strict: bool = True,
    force_download: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    **overrides: Any,
) -> SDTH | SDTP | ViT:
    """The model of a folder or of a repository on the Hub, of the class that its config names.

    Args:
        source: A folder, or the name of a repository.
        map_location: As in SDTH.from_pretrained, here and below.
        strict: The same.
        force_download: The same.
        token: The same.
        cache_dir: The same.
        local_files_only: The same.
        revision: The same.
        overrides: The same.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: as in SDTH.from_pretrained.
    """
    download = Download(
        force_download=force_download,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        revision=revision,
    )
    with _opened(source) as directory:
        name = _read_config(_file(directory, _CONFIG, download))["class"]
    return _CLASSES[name].from_pretrained(source, map_location=map_location, strict=strict, **download, **overrides)


def _opened(source: str | os.PathLike[str]) -> AbstractContextManager[str | os.PathLike[str]]:
    """Where the valid files of a folder lie; the name of a repository is itself."""
    return reading(source, _CONFIG) if os.path.isdir(source) else nullcontext(source)


def _file(source: str | os.PathLike[str], name: str, download: Download) -> Path:
    """Where a file of a folder lies, or of a repository once it is downloaded."""
    if not os.path.isdir(source):
        return Path(hf_hub_download(os.fspath(source), name, **download))
    path = Path(source) / name
    if not path.is_file():
        found = ", ".join(sorted(os.listdir(source))) or "nothing"
        raise FileNotFoundError(f"{source} must hold {_CONFIG} and {_WEIGHTS}: {name} is missing, it holds {found}.")
    return path


def _read_config(path: Path) -> dict[str, Any]:
    """What config.json holds, with a class that is known and its arguments."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of decoding, of JSON
        raise ValueError(f"{path} must be JSON: {error}. Save the model again.") from error
    name, config = (found.get("class"), found.get("config")) if isinstance(found, dict) else (None, None)
    if not isinstance(name, str) or name not in _CLASSES or not isinstance(config, dict):
        raise ValueError(
            f'{path} must hold "class" (one of {", ".join(_CLASSES)}) and "config" (its arguments): got class {name!r} '
            f"and config {type(config).__name__}. Models of other libraries load with those libraries."
        )
    return cast("dict[str, Any]", found)


def _check_config(model: Model) -> None:
    """Raise where the config would not rebuild this model."""
    with torch.device("meta"):
        rebuilt = type(model)(**model.config)
    wanted, got = ({name: tuple(x.shape) for name, x in m.state_dict().items()} for m in (rebuilt, model))
    if wanted != got:
        names = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
        raise ValueError(
            "the weights must be those of the model's config, or nobody can load them: different are "
            + ", ".join(f"{name} (config {wanted.get(name)}, model {got.get(name)})" for name in names[:5])
            + f"{' and others' * (len(names) > 5)}. Use reset_classifier for another head; else build the model anew."
        )
