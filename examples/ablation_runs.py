"""The runs of ablation.py: which there are, in which order, and how each is trained and measured."""

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import nn

import ablation_models as models
import ablation_training as training
import spatial_decay as sd
from ablation_log import Key, LogError, Result, RunLog
from ablation_models import STRUCTURE, Positions, Recipe, Variant
from ablation_training import Phase
from image_folder import Images, LabelledImages
from run_log import check_loss, stamp, write_whole
from spatial_decay.layers.kinds import DecayLike

Model: TypeAlias = Literal["vit", "sdt_h"]
Study: TypeAlias = Literal["tables", "sizes", "transfer"]

MECHANISMS = ("none", "fixed", "full", "1d", "bidirectional", "decomposed")  # Tables 3 and 4
SCALES = ("full, alpha 0.05", "full, alpha 0.15", "full, alpha 0.2")  # Table 5; 0.1 is `full`
RELATIVES = ("alibi", "learned", "squared", "gaussian")  # not the paper's
SPREAD: dict[Positions, tuple[str, ...]] = {
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
GATES = "gates"
NORMS = "norms"
TUNED = {"full": GATES, "decomposed": GATES, "none": NORMS}
"""Decays -> what alone is trained at other sizes. Without gates it is the norms, about as many weights, to compare."""
REFERENCE = "reference grid"
RESIZED = "resized"
TWICE = "twice as long"
QUIET = sd.kinds.Full(gate_bias_init=6.0)  # as swap_attention begins in a trained model, with next to no decay
TRANSFERS: dict[str, DecayLike] = {
    "further": "none",
    "swap, all weights": QUIET,
    "swap, open gates": "full",
    "swap, gates": QUIET,
    "swap, gates and LoRA": QUIET,
}
"""How a trained model is trained further -> the decay that it has then."""
LORA_RANK = 4


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
                want(seed, Variant("vit", "learned", decay), "training", here)
        if "sizes" in studies:
            for positions, decays in SPREAD.items():
                for decay in decays:
                    variant = Variant("vit", positions, decay)
                    want(seed, variant, "training", here + elsewhere)
                    if models.counts_steps(positions, decay):
                        want(seed, variant, REFERENCE, elsewhere)
                    if decay == "none":
                        want(seed, variant, RESIZED, elsewhere)
        if "tables" in studies:
            for decay in (*SCALES, *RELATIVES):
                want(seed, Variant("vit", "learned", decay), "training", here)
            for decay in MECHANISMS:
                want(seed, Variant("sdt_h", "", decay), "training", here)
        if "transfer" in studies:
            for arm in transfers():
                want(seed, Variant("vit", "learned", "none"), arm, here)
    for seed in range(seeds):
        if "sizes" in studies:
            for positions in SPREAD:
                for decay, after in TUNED.items():
                    want(seed, Variant("vit", positions, decay), after, elsewhere)
        if "tables" in studies:
            for decay in LONGER:
                want(seed, Variant("vit", "learned", decay), TWICE, here)
    return runs


def transfers() -> list[str]:
    """Those of TRANSFERS that can be made here: LoRA needs peft."""
    return [arm for arm in TRANSFERS if "LoRA" not in arm or importlib.util.find_spec("peft")]


class Lab:
    """Makes the results of runs that are not in the log yet.

    Args:
        data: To train and test on.
        recipe: How much.
        log: Where results are kept.
        progress: Called with the cost of what has been done, see `cost`.
    """

    def __init__(self, data: LabelledImages, recipe: Recipe, log: RunLog, progress: Callable[[int], object]) -> None:
        self.data, self.recipe, self.log, self.progress = data, recipe, log, progress

    def make(self, run: Run) -> None:
        """Train the run's model unless its weights are there, and measure what is missing."""
        missing = self.missing(run)
        start = time.perf_counter()
        model = models.build(run.variant, self.data, self.recipe, seed=run.seed)
        path = self.log.folder / "weights" / f"{run.name}.pt"
        trained = run.key("training", self.recipe.size)
        if trained in self.log.results() and path.exists():
            model.load_state_dict(torch.load(path, map_location=self.data.device, weights_only=True))
        else:
            loss = self._fit(model, self._images(run), self._phase(self._epochs(run)), run)
            self._check_same(run, trained, loss)
            write_whole(path, lambda part: torch.save(model.state_dict(), part))
            self._add(run, trained, model, loss, start)
        for key in missing:
            if key != trained:
                self._measure(run, key, model)

    def missing(self, run: Run) -> list[Key]:
        """What the log has not."""
        results = self.log.results()
        return [key for key in run.keys if key not in results]

    def cost(self, run: Run) -> int:
        """Of what is missing; 4 is that of an image on which a plain ViT of 7 x 7 patches is trained."""
        return sum(self._cost(run, key) for key in self.missing(run))

    def _cost(self, run: Run, key: Key) -> int:
        trained = 0
        if key == run.key("training", self.recipe.size):
            trained = self._epochs(run) * len(self._images(run))
        elif key.after in (GATES, NORMS):
            trained = len(self.data.train.first(self.recipe.gate_images))
        elif key.after == TWICE:
            trained = 2 * self._epochs(run) * len(self._images(run))
        elif key.after in TRANSFERS:
            trained = self.recipe.further_epochs * len(self._images(run))
        return self._cost_of_test(run, self._seen(key)) * (4 * trained + len(self._tested(key.size)))

    def _seen(self, key: Key) -> int:
        """The size at which the model sees the images."""
        return self.recipe.size if key.after == RESIZED else key.size

    def _cost_of_test(self, run: Run, size: int) -> int:
        """Of testing one image; training takes four times as long. As measured, roughly."""
        tokens = (size / self.recipe.patch_size / 7) ** 2
        return max(1, round((15 if run.variant.model == "sdt_h" else 1) * tokens * (1 + (tokens / 8) ** 2)))

    def _images(self, run: Run) -> Images:
        r = self.recipe
        return self.data.train.first(r.vit_images if run.variant.model == "vit" else r.sdt_h_images)

    def _epochs(self, run: Run) -> int:
        return self.recipe.vit_epochs if run.variant.model == "vit" else self.recipe.sdt_h_epochs

    def _tested(self, size: int) -> Images:
        return self.data.test.first(self.recipe.test_images if size == self.recipe.size else self.recipe.size_images)

    def _measure(self, run: Run, key: Key, model: nn.Module) -> None:
        """Other sizes and further training of a model that is trained, which stays as it is."""
        start, loss = time.perf_counter(), math.nan
        if key.after in TRANSFERS:
            model, loss = self._train_further(run, key.after, model)
        elif key.after == TWICE:
            model = models.build(run.variant, self.data, self.recipe, seed=run.seed)
            loss = self._fit(model, self._images(run), self._phase(2 * self._epochs(run)), run)
        elif key.after != RESIZED:
            model = models.at_size(
                *(run.variant, model, key.size, self.recipe),
                scales_positions=key.after != "training",
                scales_decay=key.after in (REFERENCE, GATES),
            )
        if key.after in (GATES, NORMS):
            models.train_only(model, models.is_gate if key.after == GATES else models.is_norm)
            phase = Phase(1, training.GATES_RATE, training.GATES_BATCH)
            loss = self._fit(model, self.data.train.first(self.recipe.gate_images), phase, run, key.size)
        self._add(run, key, model, loss, start)

    def _train_further(self, run: Run, arm: str, trained: nn.Module) -> tuple[nn.Module, float]:
        """As many further steps for each arm, on the same images in the same order."""
        model: nn.Module = models.build(run.variant, self.data, self.recipe, seed=run.seed, decay=TRANSFERS[arm])
        model.load_state_dict(trained.state_dict(), strict=False)
        rate = self.recipe.learning_rate / 4
        if arm == "swap, gates":
            models.train_only(model, models.is_gate)
            rate = training.GATES_RATE
        elif arm == "swap, gates and LoRA":
            from peft import LoraConfig, inject_adapter_in_model

            config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["qkv"])
            model = inject_adapter_in_model(config, model)
            models.train_only(model, lambda name: models.is_gate(name) or "lora_" in name)
            rate = self.recipe.learning_rate
        return model, self._fit(model, self._images(run), self._phase(self.recipe.further_epochs, rate), run)

    def _phase(self, epochs: int, learning_rate: float | None = None) -> Phase:
        return Phase(epochs, learning_rate or self.recipe.learning_rate, self.recipe.batch_size)

    def _fit(self, model: nn.Module, images: Images, phase: Phase, run: Run, size: int | None = None) -> float:
        size = size or self.recipe.size
        cost = 4 * self._cost_of_test(run, size)
        loss = training.fit(
            model, self.data, images, phase, seed=run.seed, size=size, after_batch=lambda n: self.progress(n * cost)
        )
        check_loss(run.name, loss)
        return loss

    def _check_same(self, run: Run, trained: Key, loss: float) -> None:
        """A model whose weights are lost is trained again: what the log has of it must be of the same weights."""
        before = self.log.results().get(trained)
        if before is not None and before.loss != round(loss, 5):
            raise LogError(
                f"{self.log.folder} must have weights/{run.name}.pt, or be of a machine that trains it to the same "
                f"again: got a loss of {before.loss} there, {loss:.5f} here. Bring the file back, or choose another "
                "--output."
            )

    def _add(self, run: Run, key: Key, model: nn.Module, loss: float, start: float) -> None:
        """Test, and write the row."""
        cost = self._cost_of_test(run, self._seen(key))
        images = self._tested(key.size)
        accuracy = training.accuracy(
            *(model, self.data, images),
            size=key.size,
            seen=self._seen(key),
            after_batch=lambda n: self.progress(n * cost),
        )
        result = Result(
            accuracy=round(accuracy, 4),
            loss=round(loss, 5),
            seconds=round(time.perf_counter() - start, 1),
            **stamp(self.data.device),
        )
        self.log.add(key, result)
