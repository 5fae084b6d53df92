"""Run every client of the table, or those whose names have a word given: python -m tests.clients [word ...]."""

import importlib.metadata
import os
import sys
import time
import warnings

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; asked on import

from tests.clients.table import CLIENTS, Client


def run(client: Client) -> tuple[str, str]:
    """Its version, and "ok" or why not."""
    try:
        version = importlib.metadata.version(client.package)
    except importlib.metadata.PackageNotFoundError:
        return "-", f"not installed: pip install {client.package}"
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            client.run()
    except Exception as error:
        return version, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return version, "ok"


def main(words: list[str]) -> int:
    """Print the table; the exit code says whether one failed."""
    rows = []
    for client in CLIENTS:
        if words and not any(word.lower() in client.name.lower() for word in words):
            continue
        start = time.perf_counter()
        version, result = run(client)
        rows.append((client.name, version, result))
        print(f"{client.name}: {result[:60]} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
    print("| client | version | result |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return int(any(result != "ok" for _, _, result in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
