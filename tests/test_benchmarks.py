"""The benchmarks run, write their files and say why a contender has no number. Nothing here looks at a clock."""

import csv
import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import spatial_decay as sd
from benchmarks import attention, calls, compare, contenders, dense, memory, models, picture, report, timing, zoo
from spatial_decay.layout import Grid
from spatial_decay.ops import BACKENDS, decay_attention
from tests.cases import CASES, make_gates

PNG = b"\x89PNG"


class Unable:
    """A backend that takes nothing."""

    def unsupported_reasons(self, _inputs):
        return ["q is too good (needs worse)", "it is Sunday"]

    avoid_reasons = unsupported_reasons


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(**values):
    columns = {"kind": "full", "contender": "tiled", "ms": 2.0, "ratio": 1.25, "ratio_low": 1.2, "ratio_high": 1.5}
    return columns | {"peak MB": 3.25, "error": 2e-7, "note": ""} | values


def test_table():
    nothing = row(contender="flex", note="a | b", **dict.fromkeys(("ms", "ratio", "ratio_low", "ratio_high"), None))
    lines = report.format_table([row(), nothing]).splitlines()
    assert lines == [
        "| kind | contender | ms | ratio | peak MB | error | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| full | tiled | 2.00 | 1.25 (1.20 to 1.50) | 3.25 | 2.0e-07 |  |",
        "| full | flex | - | - | 3.25 | 2.0e-07 | a \\| b |",
    ]


