"""The installed package is a wheel's, and has a kernel for CPUs that agrees with the equations written out."""

from pathlib import Path

import torch

import spatial_decay as sd
from spatial_decay.ops.native import library

where = Path(sd.__file__).parent
assert "site-packages" in where.parts, where
assert (where / "py.typed").exists(), where
assert library.reason() is None, library.reason()
q, k, v = torch.randn(3, 2, 3, 35, 40)
decay = sd.decay.ManhattanDecay(-torch.rand(2, 3, 35), sd.Grid(5, 7))
expected, got = (sd.decay_attention(q, k, v, decay, backend=backend) for backend in ("math", "native"))
torch.testing.assert_close(got, expected)
shape = tuple(sd.SDTBlock(8, 2)(torch.zeros(1, 2, 3, 8)).shape)
print(f"wheel {sd.__version__} gives {shape}, and has {', '.join(library.variants())}")
