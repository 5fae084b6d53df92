"""What plugs into the models of this library: each client in a few lines, with random weights and no downloads."""

import importlib
import inspect
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import spatial_decay as sd
from tests.clients.models import backbone, check, check_gates, images, timm_backbone, vit

__all__ = ["CLIENTS", "Client"]


@dataclass(frozen=True)
class Client:
    """What is run, and the distribution that it is part of."""

    name: str
    package: str
    run: Callable[[], None]


CLIENTS: list[Client] = []


def client(name: str, package: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorator for a function that raises where the client fails."""

    def add(run: Callable[[], None]) -> Callable[[], None]:
        CLIENTS.append(Client(name, package, run))
        return run

    return add


def _segment(name: str) -> Callable[[], None]:
    def run() -> None:
        smp = importlib.import_module("segmentation_models_pytorch")
        model = getattr(smp, name)("tu-sdt_h_tiny", encoder_weights=None, classes=3)
        out = model(images(size=128))
        check(out, (2, 3, 128, 128))
        check_gates(model, out.square().mean())

    return run


for _name in ("Unet", "FPN", "UPerNet", "DeepLabV3Plus", "PAN"):
    client(f"segmentation_models_pytorch {_name}", "segmentation-models-pytorch")(_segment(_name))


@client("transformers UperNet", "transformers")
def _upernet() -> None:
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    config = UperNetConfig(backbone_config=timm_backbone(), hidden_size=16, num_labels=3, use_auxiliary_head=False)
    model = UperNetForSemanticSegmentation(config)
    out = model(images(), labels=torch.randint(3, (2, 64, 64)))
    check(out.logits, (2, 3, 64, 64))
    check_gates(model, out.loss)


_TRANSFORMER = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_FFN = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}


@client("transformers DETR", "transformers")
def _detr() -> None:
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(backbone_config=timm_backbone(), num_labels=3, **_TRANSFORMER, **_HEADS, **_FFN)
    model = DetrForObjectDetection(config)
    out = model(images())
    check(out.pred_boxes, (2, 5, 4))
    check_gates(model, out.logits.square().mean())


@client("transformers RT-DETR", "transformers")
def _rt_detr() -> None:
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    config = RTDetrConfig(
        backbone_config=timm_backbone(out_indices=(1, 2, 3)),
        encoder_in_channels=[128, 256, 512],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        d_model=32,
        decoder_layers=1,
        num_queries=5,
        num_denoising=0,
        num_labels=3,
        **_HEADS,
        **_FFN,
    )
    model = RTDetrForObjectDetection(config)
    out = model(images(size=128))
    check(out.pred_boxes, (2, 5, 4))
    check_gates(model, out.logits.square().mean())


def _mask_former(name: str, task: str, **options: object) -> Callable[[], None]:
    def run() -> None:
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, f"{name}Config")(backbone_config=timm_backbone(), num_labels=3, **options)
        model = getattr(transformers, f"{name}For{task}Segmentation")(config)
        out = model(images())
        check(out.masks_queries_logits, (2, 100, 16, 16))
        check_gates(model, out.masks_queries_logits.square().mean())

    return run


client("transformers MaskFormer", "transformers")(_mask_former("MaskFormer", "Instance"))
client("transformers Mask2Former", "transformers")(
    _mask_former("Mask2Former", "Universal", decoder_layers=2, encoder_layers=1)
)


class _Pyramid(nn.Module):
    """The maps of a backbone through torchvision's feature pyramid."""

    def __init__(self) -> None:
        super().__init__()
        timm = importlib.import_module("timm")
        ops = importlib.import_module("torchvision.ops")
        self.body = timm.create_model("sdt_h_tiny", features_only=True)
        self.pyramid = ops.FeaturePyramidNetwork(self.body.feature_info.channels(), 16)
        self.out_channels = 16

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid({str(i): features for i, features in enumerate(self.body(x))})


@client("torchvision Mask R-CNN", "torchvision")
def _mask_rcnn() -> None:
    detection = importlib.import_module("torchvision.models.detection")
    anchors = importlib.import_module("torchvision.models.detection.anchor_utils")
    ops = importlib.import_module("torchvision.ops")
    model = detection.MaskRCNN(
        _Pyramid(),
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=anchors.AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        mask_roi_pool=ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
    )
    mask = torch.zeros(1, 64, 96)
    mask[:, 8:40, 8:40] = 1
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1]), "masks": mask}
    check_gates(model, sum(model([torch.rand(3, 64, 96)], [target]).values()))
    model.eval()([torch.rand(3, 64, 96)])


