"""`python -m kdkernels`: doctor says what is here, validate whether it is right, bench how fast it is."""

import argparse
import os
import sys
from importlib import import_module

COMMANDS = {
    "doctor": "what is installed, which backend each operator will use and why, and a self-check",
    "validate": "every operator, backend, method and dtype against float64",
    "bench": "the microbenchmarks: medians, ratios, achieved rates, peak memory",
    "host-overhead": "what a call costs the host, beside plain PyTorch's own cost of the same",
}


def parser() -> argparse.ArgumentParser:
    """Of every command; `run` of what it parses carries it out."""
    top = argparse.ArgumentParser(prog="python -m kdkernels", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        module = import_module(f"kdkernels.cli.{name.replace('-', '_')}")
        subparser = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return top


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
