"""What test_parallel.py runs on several processes: python -m tests.integrations.parallel_runs WORLD CHECK ...

One import for all of them: the processes are forks. Each check is a function of this module, called on every process.
"""

import copy
import itertools
import os
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import spatial_decay as sd
from spatial_decay.integrations.parallel import sharding_plan, tensor_plan
from spatial_decay.layers import SpatialDecayAttention
from spatial_decay.models.sdt_p import SDTPBlock

TOLERANCE = 1e-5
"""Of outputs and gradients in float32, to the largest value. bfloat16, by autocast or by the plan, see compare."""
DTYPES = (torch.float32, torch.bfloat16)
IMAGES_OF_NORMS = 4
"""Two a process. Of one image, behind an autograd.Function such as fully_shard's, PyTorch's batch norm has wrong
gradients in evaluation on a CPU (2.6 to 2.15): it takes the gradient for channels-last."""


# Models, each with a batch: (build, arguments of a call). Small numbers, but with every part that is split.


def attention(decay="full", num_heads=4, **options):
    return SpatialDecayAttention(32, num_heads, decay=decay, **options), (torch.randn(2, 4, 6, 32),)


def masked(decay):
    """A mask with a number for each head, and prefix tokens."""
    attn = SpatialDecayAttention(32, 4, decay=decay, num_prefix_tokens=2, qk_norm=True, lpe_kernel_size=3)
    mask = nn.Parameter(torch.randn(1, 4, 26, 26))
    return attn, (torch.randn(2, 26, 32), (4, 6), mask)


def block():
    return sd.SDTBlock(32, 4, init_values=0.5, gate_rank=3, qk_norm=True), (torch.randn(2, 4, 6, 32),)


def sdt_h():
    decay = ["decomposed", "fixed_decomposed", "bidirectional"]
    model = sd.SDTH(5, embed_dims=(16, 32, 32), depths=(1, 1, 2), num_heads=4, decay=decay, drop_path_rate=0.0)
    return model, (torch.randn(IMAGES_OF_NORMS, 3, 48, 64),)


def rmt():
    model = sd.models.rmt_tiny(
        5,
        embed_dims=(16, 32),
        depths=(1, 1),
        num_heads=4,
        mlp_ratios=3,
        init_values=0.5,
        decay=[sd.kinds.FixedDecomposed(), sd.kinds.Fixed()],
        drop_path_rate=0.0,
    )
    return model, (torch.randn(IMAGES_OF_NORMS, 3, 32, 48),)


def vit():
    model = sd.ViT(
        5,
        img_size=32,
        patch_size=8,
        dim=32,
        depth=2,
        num_heads=4,
        decay="full",
        num_registers=2,
        qk_norm=True,
        init_values=0.5,
    )
    return model, (torch.randn(2, 3, 32, 48),)


def locatvit():
    model = sd.models.locatvit_tiny(5, img_size=32, patch_size=8, dim=32, depth=2, num_heads=4)
    return model, (torch.randn(2, 3, 32, 32),)


def sdt_p():
    model = sd.SDTP(8, num_classes=5, dim=32, depth=2, num_heads=4, class_dropout_prob=0.0)
    _stir(model)
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([3, 999]), torch.tensor([0, 4]))


def timm_vit():
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=4, num_classes=5, qk_norm=True
    )
    sd.swap_attention(model, sd.kinds.Full(gate_bias_init=0.0), lpe_kernel_size=3, gate_rank=3)
    return model, (torch.randn(2, 3, 64, 64),)


def transformers_vit(decay=None):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=64, num_labels=5, hidden_dropout_prob=0.0)
    )
    sd.swap_attention(model, sd.kinds.OneDimensional(gate_bias_init=0.0) if decay is None else decay, gate_rank=3)
    return model, (torch.randn(2, 3, 64, 64),)


def beit():
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.BeitForImageClassification(
        transformers.BeitConfig(
            **sizes,
            image_size=64,
            num_labels=5,
            use_relative_position_bias=True,
            hidden_dropout_prob=0.0,
            drop_path_rate=0.0,
        )
    )
    sd.swap_attention(model, "fixed")
    return model, (torch.randn(2, 3, 64, 64),)