def _generate(transformer: nn.Module, pipeline: str, **prompts: torch.Tensor) -> None:
    """Images of a whole pipeline, from prompts that are embedded already: the text encoders are not ours."""
    diffusers = importlib.import_module("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, shift_factor=0.0)
    parts = {"transformer": transformer, "vae": vae, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    cls = getattr(diffusers, pipeline)
    pipe = cls(**dict.fromkeys(inspect.signature(cls).parameters) | parts)
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        sizes = {"height": 16, "width": 24, "num_inference_steps": 2}
        return pipe(**prompts, **sizes, output_type="pt", generator=noise).images

    plain = run()
    sd.swap_attention(pipe.transformer, sd.kinds.Full(gate_bias_init=0.0))
    images = run()
    check(images, (1, 3, 16, 24))
    if torch.equal(images, plain):
        raise AssertionError("a strong decay must change the images: they are the same")


_SMALL = {"num_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 12}


@client("diffusers StableDiffusion3Pipeline", "diffusers")
def _stable_diffusion_3() -> None:
    diffusers = importlib.import_module("diffusers")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8, caption_projection_dim=16, **_SMALL
    )
    text, pooled = torch.randn(1, 5, 16), torch.randn(1, 12)
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    _generate(transformer, "StableDiffusion3Pipeline", **given, **{f"negative_{name}": -x for name, x in given.items()})


@client("diffusers FluxPipeline", "diffusers")
def _flux() -> None:
    diffusers = importlib.import_module("diffusers")
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_single_layers=1, attention_head_dim=16, axes_dims_rope=(4, 6, 6), **_SMALL
    )
    _generate(transformer, "FluxPipeline", prompt_embeds=torch.randn(1, 5, 16), pooled_prompt_embeds=torch.randn(1, 12))


@client("PEFT LoRA and gates", "peft")
def _peft() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(vit(), LoraConfig(target_modules=["qkv"], modules_to_save=["spatial_decay"]))
    check_gates(model, model(images()).square().mean())


@client("Lightning Trainer", "lightning")
def _lightning() -> None:
    lightning = importlib.import_module("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = vit()

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    data = torch.utils.data.TensorDataset(images(4), torch.tensor([0, 1, 2, 3]))
    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
        path = next(Path(folder).rglob("*.ckpt"))
        again = Module.load_from_checkpoint(path, weights_only=False)
    x = images()
    torch.testing.assert_close(again.model.eval()(x), module.model.eval()(x), rtol=0, atol=0)


@client("accelerate", "accelerate")
def _accelerate() -> None:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True, mixed_precision="bf16"), vit()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(images()).float().square().mean())
    check_gates(accelerator.unwrap_model(model))
    optimizer.step()


@client("captum IntegratedGradients", "captum")
def _captum() -> None:
    attr = importlib.import_module("captum.attr")
    for model in (backbone().eval(), vit().eval()):
        x = images()
        check(attr.IntegratedGradients(model).attribute(x, target=1, n_steps=4), tuple(x.shape))


@client("grad-cam GradCAM", "grad-cam")
def _grad_cam() -> None:
    cam = importlib.import_module("pytorch_grad_cam")
    targets = [importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(1)] * 2
    model, plain = backbone().eval(), vit().eval()
    # Stages of SDT-H have maps (B, H, W, D), blocks of a ViT tokens behind a class token.
    for host, layer, reshape in (
        (model, model.stages[-1], lambda x: x.permute(0, 3, 1, 2)),
        (plain, plain.blocks[-1].norm1, lambda x: x[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)),
    ):
        with cam.GradCAM(host, [layer], reshape_transform=reshape) as explain:
            check(torch.as_tensor(explain(images(), targets=targets)), (2, 64, 64))


@client("torchao int8 weights", "torchao")
def _torchao() -> None:
    quantization = importlib.import_module("torchao.quantization")
    for model in (backbone().eval(), vit().eval()):
        x = images()
        with torch.no_grad():
            expected = model(x)
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
            assert not torch.equal(model(x), expected)
            torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.05)


@client("AOTInductor", "torch")
def _aot_inductor() -> None:
    inductor = importlib.import_module("torch._inductor")
    model, x = vit().eval(), images()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        path = inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        torch.testing.assert_close(inductor.aoti_load_package(path)(x), model(x), rtol=1e-4, atol=1e-4)


def _openvino(model: nn.Module, source: object, sizes: tuple[int, ...], **options: object) -> None:
    openvino = importlib.import_module("openvino")
    converted = openvino.convert_model(source, **options)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in sizes:
        x = images(size=size)
        with torch.no_grad():
            torch.testing.assert_close(torch.as_tensor(compiled(x.numpy())[0]), model(x), rtol=1e-3, atol=1e-3)


@client("OpenVINO, module", "openvino")
def _openvino_module() -> None:
    with torch.no_grad():
        for model in (backbone().eval(), sd.ViT(5, img_size=64, dim=24, depth=1, num_heads=2, decay="gaussian").eval()):
            _openvino(model, model, (64, 96), example_input=images())


@client("OpenVINO, torch.export program", "openvino")
def _openvino_program() -> None:
    model = vit().eval()
    with torch.no_grad():
        _openvino(model, torch.export.export(model, (images(),), strict=False), (64,))


@client("fvcore FlopCountAnalysis", "fvcore")
def _fvcore() -> None:
    fvcore = importlib.import_module("fvcore.nn")
    counted = fvcore.FlopCountAnalysis(sd.sdt_h_tiny().eval(), images(1, 224)).unsupported_ops_warnings(False)
    counted.uncalled_modules_warnings(False)
    if not 2.5e9 < counted.total() < 2.8e9:
        raise AssertionError(f"sdt_h_tiny has 2.65 GFLOPs: got {counted.total()}")


@client("torch.jit.trace", "torch")
def _jit_trace() -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = backbone().eval()
        traced, x = torch.jit.trace(model, images()), images(3, 96)
        torch.testing.assert_close(traced(x), model(x))
