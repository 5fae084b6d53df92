"""The two examples of swap_attention, run as written but for fewer epochs."""

import re

import pytest

from examples import swap_diffusers_dit, swap_timm


def losses(text):
    return {
        line[:19].strip(): float(re.search(r"loss (\d+\.\d+)", line)[1]) for line in text.splitlines() if "loss" in line
    }


@pytest.mark.slow
def test_gates_of_a_timm_vit(capsys):
    swap_timm.main(["--epochs", "1"])
    text = capsys.readouterr().out
    loss = losses(text)
    assert abs(loss["swapped"] - loss["the ViT"]) < 0.01 * loss["the ViT"]
    assert abs(loss["gates trained"] - loss["swapped"]) < 0.01  # in one epoch the ViT has learned next to nothing
    low, high = map(float, re.search(r"between (\S+) and (\S+) now", text).groups())
    assert low < high  # those of the last block stay at 6: the class token, which has no position, is all that is read
    assert "decay 'full' in 4 attention modules" in text
    assert "training 588 of 117,526 parameters (0.50 %)" in text  # 4 layers x 3 heads x (48 weights + 1 bias)


@pytest.mark.slow
def test_gates_of_a_diffusers_dit_through_a_folder(capsys):
    swap_diffusers_dit.main(["--epochs", "1"])
    text = capsys.readouterr().out
    loss = losses(text)
    assert abs(loss["swapped"] - loss["the DiT"]) < 0.01 * loss["the DiT"]
    assert loss["gates trained"] != loss["swapped"]
    assert loss["saved and loaded"] == loss["gates trained"]
    assert "left as it was" not in text


@pytest.mark.parametrize("example", [swap_timm, swap_diffusers_dit])
def test_epochs_that_train_nothing(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--epochs", "-1"])
    assert "--epochs: must be a whole number >= 1: got '-1'" in capsys.readouterr().err
