"""Write text with a trained model.

    python -m seqmodels.tools.generate --run runs/quickstart --prompt "def main("
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from seqmodels.errors import InputError, run_main

DESCRIPTION = """\
Continue prompts with the model of a run directory. One prompt is written to the terminal as it grows; several
(--prompt repeated, or --prompts FILE with one a line) are continued together and written one after the other."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.generate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory that train.py made, here or gs://...")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to go on from; repeatable")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a file with one prompt a line")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="tokens to write (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=None, metavar="K", help="draw among the K likeliest")
    parser.add_argument("--top_p", type=float, default=0.95, metavar="P", help="draw among the likeliest that reach P")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds write equal text (default: 0)")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to use (default: the newest)")
    arguments = parser.parse_args(argv)

    prompts = arguments.prompt + _read_prompts(arguments.prompts)
    if not prompts:
        raise InputError("no prompt was given; expected --prompt TEXT or --prompts FILE")
    if arguments.tokens < 1:
        raise InputError(f"--tokens is {arguments.tokens}; expected at least 1")

    # After the command line is known to be right: these imports take seconds.
    from seqmodels.evaluation.generation import Sampling, encode_prompt, generate, until_separator
    from seqmodels.start_up import prepare_jax
    from seqmodels.tools._runs import open_run

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    prepare_jax()
    run = open_run(arguments.run, arguments.step)
    tokenizer = run.job.data.tokenizer
    if tokenizer is None:
        data = type(run.job.data).__name__
        raise InputError(f"{arguments.run} was trained on {data}, whose tokens stand for no text")
    steps = generate(
        run.job.model,
        run.params,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_tokens=arguments.tokens,
        sampling=sampling,
        seed=arguments.seed,
    )
    timed = _Timed(steps)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for piece in tokenizer.decode_stream(until_separator((int(row[0]) for row in timed), tokenizer)):
            print(piece, end="", flush=True)
        print()
    else:
        rows = list(timed)
        for i, prompt in enumerate(prompts):
            text = tokenizer.decode(until_separator((int(row[i]) for row in rows), tokenizer))
            print(f"--- {i + 1} of {len(prompts)}\n{prompt}{text}")
    print(f"step {run.step}, {timed.tokens_per_second * len(prompts):,.0f} tokens/s", file=sys.stderr)


class _Timed:
    """Passes items on, and tells how many a second came after the first (which waits for compilation)."""

    def __init__(self, items: Iterator):
        self._items = items
        self._count, self._start, self._end = 0, 0.0, 0.0

    def __iter__(self) -> Iterator:
        for item in self._items:
            self._end = time.perf_counter()
            self._start = self._start if self._count else self._end
            self._count += 1
            yield item

    @property
    def tokens_per_second(self) -> float:
        elapsed = self._end - self._start
        return (self._count - 1) / elapsed if elapsed else 0.0


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path} cannot be read: {error}") from error


if __name__ == "__main__":
    run_main(main)
