"""Other libraries' interfaces to the backbones: each file needs an extra, and is imported only when asked for."""
