"""Put spatial decay into diffusers' DiT, train the gates of it alone, and save and load it as diffusers does.

    python examples/swap_diffusers_dit.py

A small DiTTransformer2DModel learns to denoise scikit-learn's scanned digits; then it gets a decay, which starts from
the behaviour that it has, and only its gates go on learning. With yours, begin with
DiTTransformer2DModel.from_pretrained("facebook/DiT-XL-2-256", subfolder="transformer").
Needs the extras [demo,hf].
"""

import argparse
import tempfile
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from tqdm import trange

import spatial_decay as sd
from command_line import at_least
from digits import load_all

BATCH_SIZE = 100
MODEL = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 3,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 16,
}


def denoising_loss(model: nn.Module, scheduler: DDPMScheduler, images: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of the predicted noise at random steps."""
    noise = torch.randn_like(images)
    steps = torch.randint(scheduler.config.num_train_timesteps, (len(images),))
    predicted = model(scheduler.add_noise(images, noise, steps), timestep=steps, class_labels=labels).sample
    return F.mse_loss(predicted, noise)


def train(
    model: nn.Module,
    weights: Iterable[nn.Parameter],
    data: tuple[Tensor, Tensor],
    *,
    epochs: int,
    rate: float,
    name: str,
) -> None:
    images, labels = data
    scheduler, optimizer = DDPMScheduler(), torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    model.train()
    for _ in trange(epochs, desc=name):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            optimizer.zero_grad()
            denoising_loss(model, scheduler, images[batch], labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The loss over the first 500 images, with the same noise every time; class embeddings are not dropped."""
    images, labels = (x[:500] for x in data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return denoising_loss(model.eval(), DDPMScheduler(), images, labels).item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=at_least(1), default=8, help="of the DiT, then as many of its gates")
    parser.add_argument("--seed", type=at_least(0), default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    images, labels = load_all()
    data = 2 * images - 1, labels

    model = DiTTransformer2DModel(**MODEL)
    train(model, model.parameters(), data, epochs=options.epochs, rate=1e-3, name="the DiT")
    print(f"the DiT            loss {evaluate(model, data):.5f}")

    print(sd.swap_attention(model, "full"))
    print(f"swapped            loss {evaluate(model, data):.5f}")

    gates = []
    for name, weight in model.named_parameters():
        weight.requires_grad = ".spatial_decay." in name
        gates += [weight] if weight.requires_grad else []
    trained, total = (sum(weight.numel() for weight in some) for some in (gates, model.parameters()))
    print(f"training {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)")
    train(model, gates, data, epochs=options.epochs, rate=2e-2, name="its gates")
    print(f"gates trained      loss {evaluate(model, data):.5f}")

    with tempfile.TemporaryDirectory() as folder:
        sd.save_swapped(model, folder)
        again = sd.load_swapped(DiTTransformer2DModel, folder)
    print(f"saved and loaded   loss {evaluate(again, data):.5f}")


if __name__ == "__main__":
    main()
