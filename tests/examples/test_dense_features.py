"""The example of dense features: masks and their measure on hand-made images, and the command line on a few digits."""

import math

import pytest
import torch

from examples import segmentation


@pytest.fixture
def few(monkeypatch):
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(segmentation, "split_indices", lambda num_images: (order[:100], order[100:130]))
    return segmentation.load_data()


def test_otsu_parts_each_scan_by_itself():
    scans = torch.tensor(
        [
            [[0, 1, 1], [9, 11, 10]],  # 0, 1, 1 | 9, 10, 11
            [[16, 12, 13], [4, 12, 5]],  # 4, 5 | 12, 12, 13, 16
        ]
    ).float()
    assert segmentation.otsu(scans).int().tolist() == [
        [[0, 0, 0], [1, 1, 1]],
        [[1, 1, 1], [0, 1, 0]],
    ]


def test_otsu_is_the_best_threshold():
    scans = torch.randint(17, (20, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    for scan, mask in zip(scans, segmentation.otsu(scans), strict=True):

        def within(part, scan=scan):  # the two parts' sums of squares
            return sum(((scan[p] - scan[p].mean()) ** 2).sum().item() for p in (part, ~part) if p.any())

        assert within(mask) == pytest.approx(min(within(scan > level) for level in range(16)))


def test_mean_iou():
    masks = torch.tensor([[[0, 0], [1, 1]]])
    assert segmentation.mean_iou(masks, masks) == 100
    assert segmentation.mean_iou(1 - masks, masks) == 0
    # paper: 2 of 3; ink: 1 of 2
    assert segmentation.mean_iou(torch.tensor([[[0, 0], [0, 1]]]), masks) == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    # class 3 is predicted once and never there: 2 of 2, 1 of 2, 0 of 1
    assert segmentation.mean_iou(torch.tensor([[[0, 0], [3, 1]]]), masks) == pytest.approx(50)
    # over all patches, not image by image: paper 0 of 4, ink 12 of 16
    pair = torch.tensor([[[1, 1, 1, 1, 1, 1, 1, 1]], [[0, 0, 0, 0, 1, 1, 1, 1]]])
    assert segmentation.mean_iou(torch.ones_like(pair), pair) == pytest.approx(100 * (0 / 4 + 12 / 16) / 2)


def test_data():
    train, test = segmentation.load_data()
    for data, num_images in ((train, 1400), (test, 397)):
        assert data.images.shape == (num_images, 1, 32, 32)
        assert data.masks.shape == (num_images, 8, 8)
        assert data.images.min() >= 0
        assert data.images.max() <= 1
        inked = data.masks > 0
        assert inked.flatten(1).any(1).all()  # there is ink and paper on each
        assert not inked.flatten(1).all(1).any()
        assert (data.masks[inked] - 1 == data.labels[:, None, None].expand(-1, 8, 8)[inked]).all()
        assert data.images.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((1, 3, 5))[inked].mean() > 0.5


def test_raw_patches_are_pixels_of_the_scan():
    image = torch.zeros(1, 1, 32, 32)
    image[..., 8:12, 20:24] = torch.arange(16.0).view(4, 4)  # patch (2, 5)
    patches = segmentation.raw_patches(image)
    assert patches.shape == (1, 16, 8, 8)
    assert patches[0, :, 2, 5].tolist() == list(range(16))
    assert patches.sum() == image.sum()


def test_segment_learns_a_linear_rule_of_each_patch():
    features = torch.randn(20, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    masks = (features[:, 0] - 2 * features[:, 2] > 0).long()
    predicted = segmentation.segment(features[:15], masks[:15], features[15:])
    assert predicted.shape == (5, 4, 5)
    assert (predicted == masks[15:]).float().mean() > 0.95


def test_backbone_is_frozen(few):
    train, test = few
    model = segmentation.train_classifier(segmentation.VARIANTS["LocAtViT (both)"], train, epochs=1, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = segmentation.measure(model, train, test)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.predicted["digit"].shape == test.masks.shape


def test_training_never_sees_a_mask(few):
    blank = segmentation.Split(few[0].images, few[0].labels, torch.zeros_like(few[0].masks))
    models = [
        segmentation.train_classifier(segmentation.VARIANTS["ViT"], data, epochs=1, seed=0) for data in (few[0], blank)
    ]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
def test_main(few, tmp_path, capsys):
    output = tmp_path / "new" / "outputs"
    results = segmentation.main(["--epochs", "1", "--seeds", "1", "--threads", "1", "--output", str(output)])
    assert list(results) == [segmentation.RAW, *segmentation.VARIANTS]
    assert math.isnan(results[segmentation.RAW][0].accuracy)
    assert results[segmentation.RAW][0].miou["ink"] > 90  # what makes the task saturated
    for name in segmentation.VARIANTS:
        assert 0 <= results[name][0].accuracy <= 100
        assert results[name][0].miou["ink"] > results[name][0].miou["digit"] > 0
    assert sorted(path.name for path in output.iterdir()) == ["digit.png", "ink.png", "table.md"]
    assert all((output / f"{task}.png").read_bytes().startswith(b"\x89PNG") for task in ("ink", "digit"))
    written = (output / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith(written)
    assert all(f"| {name} | " in written for name in results)


def test_table():
    results = [segmentation.Result(90.0 + i, {"ink": 95.0 + 2 * i, "digit": 60.0}, {}) for i in range(3)]
    raw = segmentation.Result(math.nan, {"ink": 98.0, "digit": 7.5}, {})
    assert segmentation.format_table({segmentation.RAW: [raw], "ViT": results}).splitlines() == [
        "| variant | accuracy | mIoU ink | mIoU digit |",
        "|---|---|---|---|",
        "| raw patch, no network | - | 98.00 | 7.50 |",
        "| ViT | 91.00 ± 1.00 | 97.00 ± 2.00 | 60.00 ± 0.00 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be a whole number >= 1: got '0'"),
        (["--seeds", "many"], "must be a whole number >= 1: got 'many'"),
        (["--threads", "-1"], "must be a whole number >= 1: got '-1'"),
        (["--output", __file__], "must be a folder"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        segmentation.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