def transformers_of(name):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")(config)
    sd.swap_attention(model, sd.kinds.Full(gate_bias_init=0.0))
    return model, (torch.randn(2, 3, 64, 64),)


MODELS = {
    **{kind: lambda kind=kind: attention(kind) for kind in sd.kinds.KINDS},
    "masked full": lambda: masked("full"),
    "masked fixed": lambda: masked("fixed"),
    "block": block,
    "sdt_h": sdt_h,
    "rmt": rmt,
    "vit": vit,
    "locatvit": locatvit,
    "sdt_p": sdt_p,
    "timm": timm_vit,
    "transformers": transformers_vit,
    "transformers gaussian": lambda: transformers_vit("gaussian"),
    "transformers none": lambda: transformers_vit("none"),
    "beit": beit,
    "dinov2": lambda: transformers_of("Dinov2"),
    "siglip": lambda: transformers_of("SiglipVision"),
}


@torch.no_grad()
def _stir(model):
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)


def made(name):
    """The same on every process."""
    torch.manual_seed(0)
    model, arguments = MODELS[name]()
    return model, arguments


def output_of(model, arguments, dtype=torch.float32):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(*arguments)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return out.float()


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model, arguments=()):
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"argument {i}": x.grad for i, x in enumerate(arguments) if getattr(x, "grad", None) is not None}


def assert_close(found, wanted, tolerance, what):
    """Relative to a tensor's largest value; some are 0 but for rounding, hence the largest of all too."""
    assert found.keys() == wanted.keys(), {*found} ^ {*wanted}
    largest = max(value.abs().max().item() for value in wanted.values())
    for name, value in wanted.items():
        scale = max(value.abs().max().item(), largest / 20)
        error = (found[name].detach() - value).abs().max().item() / scale
        WORST[what] = max(WORST.get(what, 0.0), error)
        assert error <= tolerance, f"{what}, {name}: {error:.2g} of {scale:.2g}"


def assert_no_farther(found, alone, truth, what):
    """In norm, of all tensors together: bfloat16 adds over other images on each process, and so rounds otherwise."""
    assert found.keys() == alone.keys() == truth.keys()

    def distance(values):
        squares = [(values[name].detach() - value).square().sum() for name, value in truth.items()]
        return torch.stack(squares).sum().sqrt().item() / torch.linalg.vector_norm(flat(truth)).item()

    errors = distance(found), distance(alone)
    WORST[what] = max(WORST.get(what, 0.0), errors[0] / errors[1])
    assert errors[0] <= 2 * errors[1], f"{what}: {errors[0]:.2g} from float32, one process {errors[1]:.2g}"


def flat(values):
    return torch.cat([value.detach().flatten() for value in values.values()])


WORST = {}


