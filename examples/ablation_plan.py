"""The runs of ablation.py: which there are, and in which order."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import ablation_models as models
import spatial_decay as sd
from ablation_log import Key
from ablation_models import STRUCTURE, Positions, Recipe, Variant
from spatial_decay.layers.kinds import DecayLike

Study: TypeAlias = Literal["tables", "sizes", "transfer"]

MECHANISMS = ("none", "fixed", "full", "1d", "bidirectional", "decomposed")  # Tables 3 and 4
SCALES = ("full, alpha 0.05", "full, alpha 0.15", "full, alpha 0.2")  # Table 5; 0.1 is `full`
RELATIVES = ("alibi", "learned", "squared", "gaussian")  # not the paper's
DECAYS_AT_SIZES: dict[Positions, tuple[str, ...]] = {
    "none": (
        *("none", "fixed", "full", "decomposed", STRUCTURE, "rows, columns: fixed"),
        *("alibi", "learned", "squared"),
    ),
    "learned": ("none", "fixed", "full", "decomposed", STRUCTURE, "rows, columns: fixed"),
    "rope": ("none", "fixed", "full", "decomposed"),
    "sincos": ("none", "fixed", "full", "decomposed"),
}
"""Positions -> decays that are tested at other sizes."""
LONGER = ("none", "full")  # trained twice as long too, to see whether that changes anything
TRAINING = "training"
GATES = "gates"
NORMS = "norms"
TRAINED_ALONE = {"full": GATES, "decomposed": GATES, "none": NORMS}
"""Decays -> what alone is trained at other sizes. Without gates it is the norms, about as many weights, to compare."""
REFERENCE = "reference grid"
RESIZED = "resized"
TWICE = "twice as long"
QUIET = sd.kinds.Full(gate_bias_init=6.0)  # as swap_attention begins in a trained model, with next to no decay
TRANSFERS: dict[str, DecayLike] = {
    "further": "none",
    "swap, all weights": QUIET,
    "swap, paper's gates": "full",
    "swap, gates": QUIET,
    "swap, gates and LoRA": QUIET,
}
"""How a trained model is trained further -> the decay that it has then."""
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8}


@dataclass(frozen=True)
class Run:
    """One trained model, and what is to be measured of it."""

    variant: Variant
    seed: int
    keys: tuple[Key, ...]

    @property
    def name(self) -> str:
        """For files and the progress bar."""
        parts = (self.variant.model, self.variant.positions, self.variant.decay, str(self.seed))
        return "-".join(part.translate(str.maketrans(" ", "_", ",:")) for part in parts if part)

    def key(self, after: str, size: int) -> Key:
        """Of something that is measured of it."""
        return Key(self.variant.model, self.variant.positions, self.variant.decay, self.seed, after, size)


def plan(studies: Sequence[Study], recipe: Recipe, *, seeds: int) -> list[Run]:
    """Runs in the order in which they are made: seed by seed, first the plain ViTs of Tables 3 and 4, the longest last.

    A model may occur more than once: its weights are kept, and it is trained the first time.
    """
    runs: list[Run] = []
    here, elsewhere = (recipe.size,), recipe.other_sizes

    def want(seed: int, variant: Variant, after: str, sizes: Sequence[int]) -> None:
        run = Run(variant, seed, ())
        runs.append(replace(run, keys=tuple(run.key(after, size) for size in sizes)))

    for seed in range(seeds):
        if "tables" in studies:
            for decay in MECHANISMS:
                want(seed, Variant("vit", "learned", decay), TRAINING, here)
        if "sizes" in studies:
            for positions, decays in DECAYS_AT_SIZES.items():
                for decay in decays:
                    variant = Variant("vit", positions, decay)
                    want(seed, variant, TRAINING, here + elsewhere)
                    if models.counts_steps(positions, decay):
                        want(seed, variant, REFERENCE, elsewhere)
                    if decay == "none":
                        want(seed, variant, RESIZED, elsewhere)
        if "tables" in studies:
            for decay in (*SCALES, *RELATIVES):
                want(seed, Variant("vit", "learned", decay), TRAINING, here)
            for decay in MECHANISMS:
                want(seed, Variant("sdt_h", "", decay), TRAINING, here)
        if "transfer" in studies:
            for arm in transfers():
                want(seed, Variant("vit", "learned", "none"), arm, here)
    for seed in range(seeds):
        if "sizes" in studies:
            for positions in DECAYS_AT_SIZES:
                for decay, after in TRAINED_ALONE.items():
                    want(seed, Variant("vit", positions, decay), after, elsewhere)
        if "tables" in studies:
            for decay in LONGER:
                want(seed, Variant("vit", "learned", decay), TWICE, here)
    return runs


def transfers() -> list[str]:
    """Those of TRANSFERS that can be made here: LoRA needs peft."""
    return [arm for arm in TRANSFERS if "LoRA" not in arm or importlib.util.find_spec("peft")]
