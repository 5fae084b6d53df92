"""Run every command of docs/guides/train.md in miniature: python -m tests.timm_scripts CLONE [word ...].

CLONE is a clone of huggingface/pytorch-image-models. It is copied without its history, with the page's files beside its
scripts. Images are scikit-learn's digits; --device cpu, few steps and a small batch go behind what the page says, eight
processes become two, and nothing is downloaded. Words choose commands by what they contain.
Needs webdataset and pillow<13, and some 10 minutes on an idle CPU.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

import spatial_decay.integrations.timm  # noqa: F401  the names

PAGE = Path(__file__).parents[1] / "docs/guides/train.md"
ROOT = PAGE.parents[2]
SMALL = {
    "train.py": "--device cpu --img-size 32 --num-classes 10 --workers 1 --batch-size 16 --epochs {epochs} "
    "--warmup-epochs 0 --train-batches-per-epoch 2",
    "validate.py": "--device cpu --img-size 32 --num-classes 10 --workers 1 --batch-size 16",
    "benchmark.py": "--device cpu --img-size 32 --batch-size 4 --num-warm-iter 1 --num-bench-iter 5",
}
# train.py gives DDP a device, and SyncBatchNorm refuses a CPU: both are CUDA's alone.
ON_CPU = """
import torch

class OnCpu(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)

torch.nn.parallel.DistributedDataParallel = OnCpu
"""


def blocks(language: str) -> list[str]:
    """The page's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def files() -> dict[str, str]:
    """Those that the page shows, by the name in their first line."""
    return {text.split()[1]: text for language in ("yaml", "py") for text in blocks(language) if text.startswith("# ")}


def commands() -> list[str]:
    """Each command of a shell block, on one line; those that install and clone left out."""
    found = []
    for block in blocks("sh"):
        before: list[str] = []
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("head="):
                before.append(line)
            elif not line.startswith(("#", "pip", "git", "cd")):
                found.append("\n".join([*before, " ".join(line.split())]))
    return found


def in_miniature(command: str) -> str:
    """The same with our settings behind it."""
    script = next(script for script in SMALL if f"{script} " in f"{command} ")
    small = SMALL[script].format(epochs=2 if "--resume" in command else 1)
    if "torchrun" in command:
        command = re.sub(r"--nproc-per-node \d", "--nproc-per-node 2", command)
        command = re.sub(r"-c \w+\.yaml", r"\g<0> --device-modules spatial_decay.integrations.timm on_cpu", command)
    if "vit_decay" in command:  # timm's weights are not downloaded, and its ViT is told its size
        command, small = command.replace("--pretrained ", ""), small + " --model-kwargs img_size=32"
    # Inductor would take minutes; tests/test_compile.py has it.
    command = command.replace("--torchcompile", "--torchcompile aot_eager")
    command = re.sub(r"\{0000\.\.1023\}\.tar\|1281167|\{00\.\.63\}\.tar\|50000", "{0..1}.tar|160", command)
    return f"{command} {small}"


def write_images(folder: Path) -> None:
    """Digits in folders of classes, and the same in shards."""
    digits = load_digits()
    (folder / "shards").mkdir()
    for split, name, first, end in (("train", "train", 0, 320), ("val", "validation", 320, 400)):
        for shard in range(2):
            with tarfile.open(folder / f"shards/imagenet-{name}-{shard}.tar", "w") as archive:
                for i in range(first + shard, end, 2):
                    path = folder / f"imagenet/{split}/{digits.target[i]}/{i}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pixels = (digits.images[i] * 15).astype("uint8")
                    Image.fromarray(pixels).convert("RGB").resize((48, 48)).save(path)
                    (label := folder / "label").write_text(str(digits.target[i]))
                    archive.add(path, f"{i}.jpg")
                    archive.add(label, f"{i}.cls")


def main(clone: Path, words: list[str]) -> int:
    """Print the end of each output; the exit code says how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "clone"
        shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git"))
        write_images(folder)
        for name, text in files().items():
            (folder / name).write_text(text.replace("sync_bn: true", "sync_bn: false"))
        (folder / "on_cpu.py").write_text(ON_CPU)
        torch.save(timm.create_model("rmt_tiny").state_dict(), folder / "rmt_tiny.pth")  # as rmt_weights.py writes it
        slurm = 'srun() { "$@"; }; scontrol() { echo localhost; }; SLURM_NNODES=1 SLURM_JOB_ID=1\n'
        for command in commands():
            if not all(word in command for word in words):
                continue
            small = in_miniature(command)
            start = time.perf_counter()
            done = subprocess.run(
                ["bash", "-c", f"export PYTHONPATH={ROOT}:$PYTHONPATH; {slurm if 'srun' in small else ''}{small}"],
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            failed += done.returncode != 0
            end = "\n".join(done.stdout.splitlines()[-12:])
            print(f"$ {small}\n{end}\n[exit {done.returncode}, {time.perf_counter() - start:.0f} s]\n", flush=True)
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
