"""The ablation on tiny images: what is trained and measured, that it goes on where it was, and its statistics."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import ablation
import ablation_models as models
import ablation_plan
import ablation_report as report
import ablation_training as training
import spatial_decay as sd
from ablation_log import Key, Result
from ablation_models import Recipe, Variant
from ablation_plan import plan
from ablation_training import Phase
from image_folder import Images, LabelledImages
from spatial_decay.layers.kinds import as_kind
from tests.examples.test_image_folder import write_fashion
from tests.faults import killed

TINY = Recipe(
    vit_images=20,
    vit_epochs=1,
    sdt_h_images=10,
    sdt_h_epochs=1,
    gate_images=10,
    test_images=8,
    size_images=4,
    further_epochs=1,
    batch_size=10,
    learning_rate=1e-3,
)
SIZED = replace(TINY, size=8, other_sizes=(12,))
VIT = {"dim": 8, "depth": 1, "num_heads": 1, "mlp_ratio": 1, "class_token": False, "global_pool": "avg"}
SDT_H = {"embed_dims": (4, 4), "depths": 1, "num_heads": 1, "mlp_ratios": 1, "projection_dim": 4, "stem_stride": 1}
SMALL = ("--size", "8", "--other-sizes", "12", "--threads", "1", "--seeds", "1")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(models, "VIT", VIT)
    monkeypatch.setattr(models, "SDT_H", SDT_H | {"gate_rank": 2, "lpe_kernel_size": 3})
    monkeypatch.setattr(ablation, "QUICK", TINY)
    monkeypatch.setattr(ablation, "FULL", TINY)


@pytest.fixture
def few(monkeypatch):
    """Rows of each sort, but not all of them; without peft, which takes seconds to import."""
    monkeypatch.setattr(ablation_plan, "MECHANISMS", ("none", "decomposed"))
    monkeypatch.setattr(ablation_plan, "SCALES", ("full, alpha 0.2",))
    monkeypatch.setattr(ablation_plan, "RELATIVES", ("alibi",))
    monkeypatch.setattr(ablation_plan, "LONGER", ("none",))
    arms = {arm: ablation_plan.TRANSFERS[arm] for arm in ("further", "swap, gates")}
    for module in (ablation, ablation_plan, report):
        monkeypatch.setattr(module, "TRANSFERS", arms)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_fashion(folder)
    return folder


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.arange(20) % 3)
    return LabelledImages(images, images.first(10), 3)


def run(photos, output, *arguments):
    return ablation.main([*arguments, "--data", str(photos), "--output", str(output), *SMALL])


def numbers(output):
    """All of the log that does not depend on the clock or the machine."""
    rows = (output / "runs.csv").read_text(encoding="utf-8").splitlines()
    seconds = rows[0].split(",").index("seconds")
    return sorted(",".join(cells[:seconds]) for row in rows if (cells := row.rsplit(",", 99)))


@pytest.mark.usefixtures("few")
def test_tables_are_made_and_go_on_where_they_were(photos, tmp_path, capsys):
    results = run(photos, tmp_path, "tables")
    assert len(results) == 2 + 1 + 1 + 2 + 1  # Tables 3 and 4, alpha, a relative, SDT-H, twice as long
    assert all(0 <= result.accuracy <= 100 for result in results.values())
    assert {path.name for path in tmp_path.iterdir()} == {
        *("runs.csv", "config.json", "results.md", "tables.png", "locks", "weights"),
    }
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert written in capsys.readouterr().out
    assert torch.__version__ in written
    log = tmp_path / "runs.csv"
    whole, before = log.read_text(encoding="utf-8"), numbers(tmp_path)
    assert run(photos, tmp_path, "tables") == results  # nothing is left to do
    assert log.read_text(encoding="utf-8") == whole
    lines = whole.splitlines(keepends=True)
    log.write_text("".join(lines[:3]) + lines[3][:20], encoding="utf-8")  # as a kill leaves it
    run(photos, tmp_path, "tables")
    assert numbers(tmp_path) == before


@pytest.mark.slow
def test_all_studies(photos, tmp_path):
    results = run(photos, tmp_path, "tables", "sizes", "transfer")
    after = {key.after for key in results}
    trained = [key for key in results if key.after == "training"]
    assert len(trained) == 6 + 3 + 4 + 6 + 23 - 4 + 23  # tables, and positions at two sizes; 4 are in both
    assert len({key for key in results if key.after not in ("training", "reference grid")}) == 8 + 4 + 4 + 2 + 5
    assert after >= {
        "training",
        "gates",
        "norms",
        "resized",
        "further",
        "swap, all weights",
        "swap, gates",
        "twice as long",
    }
    assert {key.size for key in results if key.after == "gates"} == {12}
    assert {(key.positions, key.decay) for key in results if key.after == "gates"} == {
        (positions, decay) for positions in ("none", "learned", "rope", "sincos") for decay in ("full", "decomposed")
    }
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| RoPE | `decomposed` | gates trained there | - |" in text
    assert "| `full` swapped in, the gates alone trained |" in text
    assert (tmp_path / "sizes.png").exists()


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(photos, tmp_path):
    run(photos, tmp_path / "whole", "transfer")
    times = 0
    for at in range(0, 400, 23):
        times += killed(lambda: run(photos, tmp_path / "killed", "transfer"), at=at)
    run(photos, tmp_path / "killed", "transfer")
    assert times > 3
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


@pytest.mark.usefixtures("few")
def test_lost_weights_are_trained_again_to_the_same_numbers(photos, tmp_path):
    run(photos, tmp_path, "transfer")
    before = numbers(tmp_path)
    (path,) = (tmp_path / "weights").iterdir()
    path.unlink()
    log = tmp_path / "runs.csv"
    log.write_text("\n".join(log.read_text(encoding="utf-8").splitlines()[:-1]) + "\n", encoding="utf-8")
    run(photos, tmp_path, "transfer")
    assert numbers(tmp_path) == before


@pytest.mark.usefixtures("few")
def test_weights_that_cannot_be_trained_again_to_the_same_are_missed(photos, tmp_path):
    """A log that came without them must not be mixed of two trainings."""
    run(photos, tmp_path, "transfer")
    (path,) = (tmp_path / "weights").iterdir()
    path.unlink()
    log = tmp_path / "runs.csv"
    header, trained, *_ = log.read_text(encoding="utf-8").splitlines()
    loss = trained.split(",")[header.split(",").index("loss")]
    log.write_text(f"{header}\n{trained.replace(loss, '0.5')}\n", encoding="utf-8")  # as on another machine
    before = log.read_bytes()
    with pytest.raises(SystemExit, match=r"must have weights/vit-learned-none-0.pt, or .*: got a loss of 0.5 there"):
        run(photos, tmp_path, "transfer")
    assert log.read_bytes() == before
    assert not path.exists()


def test_what_another_process_is_making_is_left_to_it(photos, tmp_path):
    (tmp_path / "locks").mkdir()
    log = ablation.RunLog(tmp_path, ablation.describe_config(SIZED, ablation.image_folder.load(photos, 8)))
    with log.claim("vit-learned-none-0"):
        assert run(photos, tmp_path, "transfer") == {}


def test_report_alone_trains_nothing(photos, tmp_path):
    with pytest.raises(SystemExit, match="--report needs results in .*: got none. Run the command without it first"):
        run(photos, tmp_path / "none", "--report")
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("few")
def test_other_images_are_refused(photos, tmp_path):
    run(photos, tmp_path, "transfer")
    other = tmp_path / "other"
    other.mkdir()
    write_fashion(other, num_train=31)
    with pytest.raises(SystemExit, match=r"got others, data: 30\+10 images.* there, 31\+10 images"):
        run(other, tmp_path)
    with pytest.raises(SystemExit, match="got no such folder"):
        run(tmp_path / "nowhere", tmp_path)


def test_decays_share_first_weights_order_and_flips(data, monkeypatch):
    plain = models.build(Variant("vit", "learned", "none"), data, SIZED, seed=3).state_dict()
    for decay in models.DECAYS:
        state = models.build(Variant("vit", "learned", decay), data, SIZED, seed=3).state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in plain.items())
    seen = {}

    class Spy(torch.nn.Linear):
        def forward(self, x):
            seen[decay].append(x.clone())
            return super().forward(x.flatten(1))

    for decay in ("none", "full"):
        seen[decay] = []
        torch.manual_seed(len(seen))
        training.fit(
            Spy(3 * 64, 3), data, data.train, Phase(2, 1e-3, 7), seed=5, size=8, after_batch=lambda count: None
        )
    assert [len(x) for x in seen["none"]] == [7] * 4  # two whole batches of 20 images, twice
    assert all(torch.equal(a, b) for a, b in zip(seen["none"], seen["full"], strict=True))


def test_rows_and_columns_without_decay_add_nothing():
    x = torch.randn(1, 9, 8)
    kind = models.DECAYS["rows, columns: none"]
    for mask in sd.SpatialDecayMask(8, 2, decay=kind)(x, (3, 3)):
        assert mask.abs().max() < 1e-6


def test_distances_of_the_size_trained_on_where_a_kind_has_them():
    for decay, like in models.DECAYS.items():
        found = models.reference_decay(decay, SIZED)
        assert (found is not None) == ("reference_grid" in as_kind(like).options())
        assert found is None or found.config == as_kind(like).config | {"reference_grid": [2, 2]}


def test_who_counts_no_steps_is_compared_as_it_is():
    """Learned positions without a decay; with RoPE, which counts steps, a missing row is no difference."""
    results = {
        Key("vit", positions, decay, 0, after, 56): result(accuracy)
        for positions in ("learned", "rope")
        for decay, after, accuracy in (("none", "training", 50.0), ("full", "reference grid", 60.0))
    }
    found = [report.difference(results, p, "full", "none", "reference grid", 56) for p in ("learned", "rope")]
    assert str(found[0]) == "+10.00"
    assert found[1] is None
    assert models.counts_steps("rope", "none")
    assert not models.counts_steps("learned", models.STRUCTURE)


@pytest.mark.parametrize("positions", ["learned", "sincos", "rope", "none"])
def test_positions(positions, data):
    variant = Variant("vit", positions, "full")
    model = models.build(variant, data, SIZED, seed=0)
    added = model.pos_embed
    assert added.requires_grad == (positions == "learned")
    assert bool(added.any()) == (positions in ("learned", "sincos"))
    assert model.config["rope"] == ("axial" if positions == "rope" else "none")
    images = torch.randn(2, 3, 12, 12)
    elsewhere = models.at_size(variant, model, 12, SIZED, scales_positions=False, scales_decay=False)
    if positions == "sincos":
        grid = sd.models.sdt_p.sincos_positions(8, sd.Grid(3, 3))
        assert torch.equal(elsewhere.pos_embed[0], grid)
    else:
        torch.testing.assert_close(elsewhere(images), model(images))
    scaled = models.at_size(variant, model, 12, SIZED, scales_positions=True, scales_decay=False)
    if positions == "rope":
        assert scaled.blocks[0].attn.rope.reference_grid == (2, 2)
        assert not torch.allclose(scaled(images), model(images))
    else:  # the model interpolates what is added to its tokens
        torch.testing.assert_close(scaled(images), model(images))
    assert scaled.blocks[0].attn.decay.kind.reference_grid is None
    decayed = models.at_size(variant, model, 12, SIZED, scales_positions=True, scales_decay=True)
    assert decayed.blocks[0].attn.decay.kind.reference_grid == (2, 2)
    there = torch.randn(2, 3, 8, 8)  # at the size trained on nothing changes
    torch.testing.assert_close(decayed(there), model(there))
    assert all(other.pos_embed.requires_grad == (positions == "learned") for other in (elsewhere, scaled, decayed))


def test_images_are_resized_before_the_model_sees_them(data):
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :3]

    training.accuracy(Spy(), data, data.test, size=12, model_size=8, after_batch=lambda count: None)
    assert seen[0].shape == (10, 3, 8, 8)
    assert not torch.equal(seen[0], training.prepare(data.test.pixels, data, 8))
    torch.testing.assert_close(seen[0], training.prepare(data.test.pixels, data, 8), rtol=0, atol=2.5)


def test_gates_alone_are_trained(data):
    model = models.build(Variant("vit", "none", "full"), data, SIZED, seed=0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    models.train_only(model, models.is_gate)
    training.fit(model, data, data.train, Phase(1, 0.1, 5), seed=0, size=12, after_batch=lambda count: None)
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed == ["blocks.0.attn.decay.gate.weight"]
    norms = [name for name in before if models.is_norm(name)]
    assert {name.removeprefix("blocks.0.") for name in norms} == {
        f"{name}.{part}" for name in ("norm", "norm1", "norm2") for part in ("weight", "bias")
    }


@pytest.mark.gpu
def test_a_step_in_a_graph_trains_as_on_the_cpu(data):
    losses = []
    for device in ("cpu", "cuda"):
        there = data.to(torch.device(device))
        model = models.build(Variant("vit", "learned", "full"), there, SIZED, seed=0)
        phase = Phase(5, 1e-3, 4)
        losses.append(training.fit(model, there, there.train, phase, seed=0, size=8, after_batch=lambda count: None))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # float32, 25 steps


def test_the_order_begins_with_tables_3_and_4_and_seeds_come_one_after_another():
    runs = plan(("tables", "sizes"), SIZED, seeds=2)
    assert [r.name for r in runs[:6]] == [
        f"vit-learned-{decay}-0" for decay in ("none", "fixed", "full", "1d", "bidirectional", "decomposed")
    ]
    long = [r for r in runs if r.keys[0].after in ("gates", "norms", "twice as long")]
    assert runs[-len(long) :] == long
    seeds = [r.seed for r in runs[: -len(long)]]
    assert seeds == sorted(seeds)
    keys = [key for r in runs if r.keys[0].after != "training" for key in r.keys]
    assert len({*keys}) == len(keys)


@pytest.mark.parametrize("name", ["ablation", "ablation_default"])
def test_the_tables_of_the_documentation_are_those_of_the_committed_log(name, tmp_path):
    folder = Path(ablation.__file__).parent / "results" / name
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    results = ablation.RunLog(tmp_path, config).results()
    recipe = Recipe(**{field.name: config[field.name] for field in fields(Recipe)})
    assert report.format_all(results, recipe) == (folder / "results.md").read_text(encoding="utf-8")


def result(accuracy):
    return Result(accuracy, 0.1, 1.0, "2026-11-26", "2.15", "x")


def test_tables_by_hand():
    results = {
        Key("vit", "learned", decay, seed, "training", 28): result(70 + seed + gain * (seed + 1))
        for decay, gain in (("none", 0), ("full", 1))
        for seed in (0, 1)
    }
    results[Key("sdt_h", "", "full", 0, "training", 28)] = result(80.0)
    results[Key("vit", "learned", "full", 0, "training", 56)] = result(1.0)
    lines = report.format_tables(results, size=28).splitlines()
    assert "| No decay | `none` | 70.50 ± 0.71 (2) | - | - | - |" in lines
    assert "| Ours (full) | `full` | 72.00 ± 1.41 (2) | +1.50 [-4.85, +7.85] | 80.00 (1) | - |" in lines
    assert "| 1D Decay | `1d` | - | - | - | - |" in lines
    assert lines.count("| alpha = 0.1 | `full` | 72.00 ± 1.41 (2) | +1.50 [-4.85, +7.85] | 80.00 (1) | - |") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table"], "must be one of tables, sizes, transfer: got 'table'"),
        (["--seeds", "0"], "must be a whole number >= 1: got '0'"),
        (["--size", "30"], "must be multiples of --patch-size, 4: got 30"),
        (["--other-sizes", "40", "41"], "must be multiples of --patch-size, 4: got 41"),
        (["--other-sizes", "28"], "must all differ: got 28, 28"),
        (["--output", __file__], "must be a folder"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        ablation.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
