"""The diffusion example with a tiny model: training that is paired over kinds, sampling, judging, going on by runs."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.schedulers import DDPMScheduler

import ablation_training
import diffusion
import diffusion_judge
import image_folder
from diffusion import Key, Result
from diffusion_judge import Gaussian, Score, fit_gaussian, frechet_distance
from image_folder import Images

TINY = {"dim": 8, "depth": 1, "num_heads": 1, "mlp_ratio": 1, "gate_rank": 2, "learn_sigma": False}
ROW = {
    "loss": 0.5,
    "cpu_seconds": 10.0,
    "judge": "CRC 1",
    "date": "2026-01-02",
    "torch": "2",
    "diffusers": "1",
    "machine": "m",
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    for name, value in {"SMALL": TINY, "BATCH_SIZE": 8, "SAMPLER_STEPS": 4, "NUM_JUDGED": 12}.items():
        monkeypatch.setattr(diffusion, name, value)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes that can be told from each other: bright above, or bright below."""
    folder = tmp_path_factory.mktemp("photos")
    torch.manual_seed(0)
    for name, count in (("train", 80), ("t10k", 20)):
        labels = torch.arange(count) % 2
        pixels = torch.randint(0, 100, (count, 28, 28))
        pixels[labels == 0, :14] += 150
        pixels[labels == 1, 14:] += 150
        shape = b"".join(n.to_bytes(4, "big") for n in pixels.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + shape + bytes(pixels.flatten().tolist())
        )
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + shape[:4] + bytes(labels.tolist()))
    return folder


@pytest.fixture(scope="module")
def data(photos):
    return image_folder.load(photos, diffusion.SIZE)


@pytest.fixture
def model(data):
    model = diffusion.build("full", data, seed=0)
    for parameter in model.parameters():  # adaLN-Zero starts with an output of nothing
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(photos, output, *arguments):
    return diffusion.main(
        ["--data", str(photos), "--steps", "20", "--threads", "1", "--output", str(output), *arguments]
    )


def test_a_run_is_made_once_and_shown_again(photos, tmp_path, capsys):
    output = tmp_path / "new" / "outputs"
    results = run(photos, output)
    assert [*results] == [Key("full", 0)]
    assert 0 <= results[Key("full", 0)].accuracy <= 100
    assert results[Key("full", 0)].distance > 0
    shown = capsys.readouterr().out
    table = (output / "results.md").read_text(encoding="utf-8")
    assert table in shown
    assert "12 images for each run (DDIM, 4 steps, guidance 1.5) after 20 training steps" in table
    assert torch.__version__ in table
    assert (output / "samples.png").read_bytes().startswith(b"\x89PNG")
    before = (output / "runs.csv").read_bytes()
    assert run(photos, output) == results
    assert (output / "runs.csv").read_bytes() == before
    assert capsys.readouterr().out == shown


def test_results_of_another_configuration_are_refused(photos, data, tmp_path):
    config = diffusion.describe_config(diffusion.parse_arguments(["--steps", "21", "--guidance", "2"]), data)
    diffusion.Log(tmp_path, config, Key, Result)
    with pytest.raises(SystemExit, match=r"got others, steps: 21 there, 20 here; guidance: 2.0 there, 1.5 here\. Give"):
        run(photos, tmp_path)


def test_nothing_to_report(photos, tmp_path):
    with pytest.raises(SystemExit, match=r"runs\.csv has no results yet\. Leave --report out"):
        run(photos, tmp_path, "--report")


def test_no_images(tmp_path):
    with pytest.raises(SystemExit, match="must hold Fashion-MNIST .* got no such folder"):
        run(tmp_path / "nowhere", tmp_path)


def test_a_report_trains_nothing(photos, tmp_path, monkeypatch, capsys):
    results = run(photos, tmp_path)
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert (
        "The rows above the decays come from no model: they are what the classifier says of 12 test images" in written
    )
    classifier = tmp_path / "weights" / "classifier.pt"
    state = torch.load(classifier, weights_only=True)
    monkeypatch.setattr(diffusion_judge.training, "fit", None)
    assert run(photos, tmp_path, "--report") == results
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == written
    capsys.readouterr()

    def reported(came):
        assert run(photos, tmp_path, "--report") == results
        (judge,) = {result.judge for result in results.values()}
        must = f"classifier.pt must be the classifier that judged the results, {judge}: got {came}"
        assert must in capsys.readouterr().out
        short = (tmp_path / "results.md").read_text(encoding="utf-8")
        assert {*short.splitlines()} - {*written.splitlines()} == {short.splitlines()[-1]}  # the paragraph
        assert "real, held out" not in short
        assert "The rows above" not in short

    classifier.unlink()
    reported("no such file. The rows of other images are left out.")
    assert not classifier.exists()
    torch.save({name: value + 1 for name, value in state.items()}, classifier)
    reported("CRC ")
    with pytest.raises(SystemExit, match=r"must be the classifier .*: got CRC .* Put it back, pass --report, or"):
        run(photos, tmp_path, "--seeds", "2")


