"""SDT-P's recipe on made-up latents: on two processes as on one, killed and resumed as unbroken, and its errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import spatial_decay as sd
from examples import train_sdt_p
from examples.latent_folder import LatentFolder, load_batches

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_sdt_p.py"
HAS_FSDP = hasattr(torch.cpu.Stream, "record_event")
FSDP = pytest.param("fsdp", marks=pytest.mark.skipif(not HAS_FSDP, reason="FSDP2 needs torch >= 2.7 on a CPU"))
TINY = {"num-classes": 10, "dim": 24, "depth": 2, "num-heads": 2, "batch-size": 4, "lr": 0.01, "ema-decay": 0.9}
TINY |= {"log-every": 1, "checkpoint-every": 4, "steps": 16, "workers": 0}
STEPS = TINY["steps"]  # three epochs of the 22 latents


pytestmark = pytest.mark.usefixtures("one_cpu")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    random = np.random.default_rng(0)
    np.save(folder / "a.npy", random.standard_normal((13, 4, 4, 6), dtype=np.float32))
    np.save(folder / "a.labels.npy", random.integers(10, size=13))
    rest = {"latents": torch.from_numpy(random.standard_normal((9, 4, 4, 6))), "labels": torch.arange(9)}
    save_file(rest, folder / "b.safetensors")
    return folder


def arguments(latents, out, *flags, **options):
    """Of the command line: TINY, but options."""
    named = TINY | {name.replace("_", "-"): value for name, value in options.items()}
    pairs = [f"--{name}={value}" for name, value in ({"latents": latents, "out": out} | named).items()]
    return [*pairs, *flags]


@contextmanager
def torchrun(folder, script, *arguments):
    """Two processes of a script; if they have not ended when the block ends, they and torchrun are killed."""
    # torchrun gives its processes sessions of their own, so that they would outlive its group.
    pids = folder / "pids"
    (folder / "start.sh").write_text(f'echo $$ >> "{pids}"\nexec "$@"\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command += ["sh", str(folder / "start.sh"), sys.executable, str(script), *arguments]
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pids.unlink(missing_ok=True)
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
            for pid in pids.read_text().split() if pids.exists() else ():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def run_two(folder, script, *arguments):
    """What two processes print."""
    with torchrun(folder, script, *arguments) as process:
        code = process.wait(timeout=120)
    output = (folder / "output").read_text()
    assert code == 0, output
    return output


def losses(out):
    rows = [row.split(",") for row in (out / "losses.csv").read_text().splitlines()]
    assert rows.pop(0) == ["step", "loss"]
    assert [int(step) for step, _ in rows] == list(range(1, len(rows) + 1))
    return [float(loss) for _, loss in rows]


# One import for two processes, and no torchrun, which imports torch once more.
SCRIPT = """\
import functools, os, sys
import torch.distributed as dist
sys.path.insert(0, {examples!r})
import train_sdt_p
other = os.fork()
rank = int(other == 0)
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
start = functools.partial(dist.init_process_group, rank=rank, world_size=2)
for out, arguments in {runs!r}:
    dist.init_process_group = functools.partial(start, init_method=f"file://{{out}}.store")
    train_sdt_p.main(arguments)
if other:
    assert os.waitpid(other, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def unbroken(latents, tmp_path_factory):
    """parallel -> the folder of a run on two processes; one launch for all, whose import takes longest."""
    folder = tmp_path_factory.mktemp("unbroken")
    outs = {parallel: folder / parallel for parallel in (["ddp", "fsdp"] if HAS_FSDP else ["ddp"])}
    runs = [(str(out), arguments(latents, out, parallel=parallel)) for parallel, out in outs.items()]
    (folder / "script.py").write_text(SCRIPT.format(examples=str(EXAMPLE.parent), runs=runs))
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(folder / "script.py")],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return outs


@pytest.fixture
def finished(unbroken, tmp_path):
    """A run of its own to spoil."""
    return shutil.copytree(unbroken["ddp"], tmp_path / "run")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("parallel", ["ddp", FSDP])
