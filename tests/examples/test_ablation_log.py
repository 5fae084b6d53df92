"""The log of ablation.py: rows that outlive a kill, several writers, and results that must not be mixed."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import Timeout

from ablation_log import Key, Result, RunLog
from run_log import LogError, TrainingError, check_loss, write_whole

CONFIG = {"epochs": 3, "sizes": (40, 56)}
COLUMNS = "config,model,positions,decay,seed,after,size,accuracy,loss,seconds,date,torch,machine"
ROW = "HASH,vit,learned,full,0,training,28,71.25,0.5,1.5,d,t,m"
RESULT = Result(accuracy=71.25, loss=0.5, seconds=1.5, date="2026-11-26", torch="2.15", machine="x, 2 CPUs")


def key(seed, decay="full, alpha 0.2"):
    return Key("vit", "learned", decay, seed, "training", 28)


def test_rows_come_back_as_they_were(tmp_path):
    log = RunLog(tmp_path / "new" / "log", CONFIG)
    assert log.results() == {}
    log.add(key(0), RESULT)
    log.add(key(1), RESULT)
    again = RunLog(tmp_path / "new" / "log", CONFIG)
    assert again.results() == log.results() == {key(0): RESULT, key(1): RESULT}
    lines = log.path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == COLUMNS
    assert len(lines) == 3


def test_a_row_is_written_once(tmp_path):
    log = RunLog(tmp_path, CONFIG)
    log.add(key(0), RESULT)
    before = log.path.read_bytes()
    log.add(key(0), RESULT)
    assert log.path.read_bytes() == before


def test_wherever_a_row_is_cut_off_the_others_stay(tmp_path):
    log = RunLog(tmp_path, CONFIG)
    log.add(key(0), RESULT)
    one = log.path.read_bytes()
    log.add(key(1), RESULT)
    two = log.path.read_bytes()
    log.add(key(2), RESULT)
    three = log.path.read_bytes()
    header, machine = len(COLUMNS) + 1, len('"x, 2 CPUs"\n')
    cuts = (0, 1, header - 2, header - 1, header, header + 9, len(one) - machine - 1, len(one) - machine, len(one) - 2)
    for length in (*cuts, len(one) - 1, len(one), len(one) + 1, len(two) - machine, len(two) - 1):
        log.path.write_bytes(two[:length])
        kept = RunLog(tmp_path, CONFIG)
        num_whole = (length >= len(one) - 1) + (length >= len(two) - 1)  # a row is whole without its end
        assert kept.results() == dict.fromkeys([key(0), key(1)][:num_whole], RESULT)
        assert log.path.read_bytes() == two[:length]  # reading changes nothing
        for seed in range(3):
            kept.add(key(seed), RESULT)
        assert kept.path.read_bytes() == three


def test_another_configuration_is_refused_and_nothing_changed(tmp_path):
    log = RunLog(tmp_path, CONFIG)
    log.add(key(0), RESULT)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(LogError, match=r"got others, epochs: 3 there, 5 here. Give the same arguments"):
        RunLog(tmp_path, CONFIG | {"epochs": 5})
    (tmp_path / "config.json").unlink()  # a CSV alone, as it may lie in a repository
    with pytest.raises(LogError, match=r"runs.csv must have results of this configuration, .*: got "):
        RunLog(tmp_path, CONFIG | {"epochs": 5})
    assert RunLog(tmp_path, CONFIG).results() == {key(0): RESULT}
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "must have the columns config, model"),
        (b"a,b", "must have the columns config, model, .*: got a, b. Give"),
        (f"{COLUMNS}\n{ROW}\n1,2\n".encode(), "must have 13 fields in each line: got 2 in line 3. Mend"),
        (f"{COLUMNS}\n{ROW}\n\n".encode(), "must have 13 fields in each line: got 0 in line 3. Mend"),
        (f"{COLUMNS}\n{ROW.replace('71.25', 'high')}\n".encode(), "must have numbers .*: line 2, .*'high'. Mend"),
        (f"{COLUMNS}\n{ROW.replace('71.25', 'nan')}\n".encode(), "line 2, accuracy must be finite: got nan. Mend"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    log = RunLog(tmp_path, CONFIG)
    log.path.write_bytes(content.replace(b"HASH", log.hash.encode()))
    with pytest.raises(LogError, match=message):
        RunLog(tmp_path, CONFIG)


def test_a_result_without_a_number_is_none():
    with pytest.raises(ValueError, match="accuracy must be finite: got nan"):
        replace(RESULT, accuracy=math.nan)
    assert math.isnan(replace(RESULT, loss=math.nan).loss)  # of what was measured without a training


def test_a_loss_that_is_no_number_is_an_error():
    check_loss("vit-0", 0.5)
    with pytest.raises(TrainingError, match="of vit-0 must be finite: got nan. Nothing of this training is kept"):
        check_loss("vit-0", math.nan)


@pytest.mark.parametrize("content", ["{", "[1]", "null"])
def test_a_damaged_configuration_is_refused(tmp_path, content):
    RunLog(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(LogError, match="config.json must be as it was written"):
        RunLog(tmp_path, CONFIG)


def test_the_configuration_can_be_read(tmp_path):
    RunLog(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {"epochs": 3, "sizes": [40, 56]}


def test_a_run_belongs_to_one_process(tmp_path):
    log = RunLog(tmp_path, CONFIG)
    with log.claim("vit-0") as first, RunLog(tmp_path, CONFIG).claim("vit-0") as second, log.claim("vit-1") as other:
        assert (first, second, other) == (True, False, True)
    with log.claim("vit-0") as again:
        assert again


def test_a_lock_that_a_run_itself_waits_for_in_vain_is_named(tmp_path):
    log = RunLog(tmp_path, CONFIG)
    with pytest.raises(Timeout, match="of the run's own"), log.claim("vit-0"):
        raise Timeout("of the run's own")
    with log.claim("vit-0") as again:
        assert again


def test_a_file_that_two_write_at_a_time_is_the_last_ones(tmp_path):
    path = tmp_path / "results.md"

    def slow(part):
        part.write_text("slow")
        write_whole(path, lambda part: part.write_text("fast"))
        assert path.read_text() == "fast"

    write_whole(path, slow)
    assert path.read_text() == "slow"
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_that_cannot_be_written_stays_and_leaves_nothing_over(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("before")

    def full(part):
        part.write_text("a par")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, full)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("results.md", "before")]


WRITER = """
import sys
from pathlib import Path
from ablation_log import Key, Result, RunLog

log = RunLog(Path(sys.argv[1]), {})
for i in range(40):
    log.add(Key("vit", "none", sys.argv[2], i, "training", 28), Result(float(i), 0.0, 0.0, "", "", ""))
"""


@pytest.mark.slow
def test_two_processes_write_one_log(tmp_path):
    examples = Path(__file__).parents[2] / "examples"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, name], cwd=examples) for name in ("a", "b")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    results = RunLog(tmp_path, {}).results()
    assert {(k.decay, k.seed): r.accuracy for k, r in results.items()} == {(d, i): i for d in "ab" for i in range(40)}