def part_of(x, rank, size):
    """This process's part of an argument, a leaf."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().chunk(size)[rank].clone().requires_grad_(x.requires_grad)


def compare(name, change, *, dtype=torch.float32, dp_mesh=None, param_dtype=None):
    """One process against all: change(model) makes it parallel; dp_mesh: its processes share the batch."""
    model, arguments = made(name)
    for module in model.modules():
        if dp_mesh is not None and isinstance(module, nn.BatchNorm2d):
            module.eval()  # each process has statistics of its own, as under DDP
    is_float = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in arguments]
    arguments = [x.requires_grad_() if is_it else x for x, is_it in zip(arguments, is_float, strict=True)]
    other, exact = change(copy.deepcopy(model)), copy.deepcopy(model)
    if param_dtype is not None:  # the same policy, alone
        alone = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("all", "alone"))["alone"]
        model = shard(model, alone, param_dtype)
    size, rank = (1, 0) if dp_mesh is None else (dp_mesh.size(), dp_mesh.get_local_rank())
    mine = [part_of(x, rank, size) for x in arguments]
    out = output_of(model, arguments, dtype)
    weights = torch.linspace(-1, 1, out[0].numel()).view_as(out[0]).expand_as(out)  # the images do not cancel
    (out * weights).sum().backward()
    found = output_of(other, mine, dtype)
    (found * weights.chunk(size)[rank] * size).sum().backward()  # fully_shard takes the mean
    of_mine = {"out": out.detach().chunk(size)[rank]}
    given = (mine, arguments) if size == 1 else ((), ())
    of_all, of_one = gradients(other, given[0]), gradients(model, given[1])
    if dtype == torch.float32 and param_dtype is None:
        assert_close({"out": found}, of_mine, TOLERANCE, f"{name} output")
        assert_close(of_all, of_one, TOLERANCE, f"{name} gradient")
        return other
    right = output_of(exact, arguments := [part_of(x, 0, 1) for x in arguments])
    (right * weights).sum().backward()
    assert_no_farther({"out": found}, of_mine, {"out": right.detach().chunk(size)[rank]}, f"{name} output")
    assert_no_farther(of_all, of_one, gradients(exact, arguments if size == 1 else ()), f"{name} gradient")
    return other


def split(model, mesh):
    return parallelize_module(model, mesh, tensor_plan(model, mesh))


def shard(model, mesh, param_dtype=None):
    for modules, policy in sharding_plan(model, param_dtype=param_dtype):
        fully_shard(modules, mesh=mesh, mp_policy=policy)
    return model


def split_and_shard(model, mesh, param_dtype=None):
    return shard(split(model, mesh["tp"]), mesh["dp"], param_dtype)


def mesh_of(dp):
    return init_device_mesh("cpu", (dp, dist.get_world_size() // dp), mesh_dim_names=("dp", "tp"))


def compile_blocks(model):
    for block in [module for module in model.modules() if isinstance(module, (sd.SDTBlock, SDTPBlock))]:
        # Sizes that vary are more than DTensors of torch 2.15 can be traced with.
        block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=False)
    return model


def checkpoint_blocks(model):
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    (enable or model.set_grad_checkpointing)()
    return model


# Checks. Each is called on every process with the words behind its name.


def tensor_parallel(*names):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in names or MODELS:
        for dtype in DTYPES:
            compare(name, lambda model: split(model, mesh), dtype=dtype)


def sharded(*names):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in names or BATCHED:
        for dtype in (None, torch.bfloat16):
            compare(name, lambda model, dtype=dtype: shard(model, mesh, dtype), dp_mesh=mesh, param_dtype=dtype)


def two_dimensions(*names):
    mesh = mesh_of(2)
    for name in names or BATCHED:
        for dtype in (None, torch.bfloat16):
            compare(
                name,
                lambda model, dtype=dtype: split_and_shard(model, mesh, dtype),
                dp_mesh=mesh["dp"],
                param_dtype=dtype,
            )


def on_top(plan, *names):
    """Gradient checkpointing on a plan, and torch.compile where the blocks are ours."""
    mesh = mesh_of({"split": 1, "sharded": dist.get_world_size(), "both": 2}[plan])
    change = {
        "split": lambda model: split(model, mesh["tp"]),
        "sharded": lambda model: shard(model, mesh["dp"]),
        "both": lambda model: split_and_shard(model, mesh),
    }[plan]
    for name in names:
        torch._dynamo.reset()
        compare(
            name,
            lambda model: change(compile_blocks(checkpoint_blocks(model))),
            dp_mesh=None if plan == "split" else mesh["dp"],
        )


def float32_gates():
    """What bf16 of the plan reaches: linear layers, and not gates and batch norms."""
    mesh, seen = init_device_mesh("cpu", (dist.get_world_size(),)), {}

    def note(module, _args, _out):
        seen.setdefault(type(module).__name__.removeprefix("FSDP"), set()).update(
            weight.dtype for weight in module.parameters(recurse=False)
        )

    for name in ("sdt_h", "locatvit"):
        model, arguments = made(name)
        shard(model, mesh, torch.bfloat16)
        for module in model.modules():
            module.register_forward_hook(note, prepend=True)
        model(*arguments)
    assert {seen["ContextAwareGate"].pop(), seen["_PreciseLinear"].pop(), seen["BatchNorm2d"].pop()} == {torch.float32}
    assert seen["Linear"] == {torch.bfloat16}


def filled_empty():
    """Sharded on the meta device, where nothing has values, and filled by to_empty: new layers begin as ever."""
    for decay in ("full", "1d", "learned"):
        wanted = SpatialDecayAttention(32, 4, decay=decay).decay.state_dict()
        with torch.device("meta"):
            attn = shard(SpatialDecayAttention(32, 4, decay=decay), mesh_of(2)["dp"])
        attn.to_empty(device="cpu")
        found = {name: whole(value) for name, value in attn.decay.state_dict().items()}
        assert found.keys() == wanted.keys()
        assert all(0 < value.abs().max() < 10 for value in found.values()), found  # NaN is not
        if decay == "learned":  # which are no random numbers
            assert_close(found, wanted, TOLERANCE, decay)


def steps():
    """AdamW with clipped gradients: whole weights after three steps as on one process."""
    line, mesh = init_device_mesh("cpu", (dist.get_world_size(),)), mesh_of(2)
    for change in (lambda model: split(model, line), lambda model: split_and_shard(model, mesh)):
        model, arguments = made("sdt_p")
        other = change(copy.deepcopy(model))  # the whole batch on all: the mean over processes is it
        norms = []
        for each in (model, other):
            optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3, eps=1e-3, foreach=True)
            for _ in range(3):
                each(*arguments).square().mean().backward()
                norms.append(whole(nn.utils.clip_grad_norm_(each.parameters(), 0.1)).item())
                optimizer.step()
                optimizer.zero_grad()
        assert max(abs(a - b) for a, b in zip(norms[:3], norms[3:], strict=True)) < 1e-5 * max(norms), norms
        states = [{name: whole(x).detach() for name, x in each.state_dict().items()} for each in (other, model)]
        assert_close(*states, 1e-5, "weights")


def checkpoints(folder):
    """Saved under one mesh and loaded under others, and on one process without any plan."""
    meshes = {"split": mesh_of(1), "both": mesh_of(2), "sharded": mesh_of(dist.get_world_size()), "none": None}

    def trained(mesh):
        torch.manual_seed(0)
        model = MODELS["sdt_h"]()[0]
        model = model if mesh is None else split_and_shard(model, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(0)
        model(torch.randn(2, 3, 48, 64)).square().mean().backward()
        optimizer.step()
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    def tensors(state):
        moments = {f"{name} {key}": x for name, of in state["optimizer"]["state"].items() for key, x in of.items()}
        return {name: x.detach() for name, x in (state["model"] | moments).items()}

    def flat(state):
        return {name: whole(x).float().clone() for name, x in tensors(state).items()}

    states = {name: trained(mesh) for name, mesh in meshes.items()}
    wanted = {name: flat(state) for name, state in states.items()}
    saved = [name for name, mesh in meshes.items() if mesh is not None]
    for name in saved:
        dcp.save(states[name], checkpoint_id=f"{folder}/{name}")
    for name, (other, state) in itertools.product(saved, states.items()):
        if other != name:
            for x in tensors(state).values():
                x.fill_(7)
            dcp.load(state, checkpoint_id=f"{folder}/{name}", no_dist=other == "none")
            found = flat(state)
            assert all(torch.equal(found[key], x) for key, x in wanted[name].items()), (name, other)


def training(folder, *arguments):
    """examples/train_sdt_p.py among these processes."""
    import train_sdt_p

    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    destroy, train_sdt_p.start_processes = dist.destroy_process_group, lambda: torch.device("cpu")
    dist.destroy_process_group = lambda: None
    train_sdt_p.main([f"--latents={folder}/latents", *arguments])
    dist.destroy_process_group = destroy


def copies():
    """A copy of a model with a plan computes the same."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, arguments = made("sdt_p")
    copied = copy.deepcopy(split(model, mesh))
    assert torch.equal(copied(*arguments), model(*arguments))


BATCHED = [name for name in MODELS if not name.startswith("masked")]


def run(folder, rank, world, checks):
    """On one process; what went wrong is printed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for check in checks:
        name, *arguments = check.split("|")
        globals()[name](*arguments)
    if rank == 0:  # the errors met
        print({what: f"{error:.1e}" for what, error in WORST.items()})
    dist.barrier()
    dist.destroy_process_group()


def main(world, *checks):
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(int(world)):
            children.append(os.fork())
            if children[-1] == 0:
                code = 1
                try:
                    run(folder, rank, int(world), checks)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
        codes = [os.waitpid(child, 0)[1] for child in children]  # of all of them
        sys.exit(any(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
