"""Turn published models into run directories, and runs into what is published.

    python -m seqmodels.tools.convert --from hf --model mamba2-130m --out runs/mamba2-130m
    python -m seqmodels.tools.convert --to hf --run runs/mamba2-130m --out mamba2-130m-tuned
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from seqmodels.errors import InputError, run_main
from seqmodels.files import in_bucket, on_disk

DESCRIPTION = """\
Turn a published model (a folder with config.json and safetensors) into a run directory, or a run into such a folder.
Every weight is accounted for: one that is missing, that is not expected, or that has another shape is an error.

The run is one like any other, before its first step: generate from it, train it on, or start other runs from it with
--gin.train.start_from. It trains on what TextData reads with the model's tokenizer (without tokenizer.json: bytes);
--gin.NAME.PARAMETER=VALUE changes its config, as in train.py.

architectures: Mamba2ForCausalLM (mamba2), state-spaces/mamba2-* (mamba2_original), LlamaForCausalLM (llama),
RecurrentGemmaForCausalLM (recurrent_gemma), MiniMaxForCausalLM (minimax), Qwen3NextForCausalLM (qwen3_next)"""

EPILOG = """\
examples:
  python -m seqmodels.tools.convert --from hf --model mamba2-130m --out runs/mamba2-130m
  python -m seqmodels.tools.generate --run runs/mamba2-130m --prompt "The"
  python train.py --config runs/mamba2-130m/config.gin --run_dir runs/tuned \\
      --gin.train.start_from="'runs/mamba2-130m'" --gin.TextData.paths="'corpus'"
  python -m seqmodels.tools.convert --to hf --run runs/tuned --out mamba2-130m-tuned"""

# Within a run directory: what lay beside the weights, and the dtypes that these had.
SOURCE, DTYPES = "source", "dtypes.json"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.convert",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source", choices=["hf"], help="make a run of the published --model")
    direction.add_argument("--to", dest="target", choices=["hf"], help="publish the model of a --run")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder with config.json and safetensors (--from)")
    parser.add_argument("--run", metavar="DIR", help="run directory, here or gs://... (--to)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make; it must not exist")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to publish (default: the newest)")
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        default=None,
        help="what to publish as (default: what the run was made of, or else the first that fits)",
    )
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        default=None,
        help="of all published weights: float32, bfloat16, float16 (default: as they came, or else float32)",
    )
    # After the command line is known to be right: these imports take seconds.
    from seqmodels import config

    rest, overrides = config.split_overrides(argv)
    arguments = parser.parse_args(rest)
    given, other = ("model", ["run", "step", "architecture", "dtype"]) if arguments.source else ("run", ["model"])
    if getattr(arguments, given) is None:
        raise InputError(f"--{given} is missing; expected --{given} DIR")
    for name in other:
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name} belongs to the other direction; see --help")
    if arguments.target and overrides:
        raise InputError(f"--gin.{overrides[0]} has no effect: a run has its config")
    if in_bucket(arguments.out):
        raise InputError(f"--out {arguments.out} is in a bucket: expected a folder of this machine")
    arguments.out = Path(arguments.out)
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError(f"{arguments.out} is there already; name a new folder")

    from seqmodels.start_up import prepare_jax

    prepare_jax()
    if arguments.source:
        make_run(arguments.model, arguments.out, overrides)
    else:
        publish(arguments)


def make_run(model: Path, out: Path, overrides: list[str]) -> None:
    """A run directory of a published model, with a checkpoint of step 0. What is wrong with the model, the config or
    the data shows before anything is written."""
    from seqmodels import config, interop
    from seqmodels.models.accounting import parameter_count
    from seqmodels.training import Checkpointer, RunDirectory, create_state, parameter_shapes, say

    loaded = interop.load(model)
    say(f"{model}: {loaded.family.architecture}, {parameter_count(loaded.params):,} parameters, all accounted for")
    job = _job(loaded, model, overrides)
    transform = job.optimizer.build(parameter_shapes(job.model, job.seq_len), job.steps)
    batches = job.data.train_batches(job.batch_size, job.seq_len, job.seed, transforms=job.transforms)
    data = job.data.fingerprint
    config.check_all_used()
    # The run has its own copy of the tokenizer.
    texts = (config.config_text(), config.operative_config())
    own, operative = (text.replace(str(model.resolve()), str((out / SOURCE).resolve())) for text in texts)
    state = create_state(
        job.model,
        transform,
        seq_len=job.seq_len,
        seed=job.seed,
        mesh=job.mesh.build(),
        rules=job.mesh.rules,
        params=loaded.params,
    )
    try:
        with RunDirectory(out) as run:
            run.open(own)
            run.write_operative_config(operative)
            with Checkpointer(run.checkpoints, every=None, config=operative, data=data) as checkpoints:
                checkpoints.save(0, state, batches, final=True)
            source = run.path / SOURCE
            source.mkdir()
            for name in (interop.CONFIG, *interop.COMPANIONS):
                if (model / name).is_file():
                    shutil.copyfile(model / name, source / name)
            (source / DTYPES).write_text(json.dumps(loaded.dtypes, indent=1) + "\n")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    say(f"run directory: {out}")


def _job(loaded: Any, model: Path, overrides: list[str]) -> Any:
    """The training job of the run, with the tokenizer that lies beside the weights."""
    from seqmodels import config
    from seqmodels.constructors import register_constructors
    from seqmodels.data.tokenizers import ByteTokenizer, load_tokenizer
    from seqmodels.training import TrainingJob

    register_constructors()
    size, file, data = loaded.model.vocab_size, model / "tokenizer.json", {}
    if file.is_file():
        data = {"tokenizer": str(file.resolve())}
        if load_tokenizer(data["tokenizer"]).vocab_size > size:
            data["mask_token"] = False
    elif size < ByteTokenizer.vocab_size:
        raise InputError(
            f"{model} has {size} token ids and no tokenizer.json; without one its tokens are bytes, which need "
            f"{ByteTokenizer.vocab_size} ids"
        )
    text = config.fields_text({**loaded.fields, "TextData": data})
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "config.gin"
        written.write_text(f"{text}\ntrain.data = @TextData()\ntrain.model = @LanguageModel()\n")
        config.parse([written], overrides)
    return TrainingJob()


def publish(arguments: argparse.Namespace) -> None:
    """A folder with config.json and safetensors of a run's model."""
    from seqmodels.tools._runs import open_run
    from seqmodels.training import say

    run = open_run(arguments.run, arguments.step)
    with on_disk(f"{arguments.run}/{SOURCE}") as source:
        family = _publish(arguments, run, source)
    say(f"{arguments.out}: {family.architecture}, after step {run.step}")


def _publish(arguments: argparse.Namespace, run: Any, source: Path) -> Any:
    """Write the folder; returns the family that it became one of. source: what lay beside the weights, if anything."""
    from seqmodels import interop

    name, extra, dtypes = arguments.architecture, {}, {}
    if (source / interop.CONFIG).is_file():
        made_of = interop.read_config(source)
        name = name or interop.family_of(made_of).name
        if name == interop.family_of(made_of).name:
            extra, dtypes = made_of, json.loads((source / DTYPES).read_text())
    if arguments.dtype is not None:
        dtypes = {}
        extra = {key: value for key, value in extra.items() if key not in ("dtype", "torch_dtype")}
    return interop.save(
        arguments.out,
        run.job.model,
        run.params,
        family=name,
        dtype=arguments.dtype or "float32",
        dtypes=dtypes,
        extra=extra,
        companions=source,
    )


if __name__ == "__main__":
    run_main(main)
