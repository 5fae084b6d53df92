"""Plans for many GPUs: PyTorch's tensor parallelism over heads, and what its fully_shard wraps (FSDP2)."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from spatial_decay.integrations.styles import (
    DepthwiseByChannels,
    FusedByHeads,
    HeadsOfAttention,
    HeadsOfHost,
    Local,
    TokensIn,
)
from spatial_decay.layers import ContextAwareGate, ConvMlp, SpatialDecayAttention
from spatial_decay.layers.core import AttentionCore
from spatial_decay.layers.gaussian import GaussianGate
from spatial_decay.layers.rates import TrainedRates
from spatial_decay.models import SDTP
from spatial_decay.models.sdt_p import SDTPBlock
from spatial_decay.swap.decayed import AddedDecay
from spatial_decay.swap.hosts.base import class_names
from spatial_decay.swap.options import check_is_model, wrapped_part

__all__ = ["sharding_plan", "tensor_plan"]

Plan = dict[str, ParallelStyle]


def tensor_plan(model: nn.Module, mesh: DeviceMesh) -> Plan:
    """What parallelize_module does with each module: attention by heads, MLPs by channels.

    Queries, keys, values, gates, LPE and output gate go with their heads, an MLP with its depthwise convolution by
    channels, the projections behind them by rows; SDT-P's modulation by its outputs. What else the model has is whole
    on each process. All parameters are DTensors in the end, by the names, shapes and order of the model, which state
    dicts, optimizers, torch.distributed.checkpoint and fully_shard take. Activations stay plain tensors.

    Args:
        model: A SpatialDecayAttention, SDTBlock, SDTH, ViT or SDTP, or anything that has some; or a model of timm
            (layers.Attention) or transformers (ViT and its copies, DINOv2, CLIP, SigLIP, BEiT) after swap_attention.
            It is not changed. All processes must have it; the first one's weights count.
        mesh: Of one dimension, such as mesh["tp"]: the p processes that share the heads. They must be given the same
            data and, for dropout and stochastic depth, have the same seed.

    Returns:
        A style for each module, by name, for torch.distributed.tensor.parallel.parallelize_module.

    Raises:
        TypeError: the model is no module, or has attention or layers that are not known to split.
        ValueError: the mesh has more dimensions, or does not divide the heads or the channels of an MLP; the model has
            nothing to split, is wrapped already, or has one parameter in two modules.

    Examples:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> plan = tensor_plan(model, mesh["tp"])  # doctest: +SKIP
        >>> parallelize_module(model, mesh["tp"], plan)  # doctest: +SKIP
    """
    check_is_model(model)
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension: got {mesh.ndim}. Pass one of them, such as mesh['tp'].")
    _check_not_wrapped(model)
    _check_to_split(model)
    if not any(isinstance(module, AttentionCore) for module in model.modules()):
        raise ValueError("the model must have attention with decay to split: found none. swap_attention comes before.")
    plan: Plan = {}
    for name, module in model.named_modules():
        if isinstance(module, SpatialDecayAttention):
            found = _attention(module, name, mesh.size())
        elif isinstance(added := getattr(module, "spatial_decay", None), AddedDecay):
            found = _host_attention(module, added, name, mesh.size())
        elif isinstance(module, ConvMlp) or _is_host_mlp(module):
            found = _mlp(module, name, mesh.size())
        elif isinstance(module, (SDTPBlock, SDTP)):
            found = {"modulation": ColwiseParallel(output_layouts=Replicate())}
        else:
            continue
        plan |= {".".join(filter(None, (name, inner))): style for inner, style in found.items()}
    others = [name for name, module in model.named_modules() if module._parameters and name not in plan]
    return plan | {name: Local() for name in others}


def sharding_plan(
    model: nn.Module, *, param_dtype: torch.dtype | None = None
) -> list[tuple[list[nn.Module], MixedPrecisionPolicy]]:
    """What fully_shard (FSDP2) wraps, in its order: gates and batch norms where they stay float32, blocks, the model.

    Args:
        model: As in tensor_plan, before or after it. It is not changed.
        param_dtype: What is computed in, such as torch.bfloat16; gradients are added in float32. None: the parameters'
            own. The decay's gates and batch norms compute in their own in any case.

    Returns:
        Modules that are gathered together, and the policy for them. Call fully_shard for each.

    Raises:
        TypeError: the model is no module.
        ValueError: it has no attention with decay, or is wrapped already.

    Examples:
        >>> model = ViT(img_size=32, dim=48, depth=2, num_heads=3, decay="full")
        >>> for modules, policy in sharding_plan(model):
        ...     print([type(module).__name__ for module in modules])
        ['SDTBlock']
        ['SDTBlock']
        ['ViT']
    """
    check_is_model(model)
    _check_not_wrapped(model)
    cores = {name: module for name, module in model.named_modules() if isinstance(module, AttentionCore)}
    if not cores:
        raise ValueError("the model must have attention with decay: found none. Use fully_shard as for any other.")
    policy, groups = MixedPrecisionPolicy(), list[tuple[list[nn.Module], MixedPrecisionPolicy]]()
    if param_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        precise = [list(core.decay.children()) for core in cores.values()]
        precise += [[module] for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        groups += [(modules, MixedPrecisionPolicy(cast_forward_inputs=False)) for modules in precise if modules]
    blocks = dict.fromkeys(_block_of(model, name) for name in cores)
    groups += [([model.get_submodule(name)], policy) for name in blocks if name]
    return [*groups, ([model], policy)]


_TIMM = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
_TRANSFORMERS = tuple(
    f"transformers.models.{name}"
    for name in (
        "beit.modeling_beit.BeitAttention",
        "clip.modeling_clip.CLIPAttention",
        "deit.modeling_deit.DeiTAttention",
        "dinov2.modeling_dinov2.Dinov2Attention",
        "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention",
        "ijepa.modeling_ijepa.IJepaAttention",
        "siglip.modeling_siglip.SiglipAttention",
        "vit.modeling_vit.ViTAttention",
        "vit_mae.modeling_vit_mae.ViTMAEAttention",
        "vit_msn.modeling_vit_msn.ViTMSNAttention",
    )
)


def _attention(attn: SpatialDecayAttention, name: str, size: int) -> Plan:
    linear = {"qkv": FusedByHeads(), "proj": RowwiseParallel()}
    norms: Plan = {part: Local(summed=("weight", "bias")) for part in ("q_norm", "k_norm")}
    return {"": TokensIn()} | _linear(attn, name, linear) | _with_parameters(attn, norms) | _core(attn, name, size)


def _host_attention(attn: nn.Module, added: AddedDecay, name: str, size: int) -> Plan:
    """Between its projections the host's code works on DTensors, and counts all heads."""
    if {*_TIMM}.intersection(class_names(attn)) and not _with_parameters(attn, {"gate": Local(), "norm": Local()}):
        linear: Plan = {
            "qkv": FusedByHeads(head_dim=added.num_channels // added.decay.num_heads),
            "proj": RowwiseParallel(),
        }
    elif {*_TRANSFORMERS}.intersection(class_names(attn)):
        linear = {part: Local(rows=("weight", "bias"), heads=2) for part in ("q_proj", "k_proj", "v_proj")}
        linear["o_proj" if hasattr(attn, "o_proj") else "out_proj"] = RowwiseParallel()
    else:
        raise TypeError(
            f"attention must be of a class that is known to split: got {added.of_class} at "
            f"{name or 'the root'!r}. Known are {', '.join([_TIMM[0], *_TRANSFORMERS])}; not variants with gates, "
            "norms or rotary embedding between the projections. Use sharding_plan, which takes all."
        )
    norms: Plan = {part: Local(summed=("weight", "bias"), heads=1) for part in ("q_norm", "k_norm")}
    core = {f"spatial_decay.{inner}": style for inner, style in _core(added, name, size).items()}
    plan = {"": TokensIn(), "spatial_decay": HeadsOfHost()} | _linear(attn, name, linear)
    return plan | _with_parameters(attn, norms) | core


def _core(core: AttentionCore, name: str, size: int) -> Plan:
    _check_divides(core.decay.num_heads, size, "heads", name)
    plan: Plan = {"attention": HeadsOfAttention(core.decay.num_heads)}
    for part, module in core.decay.named_children():
        if isinstance(module, (ContextAwareGate, TrainedRates)):
            plan[f"decay.{part}"] = Local(rows=("weight", "bias"))
        elif isinstance(module, GaussianGate):  # the heads share its two linear layers
            summed = Local(summed=("weight", "bias"))
            plan |= {f"decay.{part}.{inner}": summed for inner, _ in module.named_children()}
        else:
            raise TypeError(
                f"a kind of decay must have gates, trained rates or a Gaussian to be split: got "
                f"{type(module).__name__} at {name or 'the root'!r}, of kind {core.decay.kind.name!r}. Use "
                "sharding_plan, which takes all."
            )
    if core.lpe is not None:
        plan["lpe.conv"] = DepthwiseByChannels()
    if core.output_gate is not None:
        plan["output_gate"] = Local(rows=("up",), summed=("down",))
    return plan


def _mlp(mlp: nn.Module, name: str, size: int) -> Plan:
    plan = _linear(mlp, name, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    _check_divides(mlp.get_parameter("fc1.weight").shape[0], size, "channels", name)
    return plan | ({"conv.conv": DepthwiseByChannels()} if isinstance(mlp, ConvMlp) and mlp.conv is not None else {})


def _is_host_mlp(module: nn.Module) -> bool:
    """Two linear layers and what is done to each channel alone between them."""
    cls = type(module)
    is_known = "timm.layers.mlp.Mlp" in class_names(module)[:1] or (
        cls.__module__.startswith("transformers.models.") and cls.__name__.endswith("MLP")
    )
    inside = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    return is_known and inside == {"fc1", "fc2"}


def _linear(module: nn.Module, name: str, styles: Plan) -> Plan:
    """The same, after a look at what the styles are for."""
    for part in styles:
        found = module.get_submodule(part)
        if type(found) is not nn.Linear:
            raise TypeError(
                f"{part} must be torch.nn.Linear to be split: got {type(found).__module__}.{type(found).__name__} at "
                f"{name or 'the root'!r}. Merge adapters before the plan; quantised layers cannot be split."
            )
    return styles


def _with_parameters(module: nn.Module, styles: Plan) -> Plan:
    """Of those submodules that are there and have parameters."""
    parts = dict(module.named_children())
    return {
        part: style for part, style in styles.items() if part in parts and any(True for _ in parts[part].parameters())
    }


def _block_of(model: nn.Module, name: str) -> str:
    """The nearest element of a list of modules around the named attention; the attention itself where there is none."""
    block = name
    while block:
        above = block.rpartition(".")[0]
        if isinstance(model.get_submodule(above), (nn.ModuleList, nn.Sequential)):
            return block
        block = above
    return name


def _check_divides(count: int, size: int, what: str, name: str) -> None:
    if count % size:
        raise ValueError(
            f"the number of processes must divide the {what} of each layer: got {size} processes and {count} {what} at "
            f"{name or 'the root'!r}. Use another mesh, or sharding_plan, which divides any model."
        )


def _check_to_split(model: nn.Module) -> None:
    """Raise where a model cannot be split any more, or not at all."""
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise ValueError(
                f"torch.compile must come after the plan: got a compiled module at {name or 'the root'!r}."
            )
    if split := [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]:
        raise ValueError(
            f"the model must not be split yet: got DTensors such as {split[0]!r}. Build it anew; tensor_plan comes "
            "before fully_shard, and once."
        )
    seen: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if (other := seen.setdefault(id(weight), name)) != name:
            raise ValueError(
                f"each module must have its own parameters to be split: got one for {other!r} and {name!r}. "
                "Untie them, or use sharding_plan."
            )


def _check_not_wrapped(model: nn.Module) -> None:
    if wrapped := wrapped_part(model):
        raise ValueError(f"the model must not be wrapped yet: got {wrapped}.")