def test_nothing_is_kept_of_a_training_that_diverges(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "LEARNING_RATE", 1e30)
    with pytest.raises(
        SystemExit, match=r"the loss of step \d+ must be finite: got (nan|inf)\. Nothing of this training"
    ):
        run(photos, tmp_path)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["classifier.pt"]
    assert not (tmp_path / "runs.csv").exists()


def test_nothing_is_kept_of_a_classifier_that_diverges(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion_judge.training, "fit", lambda *_, **__: math.nan)
    with pytest.raises(SystemExit, match="the loss of the classifier must be finite: got nan"):
        run(photos, tmp_path)
    assert not [*(tmp_path / "weights").iterdir()]


@pytest.mark.parametrize("name", ["accuracy", "distance", "loss"])
def test_a_result_without_a_number_is_none(name):
    with pytest.raises(ValueError, match=f"{name} must be finite: got nan"):
        Result(**({"accuracy": 80.0, "distance": 2.0} | ROW | {name: math.nan}))


def test_another_process_makes_the_only_run(photos, tmp_path):
    config = diffusion.describe_config(diffusion.parse_arguments(["--steps", "20"]), image_folder.load(photos, 28))
    with diffusion.Log(tmp_path, config, Key, Result).claim("full-0"):
        assert run(photos, tmp_path) == {}
    assert not (tmp_path / "results.md").exists()


def test_two_processes_write_the_table_and_the_picture(photos, data, tmp_path, monkeypatch):
    """One comes to the end while the other writes."""
    run(photos, tmp_path)
    config = diffusion.describe_config(diffusion.parse_arguments(["--steps", "20"]), data)
    log = diffusion.Log(tmp_path, config, Key, Result)
    replace, others = os.replace, []

    def meanwhile(source, target):
        if not others:
            others.append(target)
            diffusion.write(log, data, {})
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    written = diffusion.write(log, data, {})
    assert others == [tmp_path / "results.md"]
    assert [path.stat().st_size > 0 for path in written] == [True, True]
    assert not [*tmp_path.glob("incomplete-*")]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_by_whole_runs(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "COMPARED", ("none", "full"))
    arguments = ("--compare", "--seeds", "2")
    unbroken = run(photos, tmp_path / "unbroken", *arguments)
    assert [*unbroken] == [Key("none", 0), Key("full", 0), Key("none", 1), Key("full", 1)]

    make, made = diffusion.make, []

    def three(key, *others):
        assert len(made) < 2, "the third run is not to be made"
        made.append(key)
        make(key, *others)

    monkeypatch.setattr(diffusion, "make", three)
    with pytest.raises(AssertionError, match="third"):
        run(photos, tmp_path / "broken", *arguments)
    made.clear()
    resumed = run(photos, tmp_path / "broken", *arguments)
    assert made == [Key("none", 1), Key("full", 1)]
    assert [(key, r.accuracy, r.distance, r.loss) for key, r in resumed.items()] == [
        (key, r.accuracy, r.distance, r.loss) for key, r in unbroken.items()
    ]
    for weights in (tmp_path / "broken" / "weights").glob("full-*.pt"):  # as where runs.csv alone was kept
        weights.unlink()
    assert run(photos, tmp_path / "broken", *arguments, "--report") == resumed


def test_first_weights_and_draws_are_the_same_for_every_kind(data, monkeypatch):
    models = {kind: diffusion.build(kind, data, seed=3) for kind in ("none", "full")}
    shared = models["none"].state_dict()
    assert shared.keys() < models["full"].state_dict().keys()
    assert all(torch.equal(value, models["full"].state_dict()[name]) for name, value in shared.items())
    # Without a step of the weights the output stays 0: the loss is that of the images and noise that are drawn.
    monkeypatch.setattr(diffusion, "LEARNING_RATE", 0.0)
    losses = [
        diffusion.train(model, data.train, steps=3, seed=3, after_step=lambda: None)[1] for model in models.values()
    ]
    assert losses[0] == losses[1]
    assert len({*losses[0]}) == 3


