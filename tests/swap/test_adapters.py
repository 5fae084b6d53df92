"""LoRA of PEFT beside the gates of a swapped model: trained together, saved together, and read again exactly."""

import peft
import pytest
import torch

import spatial_decay as sd
from tests.swap.hosts import HOSTS

BY_NAME = {host.name: host for host in HOSTS}


def swapped(host):
    torch.manual_seed(0)
    model = host.make()
    sd.swap_attention(model, sd.kinds.Full(gate_bias_init=0.5), layers=[0], gate_rank=4)
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of transformers, which PEFT still asks
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("timm vit_tiny_patch16_224", ["qkv"]),
        ("transformers ViT", ["q_proj", "v_proj"]),
        ("transformers ViT", "all-linear"),
    ],
    ids=str,
)
def test_gates_are_trained_and_saved_beside_lora(name, targets, tmp_path):
    host = BY_NAME[name]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["spatial_decay"])
    adapted, images = peft.get_peft_model(swapped(host), config), host.images((64, 64))
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    gates = [name for name in trained if ".spatial_decay." in name]
    assert len(gates) == len([n for n, _ in swapped(host).named_parameters() if ".spatial_decay." in n])
    assert all("lora_" in name for name in trained if name not in gates)
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    host.run(adapted, images).square().sum().backward()
    torch.optim.Adam(trained.values(), lr=0.02).step()
    assert all(not torch.equal(before[name], trained[name]) for name in gates)

    adapted.eval().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = peft.PeftModel.from_pretrained(swapped(host), tmp_path).eval()
    with torch.no_grad():
        expected = host.run(adapted, images)
        assert torch.equal(host.run(again, images), expected)
        assert not torch.allclose(host.run(swapped(host).eval(), images), expected, atol=1e-3)
        merged = again.merge_and_unload()  # a swapped model without PEFT
        torch.testing.assert_close(host.run(merged, images), expected, rtol=1e-4, atol=1e-5)
    assert not any(module.__class__.__module__.startswith("peft") for module in merged.modules())
