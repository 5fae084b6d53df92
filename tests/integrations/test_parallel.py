"""Plans for several processes against one: outputs, gradients, steps, checkpoints and training; and their errors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

import spatial_decay as sd
from spatial_decay.integrations.parallel import sharding_plan, tensor_plan

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 needs torch >= 2.7 on a CPU"
)


def on_processes(world, *checks):
    """Functions of parallel_runs on so many processes; what the first one prints."""
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.parallel_runs", str(world), *checks],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_two_processes_compute_as_one():
    on_processes(2, "tensor_parallel|full|sdt_p", "copies")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "world"), [("tensor_parallel", 2), ("tensor_parallel", 4), ("sharded", 2), ("two_dimensions", 4)]
)
def test_every_model_on_every_plan(check, world):
    on_processes(world, check)


@pytest.mark.slow
def test_what_was_sharded_on_the_meta_device_has_first_values():
    on_processes(2, "filled_empty")


@pytest.mark.slow
def test_steps_of_an_optimizer():
    on_processes(4, "steps", "float32_gates")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "check"),
    [
        (2, "on_top|split|sdt_p|sdt_h|locatvit|timm|transformers"),
        (2, "on_top|sharded|sdt_p|sdt_h|locatvit|timm|transformers"),
        (4, "on_top|both|sdt_p|timm"),
    ],
)
def test_gradient_checkpointing_and_compile_on_top(world, check):
    on_processes(world, check)


@pytest.mark.slow
def test_checkpoints_load_under_other_meshes_and_without_a_plan(tmp_path):
    on_processes(4, f"checkpoints|{tmp_path}")


@pytest.mark.slow
def test_training_under_tensor_parallelism_loses_as_one_process(tmp_path):
    (tmp_path / "latents").mkdir()
    random = np.random.default_rng(0)
    np.save(tmp_path / "latents" / "a.npy", random.standard_normal((22, 4, 4, 6), dtype=np.float32))
    np.save(tmp_path / "latents" / "a.labels.npy", random.integers(10, size=22))
    options = {"num-classes": 10, "dim": 32, "depth": 2, "num-heads": 4, "batch-size": 4, "lr": 0.01, "log-every": 1}
    options |= {"checkpoint-every": 8, "steps": 16, "workers": 0}

    def command(name, *more):
        flags = [f"--{option}={value}" for option, value in options.items()]
        return "|".join(["training", str(tmp_path), f"--out={tmp_path / name}", *flags, *more])

    def losses(name):
        rows = (tmp_path / name / "losses.csv").read_text().splitlines()[1:]
        return [float(row.split(",")[1]) for row in rows]

    # Half on one process, then on four: two shards of two parts.
    split = ("--parallel=fsdp", "--tensor-parallel=2")
    on_processes(1, command("one"), command("resumed", "--steps=8"))
    on_processes(2, command("split", *split))
    on_processes(4, command("resumed", *split, "--grad-checkpointing", "--resume"))
    one = losses("one")
    assert np.mean(one[-4:]) < 0.9 * np.mean(one[:4])
    assert len(one) == 16
    assert losses("split") == pytest.approx(one, rel=1e-5)
    assert losses("resumed") == pytest.approx(one, rel=1e-5)


# One process that stands for several: nothing is sent.


@pytest.fixture
def pretend():
    """world -> a mesh of so many processes, of which this is the first."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(world, *sizes, names=None):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        return init_device_mesh("cpu", sizes or (world,), mesh_dim_names=names)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def attention(**options):
    return sd.SpatialDecayAttention(32, 4, **options)


def test_parts_of_a_process(pretend):
    mesh = pretend(2)
    block = parallelize_module(
        sd.SDTBlock(32, 4, qk_norm=True), mesh, tensor_plan(sd.SDTBlock(32, 4, qk_norm=True), mesh)
    )
    local = {name: tuple(weight.to_local().shape) for name, weight in block.named_parameters()}
    assert local["attn.qkv.weight"] == (96, 16)
    assert local["attn.decay.gate.weight"] == (2, 32)
    assert local["attn.lpe.conv.weight"] == (16, 1, 5, 5)
    assert local["attn.output_gate.up"] == (16, 16)
    assert local["attn.proj.weight"] == (32, 16)
    assert local["mlp.conv.conv.weight"] == (48, 1, 3, 3)
    whole = {name: tuple(weight.shape) for name, weight in sd.SDTBlock(32, 4, qk_norm=True).named_parameters()}
    assert {name: tuple(weight.shape) for name, weight in block.state_dict().items()} == whole
    assert list(block.state_dict()) == list(whole)


def test_a_block_sends_as_often_as_the_docs_say(pretend):
    mesh = pretend(2)
    block = sd.SDTBlock(32, 4)
    parallelize_module(block, mesh, tensor_plan(block, mesh))
    x = torch.randn(2, 4, 6, 32, requires_grad=True)
    with CommDebugMode() as forward:
        out = block(x)
    with CommDebugMode() as backward:
        out.sum().backward()
    count = {str(op).split(".")[-1]: number for op, number in forward.get_comm_counts().items()}
    assert count.pop("all_reduce") == 2, count
    count = {str(op).split(".")[-1]: number for op, number in backward.get_comm_counts().items()}
    assert count.pop("all_reduce") == 3, count  # the third is of the output gate's small matrix


