"""What `python -m spatial_decay` does: the report, the self-check, the demo. Imported by nothing else."""

__all__ = ["CommandError"]


class CommandError(Exception):
    """Input that a command cannot use; its message is the one line that the user sees."""
