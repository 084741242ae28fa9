"""python -m gcp: the command line."""

from gcp.cli import main
from seqmodels.errors import run_main

if __name__ == "__main__":
    run_main(main)
