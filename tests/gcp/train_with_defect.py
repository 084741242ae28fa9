"""train.py with a defect in one process: DEFECT is "RANK:STEP", step 0 for the start.

A job file's `program`, for tests of what becomes of the other processes.
"""

import os

import jax

import train
from seqmodels.errors import run_main

RANK, STEP = map(int, os.environ["DEFECT"].split(":"))
ordinary_train, ordinary_loop = train.train, train.training_loop


def fail_at(step: int) -> None:
    if step == STEP and jax.process_index() == RANK:
        raise TypeError(f"a defect at step {step}")


def train_with_defect(job, run):
    fail_at(0)
    return ordinary_train(job, run)


def loop_with_defect(state, batches, *, start, train_step, **more):
    step = start

    def step_with_defect(state, batch):
        nonlocal step
        step += 1
        fail_at(step)
        return train_step(state, batch)

    return ordinary_loop(state, batches, start=start, train_step=step_with_defect, **more)


if __name__ == "__main__":
    train.train, train.training_loop = train_with_defect, loop_with_defect
    run_main(train.main)
