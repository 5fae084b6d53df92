"""Backend `native`."""
