"""Train a sequence model: flags, config, mesh, data, model, state, step, loop.

    python train.py --config configs/quickstart.gin --run_dir runs/quickstart

The same command goes on where a run was stopped or killed, and says so when the run is finished.
"""

import argparse
import json
import os
from typing import Any

# Before NumPy is loaded: with several threads, small linear algebra on the CPU is a hundred times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

from seqmodels import config
from seqmodels.constructors import register_constructors
from seqmodels.errors import EXIT_DONE, EXIT_RESTART, run_main
from seqmodels.evaluation.generation import Sampling, encode_prompt, generate, until_separator
from seqmodels.files import write_file
from seqmodels.models.accounting import model_costs
from seqmodels.parallel.ending import run_as_one
from seqmodels.parallel.mesh import describe_mesh, replicated, rows_of_process
from seqmodels.parallel.partition import partition_table
from seqmodels.parallel.start_up import add_arguments, start_processes
from seqmodels.start_up import prepare_jax
from seqmodels.training import (
    Checkpointer,
    Report,
    RunDirectory,
    TrainingJob,
    create_state,
    make_evaluator,
    parameter_shapes,
    restore_parameters,
    say,
    shardings_of,
    state_shapes,
    training_loop,
)
from seqmodels.training.run_directory import read_metrics

DESCRIPTION = """\
Train a sequence model as a config file says. The run directory holds all there is to know about the run:
config, checkpoints, metrics.jsonl, TensorBoard events. The same command continues a run that was stopped or
killed, exactly where it was; a finished run is left as it is."""

