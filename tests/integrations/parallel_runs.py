"""What test_parallel.py runs on several processes: python -m tests.integrations.parallel_runs WORLD CHECK ...

One import for all of them: the processes are forks. Each check is a function of this module, called on every process.
"""

import copy
import os
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import spatial_decay as sd
from spatial_decay.integrations.parallel import sharding_plan, tensor_plan
from spatial_decay.layers import SpatialDecayAttention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""Of outputs and of gradients, relative to the largest value; bf16: autocast, whose sums over heads are rounded."""


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
    return model, (torch.randn(2, 3, 48, 64),)


def rmt():
    model = sd.models.rmt_tiny(5, embed_dims=(16, 32), depths=(1, 1), num_heads=4, mlp_ratios=3, init_values=0.5,
                               decay=[sd.kinds.FixedDecomposed(), sd.kinds.Fixed()], drop_path_rate=0.0)
    return model, (torch.randn(2, 3, 32, 48),)


def vit():
    model = sd.ViT(5, img_size=32, patch_size=8, dim=32, depth=2, num_heads=4, decay="full", num_registers=2,
                   qk_norm=True, init_values=0.5)
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

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=4, num_classes=5,
                              qk_norm=True)
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
        transformers.BeitConfig(**sizes, image_size=64, num_labels=5, use_relative_position_bias=True,
                                hidden_dropout_prob=0.0, drop_path_rate=0.0)
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


def loss_of(out):
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_close(found, wanted, dtype, what):
    scale = wanted.abs().max().clamp(min=1e-3)
    error = ((found - wanted).abs().max() / scale).item()
    assert error <= TOLERANCE[dtype], f"{what}: {error:.2g} of {scale:.2g}"


def gradients(model, arguments=()):
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"argument {i}": x.grad for i, x in enumerate(arguments) if getattr(x, "grad", None) is not None}


def compare(name, dtype, change, share=lambda arguments: arguments, average=None):
    """One process against all: change(model) makes it parallel, share(arguments) is this process's batch."""
    model, arguments = made(name)
    other, others_arguments = copy.deepcopy(model), copy.deepcopy(arguments)
    for x in (*arguments, *others_arguments):
        if x.__class__ is torch.Tensor and x.is_floating_point():
            x.requires_grad_()
    out = output_of(model, arguments, dtype)
    loss_of(out).backward()
    wanted = gradients(model, arguments)
    other = change(other)
    found_out = output_of(other, others_arguments, dtype)
    loss_of(found_out).backward()
    assert_close(found_out, out, dtype, f"{name} output")
    found = gradients(other, others_arguments)
    assert found.keys() == wanted.keys(), {*found} ^ {*wanted}
    for key, value in wanted.items():
        assert_close(found[key], value, dtype, f"{name} gradient of {key}")
    return other


def split(model, mesh):
    return parallelize_module(model, mesh, tensor_plan(model, mesh))


def tensor_parallel():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype in TOLERANCE:
        for name in MODELS:
            try:
                compare(name, dtype, lambda model: split(model, mesh))
                if dist.get_rank() == 0: print("ok", name, dtype)
            except Exception as e:
                if dist.get_rank() == 0:
                    import traceback; traceback.print_exc(limit=-4) if not isinstance(e, AssertionError) else None
                    print("FAIL", name, dtype, str(e)[:300])


def main():
    world, checks = int(sys.argv[1]), sys.argv[2:]
    folder = tempfile.mkdtemp()
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                                        timeout=timedelta(seconds=60))
                for check in checks:
                    globals()[check]()
                dist.destroy_process_group()
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(); sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
