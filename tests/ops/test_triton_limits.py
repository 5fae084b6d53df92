"""Backend `triton` at its limits: inference mode, CUDA graphs, what it keeps, and tensors too large for 32 bits."""

import contextlib
import dataclasses

import pytest
import torch

from spatial_decay.decay import ManhattanDecay
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention
from spatial_decay.ops import triton as room
from spatial_decay.ops.inputs import checked_inputs
from spatial_decay.ops.triton import launch, schedule
from spatial_decay.ops.triton.schedule import Schedule
from tests.cases import AXIAL, case_id
from tests.ops.test_triton import DEVICE, FULL, PATH, check, make, pytestmark, run  # noqa: F401  pytestmark
from tests.ops.test_triton import _interpreter as _interpreter


@pytest.mark.parametrize("grid", [Grid(9, 8, 1), Grid(4, 5)], ids=["long", "short"])
def test_inference_mode_first_and_then_training(monkeypatch, grid):
    monkeypatch.setattr(launch, "_KEPT", {})
    inputs = make(FULL, grid, num_heads=1)
    with torch.inference_mode():
        decay_attention(*inputs[:3], inputs[4], backend="triton")
    assert len(launch._KEPT) == 1
    check(inputs)


def test_tables_of_positions_are_kept_up_to_a_number_and_never_given_up(monkeypatch):
    monkeypatch.setattr(launch, "_KEPT", {})
    monkeypatch.setattr(launch, "_MOST_KEPT", 2)
    q = torch.zeros(1, 1, 1, 6, 8, device=DEVICE)
    layouts = Grid(2, 3), Grid(3, 2), Grid(1, 6)
    tables = [launch.positions_of(layout, "manhattan", q) for layout in layouts]
    assert [
        launch.positions_of(layout, "manhattan", q) is table for layout, table in zip(layouts, tables, strict=True)
    ] == [
        True,
        True,
        False,
    ]
    assert torch.equal(launch.positions_of(layouts[2], "manhattan", q), tables[2])


def test_timed_schedules_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(schedule, "_FASTEST", {})
    monkeypatch.setattr(schedule, "_MOST_KEPT", 2)
    for key in "abc":
        schedule.fastest(key, [Schedule(64, 64, 4, 2)], lambda choice: 1.0)
    assert list(schedule._FASTEST) == ["b", "c"]


def test_a_capture_asks_the_device_of_q(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: entered[-1].index == 1)
    assert not launch._is_capturing(torch.device("cuda", 0))
    assert launch._is_capturing(torch.device("cuda", 1))
    assert not launch._is_capturing(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="has not timed its kernels .* captured. Call it once before"):
        launch._seconds(pytest.fail, Schedule(64, 64, 4, 2), torch.device("cuda", 1))


@pytest.mark.parametrize("case", [FULL, AXIAL[0]], ids=case_id)
def test_the_first_call_is_not_inside_a_capture(monkeypatch, case):
    inputs = make(case, Grid(2, 3) if case.is_axial else Grid(9, 8), num_heads=1)
    launch._plan.cache_clear()
    with monkeypatch.context() as during:
        during.setattr(launch, "_is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="has not run its kernels .* captured. Call it once before, forward and"):
            run(*inputs)
    decay_attention(*inputs[:3], inputs[4], backend="triton")
    with monkeypatch.context() as during:
        during.setattr(launch, "_is_capturing", lambda device: True)
        decay_attention(*inputs[:3], inputs[4], backend="triton")
        with pytest.raises(RuntimeError, match="Call it once before, forward and backward"):
            run(*inputs)
    expected = run(*inputs)
    monkeypatch.setattr(launch, "_is_capturing", lambda device: True)
    assert all(torch.equal(a, b) for a, b in zip(run(*inputs), expected, strict=True))


def test_tables_that_a_capture_makes_are_its_own(monkeypatch):
    monkeypatch.setattr(launch, "_KEPT", {})
    monkeypatch.setattr(launch, "_is_capturing", lambda device: True)
    launch.positions_of(Grid(2, 3), "manhattan", torch.zeros(1, 1, 1, 6, 8, device=DEVICE))
    assert launch._KEPT == {}


def far(*shape, strides):
    """Without memory."""
    return torch.empty(1, device="meta").as_strided(shape, strides)


def test_tokens_too_far_apart():
    near, apart = far(1, 1, 32, 8, strides=(256, 256, 8, 1)), far(1, 1, 32, 8, strides=(2**31, 2**31, 2**26, 1))
    strength = far(1, 1, 32, strides=(2**31, 2**31, 2**26))

    def reasons(q, k, v, strength):
        decay = ManhattanDecay(strength, Grid(4, q.shape[2] // 4))
        return room._reasons_of_the_inputs(checked_inputs(q, k, v, decay, None, 0.0, None))

    assert reasons(near, near, near, far(1, 1, 32, strides=(32, 32, 1))) == []
    assert reasons(apart, near, apart, strength) == [
        "the tokens of one sequence of q, v, decay lie 2**31 or more elements apart (needs fewer, for 32-bit offsets)"
    ]
    wide = far(1, 2**14, 2**11, 64, strides=(0, 0, 64, 1))
    assert reasons(wide, wide, wide, far(1, 2**14, 2**11, strides=(0, 0, 1))) == [
        "the tokens of one sequence of the output lie 2**31 or more elements apart (needs fewer, for 32-bit offsets)"
    ]


def test_what_a_compiler_could_not_ask():
    q = far(1, 1, 1, 32, 8, strides=(0, 0, 0, 2**26, 1))
    row = far(1, 1, 1, 32, strides=(32, 32, 32, 1))
    arguments = "manhattan", row, None, torch.zeros(1, 2, 32), 0, 1.0, False
    with pytest.raises(NotImplementedError, match="the tokens of one sequence lie 2\\*\\*31 or more elements apart"):
        launch.Launch("forward", (q, q, q, q), (row,), *arguments)


@pytest.mark.slow  # it reserves 5 GB, of which it uses little
@pytest.mark.parametrize("case", [FULL, PATH], ids=case_id)
def test_images_and_gradients_far_apart(case):
    """Images 2**31 elements apart, in strides that come in units of 16 bytes, and a gradient with tokens as far."""
    q, k, v, grad, decay = make(case, Grid(4, 5), batch_size=2, num_heads=1, dtype=torch.float16)
    storage = torch.empty(2**31 + 2**29, dtype=torch.float16, device=DEVICE)
    far_q = storage.as_strided(q.shape, (2**31, 320, 16, 1)).copy_(q)
    far_grad = storage[2**12 :].as_strided(grad.shape, (2**16, 2**15, 2**27 - 2**20, 1)).copy_(grad)
    expected = run(q, k, v, grad, decay)
    for got, wanted in zip(run(far_q, k, v, far_grad, decay), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("size", [(7, 10), (4, 5)], ids=["long", "short"])
def test_long_paths_in_float32(size):
    """Whose sums are large, with a scale that is no power of two: their differences are as they were."""
    q, k, v, grad, decay = make(PATH, Grid(*size), head_dim=72, num_heads=1)
    check((q, k, v, grad, dataclasses.replace(decay, cumulative=decay.cumulative + 700)))