def test_files(tmp_path):
    rows = [row(), row(kind="1d", ms=None)]
    where = report.machine(torch.device("cpu"), "float32")
    report.write_results(tmp_path / "new", "Title", "About.", rows, where, by=["kind"])
    with (tmp_path / "new/results.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [line["ms"] for line in read] == ["2.0", ""]
    assert all(line["torch"] == torch.__version__ and line["cpu"] for line in read)
    text = (tmp_path / "new/results.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nAbout.\n\n- device: cpu\n")
    assert "## full\n\n| contender |" in text
    assert "## 1d\n\n| contender |" in text


def test_rounds_are_interleaved_in_changing_order():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    found = timing.interleaved(calls, "a", rounds=7, device=torch.device("cpu"), warmup=1, min_seconds=0)
    assert "".join(seen[:6]) == "aabbcc"  # two each to see how long it takes
    rounds = ["".join(seen[i : i + 3]) for i in range(6, len(seen), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len({*rounds[:6]}) == 6
    assert rounds[6:] == rounds[:2]
    assert found["a"].ratio == 1
    assert all(t.low <= t.ratio <= t.high for t in found.values())


@pytest.mark.parametrize("n", range(2, 9))
def test_each_is_first_and_after_each_other_equally_often(n):
    names = "abcdefgh"[:n]
    orders = [timing._order(names, i) for i in range(2 * n)]
    assert all(sorted(order) == [*names] for order in orders)
    for rounds in range(1, 2 * n + 1):  # few rounds too
        first = Counter(order[0] for order in orders[:rounds])
        assert max(first.values()) - min(first[name] for name in names) <= 1
    enough = orders[:n] if n % 2 == 0 else orders
    followers = Counter(pair for order in enough for pair in itertools.pairwise(order))
    assert set(followers) == set(itertools.permutations(names, 2))
    assert len({*followers.values()}) == 1


def test_what_is_slow_is_timed_in_the_first_rounds_only(monkeypatch):
    now = [0.0]
    took = {"a": 1.0, "b": 2.0, "c": 4.0}
    seen = []

    def call(name):
        seen.append(name)
        now[0] += took[name]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = {name: lambda name=name: call(name) for name in took}
    options = {"rounds": 4, "device": torch.device("cpu"), "warmup": 0, "min_seconds": 0}
    found = timing.interleaved(calls, "a", **options, slow=3, rounds_of_slow=2)
    assert {name: seen.count(name) for name in took} == {"a": 2 + 4, "b": 2 + 4, "c": 2 + 2}
    assert {name: timed.ratio for name, timed in found.items()} == {"a": 1, "b": 2, "c": 4}


def test_summary_is_of_the_ratios_in_each_round():
    found = timing.summary([2.0, 3.0, 40.0], [1.0, 2.0, 10.0])
    assert found == timing.Timing(seconds=3.0, ratio=2.0, low=1.75, high=3.0)


def measured(contender, ms, ratio, note=""):
    columns = {"kind": "full", "B, N, grid, d": "1, 2", "L": "4", "pass": "forward", "contender": contender}
    columns |= {"ms": ms, "ratio": ratio, "note": note} | dict.fromkeys(("cpu", "cores", "threads", "torch"), "x")
    columns |= {"device": "cpu", "dtype": "float32", "date": "today"}
    return {tuple(columns.get(name, "") for name in compare.COLUMNS): columns}


def test_compare_runs_in_turn_and_takes_ratios_over_the_floor(tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[1]
    (tmp_path / "old").symlink_to(root)
    ran = []

    def run(folder, benchmark, options):
        ran.append((folder.name, benchmark, options))
        slowdown = len(ran)  # of the machine
        times = {"tiled": (2, 2), "sdpa": (3, 4)}
        rows = {}
        for name, (before, after) in times.items():
            ratio = before if folder.name == "old" else after
            rows |= measured(name, str(ratio * slowdown), str(float(ratio)))
        return rows | (measured("flex", "", "", "cannot") if folder.name == "old" else {})

    monkeypatch.setattr(compare, "run", run)
    folders = [str(tmp_path / "old"), str(root)]
    rows = compare.main([*folders, "attention", "--turns", "3", "--kinds", "full", "--output", str(tmp_path / "new")])
    options = ["--kinds", "full"]
    assert [name for name, _, _ in ran] == ["old", root.name, root.name, "old", "old", root.name]
    assert all(arguments == ["attention", options] for _, *arguments in ran)
    tiled, sdpa, flex = rows
    assert (tiled["contender"], tiled["ratio"], tiled["note"]) == ("tiled", 1.0, "")
    assert (sdpa["ratio"], sdpa["note"]) == (pytest.approx(4 / 3), "slower")
    assert (flex["ratio"], flex["note"]) == (None, "before: cannot; after: not measured")
    assert "model" not in tiled
    assert "| 1.33 (1.33 to 1.33) | slower |" in capsys.readouterr().out
    assert (tmp_path / "new/results.csv").exists()


def test_compare_needs_two_checkouts(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path), ".", "attention"])
    assert "must be the root of a checkout" in capsys.readouterr().err


def make_allocation(megabytes):
    return lambda: torch.ones(megabytes << 18)


def test_peak_memory():
    if not (timing._PROCESS / "clear_refs").exists():
        pytest.skip("needs Linux's /proc/self/clear_refs")
    peak = timing.peak_memory(make_allocation, 64, device=torch.device("cpu"))
    assert peak == pytest.approx(64 << 20, rel=0.05)


def test_relative_error_is_the_worst():
    wanted = [torch.tensor([3.0, 4.0]).double(), torch.ones(1).double()]
    assert timing.relative_error([torch.tensor([3.0, 4.5]), torch.ones(1)], wanted) == pytest.approx(0.1)


def test_attention(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, "unable", Unable())
    rows = attention.main(["--quick", "--kinds", "full,decomposed", "--threads", "1", "--output", str(tmp_path)])
    assert {row["contender"] for row in rows} == {
        *(contenders.FLOOR, "auto", *BACKENDS, *contenders.PEERS),
    } - {*contenders.AUTOTUNED}
    for found in rows:
        name, note = found["contender"], found["note"]
        if name == "unable":
            assert note == "q is too good (needs worse); it is Sunday"
        if note:
            assert found["ratio"] is None
            assert name in BACKENDS or name in contenders.COMPILED
        elif name != contenders.FLOOR:
            assert found["error"] < 1e-5
            assert found["repeatable"] == "yes"
            assert math.isfinite(found["ratio"])
    printed = capsys.readouterr().out
    assert "it is Sunday" in printed
    assert f"\ncapability: {torch.backends.cpu.get_cpu_capability()}\nnative: " in printed
    assert "it is Sunday" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| full 1, 8, 14x14, 32 | " in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "results.csv").read_text(encoding="utf-8").count("\n") == 1 + len(rows)
    assert (tmp_path / "ratio.png").read_bytes().startswith(PNG)
    picture.main([str(tmp_path / "results.csv"), str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "ratio.png").read_bytes()


def test_every_ratio_lies_inside_the_picture():
    rows = [
        {"kind": "full", "B, N, grid, d": "1, 2, 3x3, 8", "pass": which, "contender": name, "ratio": ratio}
        for which in contenders.PASSES
        for name, ratio in (("native", 0.1), ("mask eager", 50.0))
    ]
    for ax in picture.picture(rows).axes:
        low, high = ax.get_xlim()
        assert low < 0.1 < 50 < high


@pytest.mark.parametrize("kind", ["full", "1d", "bidirectional", "gaussian", "squared", "decomposed"])
def test_what_others_write_gives_the_same(kind):
    size = Grid(3, 4, num_prefix_tokens=1 if kind in ("full", "gaussian", "squared") else 0)
    case = contenders.Case(kind, 2, 3, size, 8)
    setting = contenders.Setting(torch.device("cpu"), torch.float32, "tokens")
    for which in contenders.PASSES:
        wanted = contenders.make_call(case, setting, "math", which, exact=True)()
        for name in ("mask eager", "written-out softmax"):
            assert timing.relative_error(contenders.make_call(case, setting, name, which)(), wanted) < 1e-5


@pytest.mark.slow
def test_memory(tmp_path):
    rows = memory.main(["--quick", "--threads", "1", "--output", str(tmp_path)])
    assert [row["contender"] for row in rows] == [*memory.CONTENDERS]
    for row in rows:
        assert row["note"] or -0.5 < row["scratch MB"] < row["peak MB"]  # resident memory, to some 0.3
    large = contenders.Case("full", 1, 2, Grid(128, 128), 32)
    setting = contenders.Setting(torch.device("cpu"), torch.float32, "tokens")
    assert "one L x L matrix of its heads is 2.1 GB" in memory.measure(large, setting, "math")["note"]


@pytest.mark.slow
def test_models(tmp_path, capsys):
    before = list(BACKENDS)
    rows = models.main(["--quick", "--threads", "1", "--profile", "--output", str(tmp_path)])
    assert list(BACKENDS) == before
    assert all(row["note"] or row["images/s"] > 0 for row in rows)
    found = {(row["model"], row["contender"]) for row in rows}
    names = set(models.MODELS)
    assert found >= {(name, which) for name in names for which in (models.MODELS[name].floor, "auto", "native")}
    assert found >= {(models.SWAPPED, models.WITHOUT), (models.SWAPPED, models.IN_ITS_PLACE)}
    assert all(row["ratio"] == 1 for row in rows if row["contender"] == models.MODELS[row["model"]].floor)
    assert "Self CPU" in capsys.readouterr().out
    assert (tmp_path / "results.md").exists()
    assert (tmp_path / "profile.txt").exists()


@pytest.mark.slow
def test_dense(tmp_path, capsys, monkeypatch):
    before = list(BACKENDS)
    few = {"rmt_tiny": dense.CONTENDERS["rmt_tiny"], "sdt_h_tiny": (dense.IN_ITS_PLACE, *dense.PEERS[:1])}
    monkeypatch.setattr(dense, "CONTENDERS", few)  # the memory of each is measured in a process of its own
    rows = dense.main(["--quick", "--threads", "1", "--profile", "rmt_tiny", "--output", str(tmp_path)])
    assert list(BACKENDS) == before
    found = [(row["model"], row["pass"], row["contender"]) for row in rows]
    assert found == [
        (*key, x) for key in itertools.product(dense.OURS, dense.PASSES) for x in dense.contenders_of(*key)
    ]
    assert all(row["ms"] > 0 and row["parameters, million"] > 10 for row in rows)
    assert "Self CPU" in capsys.readouterr().out
    assert (tmp_path / "profile.txt").exists()
    assert "## rmt_tiny, forward and backward" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_dense_is_for_the_cpu(capsys):
    with pytest.raises(SystemExit):
        dense.main(["--dtype", "bfloat16"])
    assert "for the CPU and float32" in capsys.readouterr().err


def test_a_kind_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        attention.main(["--kinds", "full,round"])
    assert "got round" in capsys.readouterr().err


def test_a_backend_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        models.main(["--backends", "auto,fast"])
    assert "choose from auto, triton, native, lowrank, tiled" in capsys.readouterr().err


@pytest.mark.parametrize("case", [case for case in CASES if case.kind in ("fixed_decomposed", "fixed", "gaussian")])
def test_the_authors_formulas_give_the_same(case, monkeypatch):
    monkeypatch.setitem(BACKENDS, models.AUTHORS, models._Authors())
    grid = Grid(3, 4, 0 if case.is_axial else 1)
    q, k, v = torch.randn(3, 2, 3, grid.num_tokens, 8)
    decay = case.build(make_gates(case, 2, 3, grid.num_tokens, torch.float32), 3, grid)
    out, expected = (decay_attention(q, k, v, decay, backend=backend) for backend in (models.AUTHORS, "math"))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_calls(capsys):
    """Triton must be there; no GPU."""
    pytest.importorskip("triton")
    calls.main(["--rounds", "2"])
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{name}{what}" for name in calls.CASES for what in ("", ", with gradients")
    ]


def test_the_zoo_has_every_model_and_its_tables_stand_on_the_pages():
    assert set(zoo.PUBLISHED) == {*sd.list_models(), *zoo.PEERS}
    rows = zoo.read(sorted(zoo.RESULTS.glob("cpu-*/zoo"))[-1])
    assert [row["model"] for row in rows] == list(zoo.PUBLISHED)
    for name, table in zoo.tables(rows).items():
        assert f"\n\n{table}\n\n<!-- end -->" in zoo.PAGES[name].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "rmt_tiny" else pytest.mark.slow) for name in zoo.PUBLISHED]
)
def test_the_zoo_counts_what_is_there(name):
    (row,) = (row for row in zoo.read(sorted(zoo.RESULTS.glob("cpu-*/zoo"))[-1]) if row["model"] == name)
    found = zoo.counts(name)
    assert found["parameters"] == int(row["parameters"])
    assert found["GFLOPs"] == pytest.approx(float(row["GFLOPs"]))


@pytest.mark.slow
def test_zoo(tmp_path):
    (row,) = zoo.main(["--quick", "--threads", "1", "--output", str(tmp_path)])
    assert row["images/s"] > 0
    assert row["training MB"] > row["checkpointed MB"] > 0