def test_two_processes_lose_as_one(parallel, unbroken, latents, tmp_path):
    two, one = unbroken[parallel], tmp_path / "one"
    train_sdt_p.main(arguments(latents, one, parallel=parallel))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert len(losses(one)) == STEPS
    # What would hide a wrong gradient: a model that does not learn.
    assert np.mean(losses(one)[-4:]) < 0.9 * np.mean(losses(one)[:4])
    # As a whole: where a gradient is all rounding, as that of the keys' bias, AdamW makes a step of it.
    states = [load_file(out / "ema.safetensors") for out in (one, two)]
    averages = [torch.cat([state[name].flatten() for name in sorted(state)]) for state in states]
    assert (averages[0] - averages[1]).norm() < 1e-3 * averages[0].norm()


@pytest.mark.parametrize("parallel", [FSDP])
def test_sharded_training_is_replicated_training(parallel, unbroken):
    assert losses(unbroken[parallel]) == pytest.approx(losses(unbroken["ddp"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [FSDP])
def test_a_killed_run_resumes_to_the_unbroken_one(parallel, unbroken, latents, tmp_path):
    out = tmp_path / "run"
    checkpoints = out / "checkpoints"
    with torchrun(tmp_path, EXAMPLE, *arguments(latents, out, parallel=parallel, steps=10**6, workers=1)) as process:
        until = time.monotonic() + 120
        while not list(checkpoints.glob("step-????????")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "output").read_text()
    # What a kill can leave at its worst: half a row, and half a checkpoint.
    with (out / "losses.csv").open("a") as file:
        file.write("99,0.1")
    (checkpoints / "step-00000999.incomplete").mkdir()

    output = run_two(tmp_path, EXAMPLE, *arguments(latents, out, "--resume", parallel=parallel, workers=1))
    assert 4 <= int(re.search(r"resumed from .*step-(\d{8})$", output, flags=re.MULTILINE)[1]) < STEPS
    assert (out / "losses.csv").read_text() == (unbroken[parallel] / "losses.csv").read_text()
    assert (out / "ema.safetensors").read_bytes() == (unbroken[parallel] / "ema.safetensors").read_bytes()
    assert names(checkpoints) == ["step-00000012", "step-00000016"]


@pytest.mark.parametrize("parallel", [FSDP])
def test_resume_on_another_number_of_processes(parallel, unbroken, latents, tmp_path):
    out = shutil.copytree(unbroken[parallel], tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-00000016")
    before = losses(out)
    train_sdt_p.main(arguments(latents, out, "--resume", parallel="ddp"))  # two, sharded -> one, not sharded
    assert losses(out)[:12] == before[:12]
    assert losses(out) == pytest.approx(before, rel=1e-5)
    assert names(out / "checkpoints") == ["step-00000012", "step-00000016"]


def test_a_finished_run_goes_on_with_more_steps(finished, latents, capsys):
    before = losses(finished)
    train_sdt_p.main(arguments(latents, finished, "--resume", steps=STEPS + 4))
    assert losses(finished)[:STEPS] == before
    assert len(losses(finished)) == STEPS + 4
    assert "resumed from" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.* multi-threaded, use of fork:DeprecationWarning")
def test_groups_of_weight_decay_and_workers_resume_to_the_last_bit(latents, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"weight_decay": 0.1, "depth": 1}
    train_sdt_p.main(arguments(latents, whole, steps=8, **options))
    train_sdt_p.main(arguments(latents, parts, steps=4, **options))
    train_sdt_p.main(arguments(latents, parts, "--resume", steps=8, workers=1, **options))
    for name in ("losses.csv", "ema.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_final_weights_load(finished):
    with safe_open(finished / "ema.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    model = sd.SDTP(**config)
    report = sd.load_checkpoint(model, finished / "ema.safetensors")
    assert report.is_complete
    assert len(report.loaded) == len(model.state_dict())
    assert not torch.equal(model.head.weight, torch.zeros_like(model.head.weight))
    x, t, y = torch.randn(2, 4, 4, 6), torch.tensor([5, 5]), torch.tensor([3, 10])  # a class, and no class
    assert model.eval().forward_with_cfg(x, t, y, 4.0).shape == (2, 4, 4, 6)


def test_resume_without_a_checkpoint_begins(latents, tmp_path, capsys):
    train_sdt_p.main(arguments(latents, tmp_path / "run", "--resume", steps=1, checkpoint_every=1))
    assert "from the beginning" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ([], {}, "--out must be new: got a run with .*step-00000016. Pass --resume"),
        (["--resume"], {"steps": 8}, "--steps must be >= 16, where .* is already: got 8"),
        (
            ["--resume"],
            {"lr": 0.1, "decay": "none"},
            "with its own settings: .*lr: 0.01 there, 0.1 here; decay: {'kind': 'full', .*} there, {'kind': 'none'}",
        ),
    ],
)
def test_runs_that_cannot_be_resumed_stay_as_they_were(flags, options, message, finished, latents):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train_sdt_p.main(arguments(latents, finished, *flags, **options))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_other_latents_are_other_settings(finished, latents, tmp_path):
    other = shutil.copytree(latents, tmp_path / "other")
    np.save(other / "a.labels.npy", np.arange(13) % 10)
    with pytest.raises(ValueError, match="with its own settings: .*labels_crc32"):
        train_sdt_p.main(arguments(other, finished, "--resume"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(finished, latents):
    before = losses(finished)
    newest = finished / "checkpoints" / "step-00000016"
    for path in newest.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"__0_0.distcp, .* is missing, .*: remove \S+step-00000016 to go"):
        train_sdt_p.main(arguments(latents, finished, "--resume"))
    assert losses(finished) == before
    shutil.rmtree(newest)
    train_sdt_p.main(arguments(latents, finished, "--resume"))
    assert losses(finished) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 3}, r"labels must be 0 .. 2: got"),
        ({"patch_size": 4}, r"multiples of --patch-size 4: got 4 x 6"),
    ],
)
def test_bad_latents_stop_before_anything_is_written(options, message, latents, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_sdt_p.main(arguments(latents, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_without_a_checkpoint(latents, tmp_path):
    with pytest.raises(RuntimeError, match="the loss must be finite: got (nan|inf) between steps"):
        train_sdt_p.main(arguments(latents, tmp_path / "run", lr=1e30))
    assert not (tmp_path / "run" / "ema.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.* multi-threaded, use of fork:DeprecationWarning")
def test_batches_do_not_depend_on_who_loads_them(latents, tmp_path):
    options = train_sdt_p.parse_arguments(arguments(latents, tmp_path, class_dropout_prob=0.5))
    data = LatentFolder(latents, 10)
    whole = list(load_batches(data, options, range(4), range(11)))
    options.workers = 1
    halves = [list(load_batches(data, options, part, range(3, 11))) for part in (range(2), range(2, 4))]
    for *pair, all_ in zip(*halves, whole[3:], strict=True):
        assert all(torch.equal(torch.cat(parts), part) for *parts, part in zip(*pair, all_, strict=True))
    x, noise, timesteps, labels = (torch.cat(part) for part in zip(*whole, strict=True))  # two epochs
    everything = torch.stack([data[i] for i in range(22)])
    for epoch in (0, 1):
        found = (x[22 * epoch :][:22, None] == everything).all((2, 3, 4)).int().argmax(1)
        assert sorted(found.tolist()) == list(range(22))
        assert found.tolist() != list(range(22))
        mine = labels[22 * epoch :][:22]
        assert ((mine == 10) | (mine == data.labels[found])).all()
    assert not torch.equal(x[:22], x[22:])
    assert 0.25 < (labels == 10).float().mean() < 0.75
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    assert len(timesteps.unique()) > 35


def test_ema():
    ema, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    expected = {name: 0.75 * weight + 0.25 * model.state_dict()[name] for name, weight in ema.state_dict().items()}
    train_sdt_p.update_ema(ema, model, 0.75)
    for name, weight in ema.state_dict().items():
        torch.testing.assert_close(weight, expected[name])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "must be a whole number >= 1: got '0'"),
        (["--lr", "-1"], "must be a number, 0 <= number < inf: got '-1'"),
        (["--ema-decay", "1"], "must be a number, 0 <= number < 1: got '1'"),
        (["--decay", "fuller"], "invalid choice: 'fuller'"),
        (["--log-every", "3"], "--steps must be a multiple of --log-every 3: got 16"),
        (["--out", __file__], "must be a folder"),
    ],
)
def test_bad_arguments(more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_sdt_p.main(arguments("latents", "out", *more))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_the_processes_cannot_share(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        train_sdt_p.main(arguments("latents", "out"))
    assert "--batch-size must be a multiple of the 3 processes: got 4" in capsys.readouterr().err
