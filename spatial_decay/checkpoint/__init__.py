"""The authors' published weights into this library's models: files are read, names translated, all checked first."""

from spatial_decay.checkpoint.load import CheckpointReport, load_checkpoint
from spatial_decay.checkpoint.names import ORIGINS, Origin

__all__ = ["ORIGINS", "CheckpointReport", "Origin", "load_checkpoint"]