def test_training_gives_the_average_of_the_weights(data, monkeypatch):
    def trained(share):
        monkeypatch.setattr(diffusion, "EMA_DECAY", share)
        monkeypatch.setattr(diffusion, "LEARNING_RATE", 1e-2)
        model = diffusion.build("full", data, seed=0)
        averaged, losses = diffusion.train(model, data.train, steps=20, seed=0, after_step=lambda: None)
        assert len(losses) == 20
        assert sum(losses[-5:]) < sum(losses[:5])
        return (torch.cat([p.flatten() for p in part.parameters()]) for part in (model, averaged))

    last, averaged = trained(0.0)
    torch.testing.assert_close(averaged, last)
    last, averaged = trained(0.9)
    assert (averaged - last).abs().max() > 1e-3


def test_sampling_repeats_for_a_seed_and_differs_for_another(model):
    labels = torch.arange(2).repeat(2)
    images = [diffusion.sample(model, labels, guidance=1.5, seed=seed) for seed in (3, 3, 4)]
    assert images[0].shape == (4, 1, 28, 28)
    assert images[0].abs().max() <= 1
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_guidance_goes_from_no_class_to_the_class_and_beyond(model):
    labels, others = torch.full((4,), 0), torch.full((4,), 1)

    def drawn(labels, guidance):
        return diffusion.sample(model, labels, guidance=guidance, seed=0)

    torch.testing.assert_close(drawn(labels, 0.0), drawn(others, 0.0))  # the classes are not heard
    assert (drawn(labels, 1.0) - drawn(others, 1.0)).abs().max() > 0.01
    assert (drawn(labels, 3.0) - drawn(labels, 1.0)).abs().max() > 0.01


def test_sampler_draws_what_a_perfect_model_knows(model, data, monkeypatch):
    image = 1.5 * (data.train.pixels[:1] / 127.5 - 1)  # as guidance may ask for: darker than ink, whiter than paper
    noises = []

    def perfect(x, t, y, cfg_scale):
        kept = diffusion.NOISE.alphas_cumprod[t].view(-1, 1, 1, 1)
        noises.append((x - kept.sqrt() * image) / (1 - kept).sqrt())
        # v, as x = kept ** 0.5 * image + (1 - kept) ** 0.5 * noise
        return (kept.sqrt() * x - image) / (1 - kept).sqrt()

    monkeypatch.setattr(model, "forward_with_cfg", perfect)
    drawn = diffusion.sample(model, torch.zeros(3, dtype=torch.long), guidance=1.0, seed=0)
    torch.testing.assert_close(drawn, image.expand(3, -1, -1, -1).clamp(-1, 1), rtol=0, atol=1e-4)
    assert len(noises) == diffusion.SAMPLER_STEPS
    torch.testing.assert_close(noises[-1], noises[0], rtol=0, atol=1e-3)  # nothing was clipped on the way


def test_frechet_distance_of_known_gaussians():
    # Covariances with the same axes: |m_1 - m_2|^2 and the sum of (s_1 - s_2)^2 over their standard deviations.
    axes = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q

    def gaussian(mean, variances):
        return Gaussian(torch.tensor(mean).double(), axes @ torch.diag(torch.tensor(variances).double()) @ axes.T)

    ours, theirs = gaussian([1.0, 2.0, 3.0], [1.0, 4.0, 0.0]), gaussian([1.0, 0.0, 3.0], [9.0, 1.0, 0.25])
    known = 2.0**2 + (1 - 3) ** 2 + (2 - 1) ** 2 + (0 - 0.5) ** 2
    assert frechet_distance(ours, theirs) == pytest.approx(known, abs=1e-7)
    assert frechet_distance(theirs, ours) == pytest.approx(known, abs=1e-7)
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-7)


def test_frechet_distance_where_covariances_do_not_commute():
    # In two dimensions tr (C_1 C_2)^(1/2) = (tr(C_1 C_2) + 2 (det C_1 det C_2)^(1/2))^(1/2).
    ours, theirs = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([[5.0, -2.0], [-2.0, 1.0]]).double()
    assert not torch.allclose(ours @ theirs, theirs @ ours)
    trace = math.sqrt((2 * 5 - 2 * 1 * 2 + 3 * 1) + 2 * math.sqrt(5.0 * 1.0))
    zero = torch.zeros(2).double()
    found = frechet_distance(Gaussian(zero, ours), Gaussian(zero, theirs))
    assert found == pytest.approx(5 + 6 - 2 * trace, abs=1e-12)


