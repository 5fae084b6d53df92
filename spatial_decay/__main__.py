"""The command line: what is installed and works here, and a picture of a model of your own.

python -m spatial_decay                                      versions, devices, backends, and a self-check
python -m spatial_decay demo photo.jpg --model folder        how far each patch of the photograph looks
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spatial_decay.command import CommandError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: As after the name of the program; None: those of this process.

    Returns:
        The exit status: 0; 1, a backend gives other numbers than the equations written out; 2, input that cannot be
        used, after one line on the standard error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m spatial_decay",
        description="Without a command: versions, devices, which backends run here, why others cannot, a self-check.",
    )
    parser.add_argument("--all", action="store_true", help="check the backends too that have to compile first")
    commands = parser.add_subparsers(dest="command", metavar="[demo]")
    demo = commands.add_parser(
        "demo", help="draw how far each patch of a photograph looks", description="Draw a reach map of a trained model."
    )
    demo.add_argument("photo", type=Path, help="an image file")
    demo.add_argument("--model", type=Path, help="a folder of save_swapped, or of integrations.hub.save_pretrained")
    demo.add_argument("--layers", type=int, nargs="+", metavar="N", help="which to draw, from 0 (four, evenly spread)")
    demo.add_argument("--out", type=Path, default=Path("reach.png"), help="the picture to write (reach.png)")
    given = parser.parse_args(arguments)
    try:
        if given.command == "demo":
            from spatial_decay.command.demo import draw

            print(draw(given.photo, given.model, given.out, given.layers))
            return 0
        return _report(is_full=given.all)
    except CommandError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _report(*, is_full: bool) -> int:
    from spatial_decay.command import check, report

    for line in report.lines():
        print(line)
    print("\nSelf-check: the largest difference to the equations written out in float64, over the largest value")
    failed = []
    for found in check.comparisons(is_full=is_full):
        print(f"  {found}", flush=True)  # a process that is killed here has said how far it came
        failed += [] if found.is_good else [f"{found.backend} on {found.device}"]
    if failed:
        print(f"NOT as they should be: {', '.join(dict.fromkeys(failed))}. Please report this with all of the above.")
        return 1
    print("All agree." if is_full else "All agree. flex and triton_autotune, taken by name only, are checked by --all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
