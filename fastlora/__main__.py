"""``python -m fastlora demo | doctor | bench | tune``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import fastlora


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand a module of `fastlora.cli`."""
    from fastlora.cli import bench, demo, doctor, tune

    parser = argparse.ArgumentParser(
        prog="python -m fastlora",
        description="LoRA linears as fused Triton kernels: see them work, and how fast they are.",
    )
    parser.add_argument("--version", action="version", version=f"fastlora {fastlora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (demo, doctor, bench, tune):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv (Sequence[str] | None): arguments after the program's name; ``sys.argv`` when ``None``.

    Returns:
        int: exit status: 0, or 1 when a check that the command made did not pass.
    """
    if importlib.util.find_spec("rich") is None:
        print("the commands need rich: pip install rich", file=sys.stderr)
        return 2
    args = build_parser().parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
