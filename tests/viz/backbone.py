"""A small model whose attention the tests record, on grids behind prefix tokens."""

import torch
from torch import nn

from spatial_decay import SDTBlock, SpatialDecayAttention

DIM, HEADS, SIZE = 8, 2, (3, 4)
AXIAL_KINDS = ("decomposed", "fixed_decomposed")


class Backbone(nn.Module):
    """Two blocks on 2 x 2 patches behind prefix tokens; the second gets its grid and mask by keyword."""

    def __init__(self, decay, num_prefix=0, **options):
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 2, 2)
        self.prefix = nn.Parameter(torch.randn(1, num_prefix, DIM))
        self.first = SDTBlock(DIM, HEADS, decay=decay, num_prefix_tokens=num_prefix, pos_kernel_size=0, **options)
        self.second = SpatialDecayAttention(DIM, HEADS, decay=decay, num_prefix_tokens=num_prefix, **options)

    def forward(self, images, attn_mask=None):
        x = self.embed(images)
        layout = tuple(x.shape[-2:])
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = self.first(x, layout)
        return x + self.second(x, attn_mask=attn_mask, layout=layout)


def make(decay, num_prefix=0, dtype=torch.float64):
    model = Backbone(decay, num_prefix).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:
            nn.init.normal_(parameter)
    height, width = SIZE
    return model, torch.randn(2, 3, 2 * height, 2 * width, dtype=dtype)
