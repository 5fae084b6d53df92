"""Put spatial decay into a trained timm ViT, freeze everything else, and train the gates alone on scanned digits.

    python examples/swap_timm.py                  # decay `full`, a minute on two CPU cores
    python examples/swap_timm.py --decay 1d       # another kind

No weights are downloaded, so that the ViT is first trained for a few epochs itself; with yours, that is
timm.create_model(name, pretrained=True). 1,797 images of 8 x 8 pixels come with scikit-learn.
Needs the extra [demo].
"""

import argparse
from collections.abc import Iterable, Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import spatial_decay as sd
from command_line import at_least
from digits import load_data

BATCH_SIZE = 50
MODEL = {
    "img_size": 8,
    "patch_size": 1,
    "in_chans": 1,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 10,
}


def train(
    model: nn.Module,
    weights: Iterable[nn.Parameter],
    data: tuple[Tensor, ...],
    *,
    epochs: int,
    rate: float,
    name: str,
) -> None:
    """AdamW on these weights, with a learning rate that falls to zero along a cosine."""
    images, labels = data
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    steps = epochs * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    model.train()
    for _ in trange(epochs, desc=name):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: tuple[Tensor, ...]) -> tuple[float, float]:
    """Mean loss in nats, and accuracy in percent."""
    images, labels = data
    logits = model.eval()(images)
    return F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decay", default="full", choices=("full", "1d", "bidirectional"), help="a kind with gates")
    parser.add_argument("--epochs", type=at_least(1), default=12, help="of the ViT, then as many of its gates")
    parser.add_argument("--seed", type=at_least(0), default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    train_data, test_data = (part.tensors for part in load_data())

    model = timm.create_model("vit_tiny_patch16_224", **MODEL)
    nn.init.normal_(model.pos_embed, std=0.3)  # as large as the embedding of one pixel
    train(model, model.parameters(), train_data, epochs=options.epochs, rate=2e-3, name="the ViT")
    print("the ViT            test loss {:.6f}, accuracy {:.2f} %".format(*evaluate(model, test_data)))

    print(sd.swap_attention(model, options.decay))
    print("swapped            test loss {:.6f}, accuracy {:.2f} %".format(*evaluate(model, test_data)))

    gates = []
    for name, weight in model.named_parameters():
        weight.requires_grad = ".spatial_decay." in name
        gates += [weight] if weight.requires_grad else []
    biases = [weight for weight in gates if weight.ndim == 1]
    began = torch.cat(biases).detach().clone()
    trained, total = (sum(weight.numel() for weight in some) for some in (gates, model.parameters()))
    print(f"training {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)")
    train(model, gates, train_data, epochs=options.epochs, rate=2e-2, name="its gates")
    print("gates trained      test loss {:.6f}, accuracy {:.2f} %".format(*evaluate(model, test_data)))
    ended = torch.cat(biases)
    print(f"the gates' biases began at {began.max():g}, and lie between {ended.min():.3f} and {ended.max():.3f} now")


if __name__ == "__main__":
    main()
