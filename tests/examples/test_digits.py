"""The example on scikit-learn's digits: the split, the command line end to end on one epoch, the comparison's table."""

import pytest
import torch

from examples import digits


def fake_training(kind, *, epochs, seed):
    return None, digits.History([1.0], [50.0], [90.0 + 2 * seed + len(kind)])


def test_split_is_fixed_and_disjoint():
    train, test = digits.split_indices(1797)
    torch.manual_seed(1)
    again = digits.split_indices(1797)
    assert len(train) == 1400
    assert len(test) == 397
    assert sorted(torch.cat([train, test]).tolist()) == list(range(1797))
    assert torch.equal(train, again[0])
    assert torch.equal(test, again[1])


def test_data():
    train, test = digits.load_data()
    assert train.tensors[0].shape == (1400, 1, 8, 8)
    assert test.tensors[0].shape == (397, 1, 8, 8)
    for images, labels in (train.tensors, test.tensors):
        assert images.dtype == torch.float32
        assert images.min() == 0
        assert images.max() == 1
        assert sorted(set(labels.tolist())) == list(range(10))


def test_shift_moves_by_a_pixel_at_most():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4, 4] = 1
    shifted = digits.shift(image.expand(300, -1, -1, -1), torch.Generator().manual_seed(0))
    assert shifted.shape == (300, 1, 8, 8)
    assert (shifted.sum((1, 2, 3)) == 1).all()
    places = {tuple(place) for place in shifted[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(h, w) for h in (3, 4, 5) for w in (3, 4, 5)}


def test_optimizer_has_each_parameter_once():
    model = digits.build_model("full")
    kept, decayed = digits.build_optimizer(model).param_groups
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert kept["weight_decay"] == 0


def test_main_trains_and_draws(tmp_path, capsys):
    output = tmp_path / "new" / "outputs"
    results = digits.main(["--epochs", "1", "--threads", "1", "--output", str(output)])
    assert list(results) == ["full"]
    assert 0 <= results["full"][0] <= 100
    assert sorted(path.name for path in output.iterdir()) == ["full-0-decay_maps.png", "full-0-training_curve.png"]
    assert f"{results['full'][0]:.2f} %" in capsys.readouterr().out


def test_training_repeats_for_a_seed_and_differs_for_another(monkeypatch):
    few = torch.arange(200), torch.arange(200, 250)
    monkeypatch.setattr(digits, "split_indices", lambda num_images: few)
    losses = [digits.train("none", epochs=1, seed=seed)[1].loss[0] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_compare_trains_each_mechanism_with_each_seed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(digits, "train", fake_training)
    results = digits.main(["--compare", "--seed", "1", "--output", str(tmp_path)])
    assert list(results) == ["none", "fixed", "1d", "bidirectional", "decomposed", "full"]
    assert results["1d"] == [94.0, 96.0, 98.0]
    written = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert written == capsys.readouterr().out
    assert "| 1D Decay | `1d` | 96.00 ± 2.00 |" in written
    assert "3 seeds (1, 2, 3)" in written
    assert torch.__version__ in written


def test_table():
    table = digits.format_table({"none": [98.0, 99.0, 100.0], "full": [99.0]})
    assert table.splitlines() == [
        "| Decay mechanism | `decay` | Acc (%) |",
        "|---|---|---|",
        "| No decay | `none` | 99.00 ± 1.00 |",
        "| Ours (full) | `full` | 99.00 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decay", "fuller"], "invalid choice: 'fuller'"),
        (["--decay", "1d", "--compare"], "not allowed with argument"),
        (["--epochs", "0"], "must be a whole number >= 1: got '0'"),
        (["--epochs", "many"], "must be a whole number >= 1: got 'many'"),
        (["--seed", "-1"], "must be a whole number >= 0: got '-1'"),
        (["--threads", "0"], "must be a whole number >= 1: got '0'"),
        (["--output", __file__], "must be a folder"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        digits.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
