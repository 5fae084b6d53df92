"""Small models of the authors' own code: their config, weights, inputs and outputs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spatial_decay as sd


@dataclass(frozen=True)
class Golden:
    """config: the authors' names. state: their weights. arrays: io/x, io/y and so on."""

    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    arrays: dict[str, np.ndarray]


def read(name: str) -> Golden:
    found = np.load(Path(__file__).with_name(f"{name}.npz"))
    arrays = {key: found[key] for key in found.files}
    state = {key.removeprefix("state/"): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("state/")}
    return Golden(json.loads(str(arrays["config"])), state, arrays)


def make_rmt(golden: Golden, **options: Any) -> sd.SDTH:
    config = golden.config
    return sd.models.rmt_tiny(
        config["num_classes"],
        embed_dims=config["embed_dims"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        mlp_ratios=config["mlp_ratios"],
        decay=[
            {"kind": "fixed_decomposed" if decomposed else "fixed", "heads_range": heads_range}
            for decomposed, heads_range in zip(config["chunkwise_recurrents"], config["heads_ranges"], strict=True)
        ],
        projection_dim=config["projection"],
        **options,
    )


def make_locatvit(golden: Golden, **options: Any) -> sd.ViT:
    config = golden.config
    return sd.models.locatvit_tiny(
        config["num_classes"],
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        **options,
    )


def make_dit(golden: Golden, **options: Any) -> sd.SDTP:
    config = golden.config
    size = {"dim": config["hidden_size"], "depth": config["depth"], "num_heads": config["num_heads"]}
    return sd.SDTP(
        config["input_size"], config["patch_size"], config["in_channels"], config["num_classes"], **(size | options)
    )
