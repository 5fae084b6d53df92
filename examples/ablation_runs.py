"""How ablation.py trains and measures a run."""

import math
import time
from collections.abc import Callable

import torch
from torch import nn

import ablation_models as models
import ablation_training as training
from ablation_log import Key, Result, RunLog
from ablation_models import Recipe
from ablation_plan import GATES, LORA, NORMS, REFERENCE, RESIZED, TRAINING, TRANSFERS, TWICE, Run
from ablation_training import Phase
from image_folder import Images, LabelledImages
from run_log import LogError, check_loss, stamp, write_whole


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
        trained = run.key(TRAINING, self.recipe.size)
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
        if key == run.key(TRAINING, self.recipe.size):
            trained = self._epochs(run) * len(self._images(run))
        elif key.after in (GATES, NORMS):
            trained = len(self.data.train.first(self.recipe.gate_images))
        elif key.after == TWICE:
            trained = 2 * self._epochs(run) * len(self._images(run))
        elif key.after in TRANSFERS:
            trained = self.recipe.further_epochs * len(self._images(run))
        return self._cost_per_image(run, self._model_size(key)) * (4 * trained + len(self._tested(key.size)))

    def _model_size(self, key: Key) -> int:
        """Of the images that the model takes."""
        return self.recipe.size if key.after == RESIZED else key.size

    def _cost_per_image(self, run: Run, size: int) -> int:
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
                scales_positions=key.after != TRAINING,
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
        rate = self.recipe.learning_rate * training.FURTHER_RATE
        if arm == "swap, gates":
            models.train_only(model, models.is_gate)
            rate = training.GATES_RATE
        elif arm == "swap, gates and LoRA":
            from peft import LoraConfig, inject_adapter_in_model

            config = LoraConfig(**LORA, target_modules=["qkv"])
            model = inject_adapter_in_model(config, model)
            models.train_only(model, lambda name: models.is_gate(name) or "lora_" in name)
            rate = self.recipe.learning_rate
        return model, self._fit(model, self._images(run), self._phase(self.recipe.further_epochs, rate), run)

    def _phase(self, epochs: int, learning_rate: float | None = None) -> Phase:
        return Phase(epochs, learning_rate or self.recipe.learning_rate, self.recipe.batch_size)

    def _fit(self, model: nn.Module, images: Images, phase: Phase, run: Run, size: int | None = None) -> float:
        size = size or self.recipe.size
        cost = 4 * self._cost_per_image(run, size)
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
        cost = self._cost_per_image(run, self._model_size(key))
        images = self._tested(key.size)
        accuracy = training.accuracy(
            *(model, self.data, images),
            size=key.size,
            model_size=self._model_size(key),
            after_batch=lambda n: self.progress(n * cost),
        )
        result = Result(
            accuracy=round(accuracy, 4),
            loss=round(loss, 5),
            seconds=round(time.perf_counter() - start, 1),
            **stamp(self.data.device),
        )
        self.log.add(key, result)