EPILOG = """\
examples:
  python train.py --config configs/quickstart.gin --run_dir runs/quickstart
  python train.py --config configs/quickstart.gin --run_dir runs/long --gin.train.steps=5000
  python train.py --config configs/quickstart.gin --run_dir gs://BUCKET/runs/quickstart

exit codes:
  0   done
  1   a defect, or a loss or gradient that is not finite
  2   an input is wrong; one line says which
  42  stopped by SIGTERM or Ctrl-C after saving, or a bucket or other processes of the job are out of reach; the same
      command continues
All processes of a job end with the same one."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config.add_arguments(parser)
    parser.add_argument(
        "--run_dir",
        required=True,
        metavar="DIR",
        help="folder of the run, or gs://BUCKET/FOLDER; made when it is not there",
    )
    add_arguments(parser)
    rest, overrides = config.split_overrides(argv)
    arguments = parser.parse_args(rest)

    def program() -> int:
        register_constructors()
        config.parse(arguments.config, overrides)
        with RunDirectory(arguments.run_dir, writer=jax.process_index() == 0) as run:
            return train(TrainingJob(), run)

    prepare_jax()
    start_processes(arguments)
    return run_as_one(program)


def train(job: TrainingJob, run: RunDirectory) -> int:
    """Run the job until it is finished or stopped; returns the exit code. Opens the run directory once
    everything that can be wrong with the job has been looked at, so that a mistake leaves nothing behind."""
    if run.finished:
        run.check(config.config_text())
        say(f"{run.path}: finished at step {run.finished['step']}, nothing left to do")
        return EXIT_DONE

    mesh = job.mesh.build()
    job.check_fits(mesh)
    devices = jax.devices()
    kinds = f"{len(devices)} x {devices[0].device_kind}"
    say(f"devices: {kinds}, in {jax.process_count()} process(es)")
    if len(devices) > 1:
        say(f"mesh: {describe_mesh(mesh.shape)}")

    data = job.data
    processes = dict(zip(("process_index", "process_count"), rows_of_process(mesh)))
    say(f"data: {type(data).__name__}, {data.vocab_size:,} ids, batches of {job.batch_size} x {job.seq_len}")
    batches = data.train_batches(
        job.batch_size, job.seq_len, job.seed, transforms=job.transforms, **processes
    )
    position = batches.get_state()
    next(batches)  # what is wrong with the data shows now
    batches.set_state(position)

    model = job.model
    parameters = parameter_shapes(model, job.seq_len)
    costs = model_costs(model, job.seq_len)
    forward_flops = costs["flops_per_token"]
    say(f"model: {costs['parameters']:,} parameters, {forward_flops:,.0f} FLOPs per token forward")
    transform = job.optimizer.build(parameters, job.steps)
    layout = {"seq_len": job.seq_len, "mesh": mesh, "rules": job.mesh.rules}
    shapes = state_shapes(model, transform, **layout)

    config.check_all_used()
    run.open(config.config_text(), kinds)
    run.write_operative_config(config.operative_config())
    say(f"run directory: {run.path}")
    if jax.process_index() == 0:
        write_file(run.path / "costs.json", json.dumps(costs, indent=1) + "\n")
        if len(devices) > 1:
            write_file(run.path / "parameters.txt", partition_table(shapes.params, shardings_of(shapes.params)) + "\n")

    train_step = job.train_step(mesh, shapes)
    evaluate = make_evaluator(
        model,
        lambda: data.evaluation_batches(job.batch_size, job.seq_len, **processes),
        mesh=mesh,
        max_batches=job.eval_batches,
        bytes_per_token=data.bytes_per_token,
        loss=job.loss,
        metrics=data.metrics,
    )

    checkpoints = Checkpointer(
        run.checkpoints,
        every=job.checkpoint_every,
        keep=job.keep,
        config=config.operative_config(),
        data=data.fingerprint,
    )
    with jax.set_mesh(mesh), checkpoints:
        restored = checkpoints.restore(shapes, batches)
        if restored:
            start, state = restored.step, restored.state
            say(f"continuing after step {start}")
        else:
            start = 0
            state = create_state(
                model,
                transform,
                **layout,
                seed=job.seed,
                params=starting_parameters(job, parameters),
            )
            say("starting; the first step takes longest, it is compiled")
        run.cut_metrics(start)

        report = Report(
            run,
            start=start,
            steps=job.steps,
            tokens_per_step=job.batch_size * job.seq_len,
            flops_per_token=3 * forward_flops,
            bytes_per_token=data.bytes_per_token,
            every=job.log_every,
        )
        with report:
            ended = training_loop(
                state,
                batches,
                start=start,
                steps=job.steps,
                train_step=train_step,
                evaluate=evaluate,
                eval_every=job.eval_every,
                checkpointer=checkpoints,
                report=report,
                mesh=mesh,
                goal=job.goal,
                profile_steps=job.profile_steps,
                profile_directory=run.path / "profile",
            )
    state, step = ended.state, ended.step
    if not ended.finished:
        say(f"stopped after step {step} and saved: the same command continues")
        return EXIT_RESTART
    rows = read_metrics(run.metrics)
    run.mark_finished(step, rows[-1] if rows else {})
    reached = f", where {job.goal[0]} has reached {job.goal[1]:g}" if step < job.steps else ""
    say(f"finished: step {step}{reached}, checkpoint and metrics are in {run.path}")
    if job.sample_tokens and data.tokenizer:
        params = jax.jit(lambda params: params, out_shardings=replicated(mesh))(state.params)
        if jax.process_index() == 0:
            write_sample(job, jax.tree.map(lambda x: x.addressable_data(0), params))
    return EXIT_DONE


def starting_parameters(job: TrainingJob, shapes: Any) -> Any:
    """Those of the run that the job starts from; None for random ones."""
    if job.start_from is None:
        return None
    found = restore_parameters(RunDirectory(job.start_from, writer=False).checkpoints, shapes)
    say(f"parameters: those of {job.start_from} after step {found.step}")
    return found.state


def write_sample(job: TrainingJob, params: Any) -> None:
    """Let the person see what the model has learnt."""
    tokenizer = job.data.tokenizer
    prompt = encode_prompt(tokenizer, job.sample_prompt)
    rows = generate(
        job.model,
        params,
        [prompt],
        max_tokens=job.sample_tokens,
        sampling=Sampling(0.7, top_p=0.9),
        seed=job.seed,
    )
    text = tokenizer.decode(until_separator((int(row[0]) for row in rows), tokenizer))
    say(f"a sample:\n\n{job.sample_prompt}{text}\n")


if __name__ == "__main__":
    run_main(main)