def test_a_mesh_that_does_not_divide(pretend):
    mesh = pretend(3)
    with pytest.raises(ValueError, match="must divide the heads of each layer: got 3 processes and 4 heads at 'attn'"):
        tensor_plan(sd.SDTBlock(32, 4), mesh)
    with pytest.raises(ValueError, match="must divide the channels of each layer: got 3 processes and 64 channels"):
        tensor_plan(sd.SDTBlock(48, 3, mlp_ratio=64 / 48), mesh)
    with pytest.raises(ValueError, match="3 processes and 4 heads at 'the root'"):
        tensor_plan(attention(), mesh)


def test_a_mesh_of_two_dimensions(pretend):
    mesh = pretend(4, 2, 2, names=("dp", "tp"))
    with pytest.raises(
        ValueError, match=r"mesh must have one dimension: got 2. Pass one of them, such as mesh\['tp'\]"
    ):
        tensor_plan(attention(), mesh)


def test_what_is_wrapped_already(pretend):
    mesh = pretend(2)
    split = attention()
    parallelize_module(split, mesh, tensor_plan(split, mesh))
    with pytest.raises(ValueError, match="must not be split yet: got DTensors such as 'qkv.weight'"):
        tensor_plan(split, mesh)
    sharded = sd.SDTBlock(32, 4)
    for modules, policy in sharding_plan(sharded):
        torch.distributed.fsdp.fully_shard(modules, mesh=mesh, mp_policy=policy)
    for plan in (lambda: tensor_plan(sharded, mesh), lambda: sharding_plan(sharded)):
        with pytest.raises(ValueError, match="must not be wrapped yet: got a FSDPModule at 'the root'"):
            plan()
    replicated = nn.parallel.DistributedDataParallel(attention())
    with pytest.raises(ValueError, match="got a DistributedDataParallel at 'the root'"):
        tensor_plan(replicated, mesh)
    with pytest.raises(ValueError, match="torch.compile must come after the plan"):
        tensor_plan(torch.compile(attention()), mesh)


def test_a_swap_after_the_plan(pretend):
    timm = pytest.importorskip("timm")
    mesh = pretend(2)
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    with pytest.raises(ValueError, match="must have attention with decay to split: found none"):
        tensor_plan(model, mesh)
    with pytest.raises(ValueError, match="must have attention with decay: found none"):
        sharding_plan(model)
    sd.swap_attention(model)
    parallelize_module(model, mesh, tensor_plan(model, mesh))
    with pytest.raises(ValueError, match="attention must be swapped before the model is split"):
        sd.swap_attention(model)
    with pytest.raises(ValueError, match="attention must be restored before the model is split"):
        sd.restore_attention(model)


def test_what_cannot_be_split(pretend):
    timm = pytest.importorskip("timm")
    mesh = pretend(2)
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=0, embed_dim=64, num_heads=4)
    sd.swap_attention(model)
    with pytest.raises(TypeError, match=r"class that is known to split: got EvaAttention at 'blocks.0.attn'"):
        tensor_plan(model, mesh)
    adapted = attention()
    adapted.qkv = nn.Sequential(adapted.qkv)
    with pytest.raises(TypeError, match=r"qkv must be torch.nn.Linear to be split: got .*Sequential at 'the root'"):
        tensor_plan(adapted, mesh)
    tied = nn.Sequential(attention(), attention())
    tied[1].qkv.weight = tied[0].qkv.weight
    with pytest.raises(ValueError, match="must have its own parameters to be split: got one for '0.qkv.weight' and"):
        tensor_plan(tied, mesh)
    with pytest.raises(TypeError, match=r"model must be the torch.nn.Module"):
        tensor_plan("vit", mesh)


def test_what_is_sharded():
    model = sd.SDTH(5, embed_dims=(16, 32), depths=(1, 2), num_heads=4, decay=["decomposed", "full"])
    names = {id(module): name for name, module in model.named_modules()}

    def named(plan):
        return [[names[id(module)] for module in modules] for modules, _ in plan]

    blocks = [["stages.0.blocks.0"], ["stages.1.blocks.0"], ["stages.1.blocks.1"], [""]]
    assert named(sharding_plan(model)) == blocks
    plan = sharding_plan(model, param_dtype=torch.bfloat16)
    gates = ["stages.0.blocks.0.attn.decay.gate_h", "stages.0.blocks.0.attn.decay.gate_w"]
    assert named(plan)[0] == gates
    assert named(plan)[-4:] == blocks
    assert [policy.param_dtype for _, policy in plan[-4:]] == [torch.bfloat16] * 4
    assert {policy.param_dtype for _, policy in plan[:-4]} == {None}
