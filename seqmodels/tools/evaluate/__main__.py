"""python -m seqmodels.tools.evaluate: the command line."""

from seqmodels.errors import run_main
from seqmodels.tools.evaluate.command import main

if __name__ == "__main__":
    run_main(main)