def test_gaussian_of_features():
    found = fit_gaussian(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]))
    assert found.mean.tolist() == [2.0, 2.0]
    assert found.covariance.tolist() == [[4.0, 3.0], [3.0, 3.0]]
    assert found.mean.dtype == found.covariance.dtype == torch.float64


@pytest.fixture
def judge(data, tmp_path):
    for part in ("locks", "weights"):
        (tmp_path / part).mkdir()
    return diffusion_judge.load_or_train(data, tmp_path)


def test_judge_tells_classes_and_real_images_from_others(judge, data, tmp_path, monkeypatch):
    references = judge.references(20)
    real = references["real, held out"]
    assert real == judge.score(data.test)
    assert real.accuracy > 90
    assert judge.score(Images(data.test.pixels, 1 - data.test.labels)).accuracy == pytest.approx(100 - real.accuracy)
    assert judge.score(data.train).distance == pytest.approx(0, abs=1e-4)  # roots of 1e-16
    assert len(references) == 4
    assert all(score.distance > 2 * real.distance for score in [*references.values()][1:])
    monkeypatch.setattr(diffusion_judge.training, "fit", None)  # it is read from its file, not trained again
    again = diffusion_judge.load_or_train(data, tmp_path)
    assert again.score(data.test) == real
    assert again.fingerprint == judge.fingerprint


def test_the_table_of_the_documentation_is_that_of_the_committed_log(tmp_path):
    folder = Path(diffusion.__file__).parent / "results" / "diffusion"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    results = diffusion.Log(tmp_path, config, Key, Result).results()
    assert {(key.decay, key.seed) for key in results} == set(itertools.product(diffusion.COMPARED, range(3)))
    written = (folder / "results.md").read_text(encoding="utf-8").splitlines()
    assert {*diffusion.format_table(results, {}).splitlines()} <= {*written}
    assert written[-1] == diffusion.describe(results, config, num_judged=2000, num_references=2000)


def test_the_committed_log_has_the_configuration_of_this_code(monkeypatch):
    monkeypatch.undo()  # the model is not the tiny one
    path = Path(diffusion.__file__).parent / "results" / "diffusion" / "config.json"
    committed = json.loads(path.read_text(encoding="utf-8"))
    data = SimpleNamespace(fingerprint=committed["data"])
    assert json.loads(json.dumps(diffusion.describe_config(diffusion.parse_arguments([]), data))) == committed


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (diffusion, "NOISE", DDPMScheduler(beta_schedule="linear", prediction_type="v_prediction")),
        (diffusion, "SAMPLER", {"clip_sample": True}),
        (diffusion, "WARMUP", 0.2),
        (diffusion, "WEIGHT_DECAY", 0.1),
        (ablation_training, "LABEL_SMOOTHING", 0.0),
        (ablation_training, "WARMUP", 0.2),
    ],
)
def test_what_results_depend_on_is_in_the_configuration(module, name, value, data, monkeypatch):
    before = diffusion.describe_config(diffusion.parse_arguments([]), data)
    monkeypatch.setattr(module, name, value)
    assert diffusion.describe_config(diffusion.parse_arguments([]), data) != before


def test_table():
    found = {"none": (80, 2.0), "full": (81, 1.5)}
    results = {
        Key(kind, seed): Result(accuracy + seed * (1 + (kind == "full")), distance, **ROW)
        for kind, (accuracy, distance) in found.items()
        for seed in range(2)
    }
    results[Key("fixed", 0)] = Result(70.0, 3.0, **ROW)
    assert diffusion.format_table(results, {"real, held out": Score(91.0, 0.25)}).splitlines()[2:] == [
        "| real, held out | 91.00 | - | 0.25 | - | - |",
        "| `none` | 80.50 ± 0.71 (2) | - | 2.00 ± 0.00 (2) | - | 10 |",
        "| `fixed` | 70.00 (1) | -10.00 | 3.00 (1) | +1.00 | 10 |",
        "| `full` | 82.00 ± 1.41 (2) | +1.50 [-4.85, +7.85] | 1.50 ± 0.00 (2) | -0.50 [-0.50, -0.50] | 10 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decay", "fuller"], "invalid choice: 'fuller'"),
        (["--decay", "fixed", "--compare"], "not allowed with argument"),
        (["--steps", "19"], "must be a whole number >= 20: got '19'"),
        (["--seeds", "0"], "must be a whole number >= 1: got '0'"),
        (["--guidance", "strong"], "must be a number, 0 <= number < inf: got 'strong'"),
        (["--guidance", "nan"], "must be a number, 0 <= number < inf: got 'nan'"),
        (["--output", __file__], "must be a folder"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        diffusion.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
