"""Stand-in."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB.toml")


def run(arguments: argparse.Namespace) -> int:
    print("preflight", arguments.job)
    return 0
