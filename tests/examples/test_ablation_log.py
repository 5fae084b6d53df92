"""The log of ablation.py: rows that outlive a kill, several writers, and results that must not be mixed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ablation_log import Key, LogError, Result, RunLog

CONFIG = {"epochs": 3, "sizes": (40, 56)}
COLUMNS = "config,model,positions,decay,seed,after,size,accuracy,loss,seconds,date,torch,machine"
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
    header = len(COLUMNS) + 1
    for length in (0, 1, header - 1, header, header + 9, len(one) - 1, len(one), len(one) + 1, len(two) - 1):
        log.path.write_bytes(two[:length])
        kept = RunLog(tmp_path, CONFIG)
        assert kept.results() == ({key(0): RESULT} if length >= len(one) else {})
        kept.add(key(0), RESULT)
        kept.add(key(1), RESULT)
        assert kept.path.read_bytes() == two


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
        (COLUMNS.encode() + b"\n1,2\n", "must have the columns"),
        (f"{COLUMNS}\nHASH,vit,learned,full,0,training,28,high,1,1,d,t,m\n".encode(), "must have numbers"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    log = RunLog(tmp_path, CONFIG)
    log.path.write_bytes(content.replace(b"HASH", log.hash.encode()))
    with pytest.raises(LogError, match=message):
        RunLog(tmp_path, CONFIG)


def test_a_damaged_configuration_is_refused(tmp_path):
    RunLog(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
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
