"""From a sweep's file to points that are checked, and to a folder that holds them. Nothing is run."""

import json
import re
from pathlib import Path

import pytest

from seqmodels import config
from seqmodels.constructors import register_constructors
from seqmodels.errors import InputError
from seqmodels.tools.sweep import check as checking
from seqmodels.tools.sweep.check import Resolved, check, check_evaluations, fits_here
from seqmodels.tools.sweep.command import choose
from seqmodels.tools.sweep.folder import PointFolder, SweepFolder
from seqmodels.tools.sweep.points import LONGEST_NAME, read_sweep, result_of

BASE = """\
# Question   Which of them recalls?
#            And how much?

include 'configs/base.gin'
include 'configs/tasks/mqar.gin'
WIDTH = 16
LanguageModel.d_model = %WIDTH
LanguageModel.n_layers = 1
AdamW.warmup_steps = 1
train.steps = 8
train.batch_size = 2
"""
MIXERS = """\
sweep.list = {'mixer': {
    'attention': ["include 'configs/mixers/softmax_attention.gin'", "SoftmaxAttention.num_heads = 2"],
    'gla': ["include 'configs/mixers/gated_linear_attention.gin'", "GatedLinearAttention.num_heads = 2"]}}
"""
ALL = (
    BASE
    + MIXERS
    + """\
sweep.product = {'train.seed': [0, 1], 'AdamW.learning_rate': %RATES}
RATES = [1e-3, 3e-3]
sweep.zip = {'task': {'train.seq_len': [32, 64], 'MQAR.num_kv_pairs': [4, 8]}}
sweep.overrides = [({'mixer': 'gla', 'task': 64}, ["GatedLinearAttention.num_heads = 1", "AdamW.b1 = 0.5"])]
sweep.best_of = ['learning_rate']
"""
)


@pytest.fixture
def sweep_of(tmp_path):
    """The sweep of a file with this text, `sweep.gin`."""

    def read(text: str, *overrides: str):
        file = tmp_path / "sweep.gin"
        file.write_text(text)
        return read_sweep(file, overrides)

    register_constructors()
    yield read
    config.clear()


@pytest.fixture
def traces(monkeypatch) -> list:
    """The models that are traced."""
    traced, trace = [], checking.parameter_shapes

    def counted(model, seq_len):
        traced.append((model.d_model, seq_len))
        return trace(model, seq_len)

    monkeypatch.setattr(checking, "parameter_shapes", counted)
    return traced


def resolve(sweep, known=None, progress=lambda name: None):
    return check(sweep, known or {}, progress, fits_here)


def lines(text: str) -> set[str]:
    return set(filter(None, text.splitlines()))


def test_axes_are_multiplied_in_the_order_list_zip_product(sweep_of):
    sweep = sweep_of(ALL)
    assert sweep.order == {
        "mixer": ["attention", "gla"],
        "task": [32, 64],
        "seed": [0, 1],
        "learning_rate": [0.001, 0.003],
    }
    names = [point.name for point in sweep.points]
    assert len(names) == len(set(names)) == 16
    assert names[:3] == ["attention-32-0-0.001", "attention-32-0-0.003", "attention-32-1-0.001"]
    assert names[-1] == "gla-64-1-0.003"
    assert sweep.question == ["Question   Which of them recalls?", "           And how much?"]
    assert sweep.points[-1].axes == {"mixer": "gla", "task": 64, "seed": 1, "learning_rate": 0.003}
    assert sweep.points[-1].bindings == [
        "include 'configs/mixers/gated_linear_attention.gin'",
        "GatedLinearAttention.num_heads = 2",
        "train.seq_len = 64",
        "MQAR.num_kv_pairs = 8",
        "train.seed = 1",
        "AdamW.learning_rate = 0.003",
        "GatedLinearAttention.num_heads = 1",
        "AdamW.b1 = 0.5",
    ]


def test_a_point_is_its_base_then_its_axes_then_its_overrides_then_the_command_line(sweep_of):
    resolved = resolve(sweep_of(ALL, "AdamW.b1=0.25", "train.steps=9"))
    last = lines(resolved["gla-64-1-0.003"].text)
    assert resolved["gla-64-1-0.003"].steps == 9 and "train.steps = 9" in last
    assert {"AdamW.b1 = 0.25", "GatedLinearAttention.num_heads = 1", "MQAR.num_kv_pairs = 8"} < last
    other = lines(resolved["gla-32-1-0.003"].text)
    assert {"GatedLinearAttention.num_heads = 2", "MQAR.num_kv_pairs = 4", "train.seq_len = 32"} < other
    assert not any("sweep" in line or "RATES" in line for line in last | other)


def test_a_condition_may_list_labels_that_are_no_numbers(sweep_of):
    axes = "sweep.product = {'SoftmaxAttention.qk_norm': [True, False, None]}\n"
    more = "sweep.overrides = [({'qk_norm': [True, None]}, ['train.seed = 3'])]"
    points = sweep_of(BASE + axes + more).points
    assert ["train.seed = 3" in point.bindings for point in points] == [True, False, True]


def test_the_command_line_may_change_the_sweep_itself(sweep_of):
    sweep = sweep_of(BASE + MIXERS, "sweep.metric='loss'", "train.steps=9")
    assert (sweep.metric, sweep.overrides) == ("loss", ["train.steps=9"])


def test_a_macro_and_a_constructor_can_be_varied(sweep_of):
    text = BASE + "include 'configs/mixers/retention.gin'\nRetention.num_heads = 2\n"
    sweep = sweep_of(f"{text}sweep.product = {{'WIDTH': [16, 32], 'train.optimizer': [@AdamW(), @SGD()]}}\n")
    assert sweep.points[0].axes == {"WIDTH": 16, "optimizer": "@AdamW()"}
    assert [point.name for point in sweep.points][1] == "16-SGD"
    with pytest.raises(InputError, match="16-SGD and 1 more of 4 points: SGD: warmup_steps is 100"):
        resolve(sweep)
    sweep.file.write_text(
        sweep.file.read_text().replace("AdamW.warmup_steps = 1\n", "").replace("steps = 8", "steps = 200")
    )
    text = resolve(sweep)["32-SGD"].text
    assert {"LanguageModel.d_model = 32", "train.optimizer = @SGD()"} < lines(text)


def test_an_option_includes_what_is_beside_the_file(sweep_of, tmp_path):
    (tmp_path / "mine.gin").write_text("include 'configs/mixers/retention.gin'\nRetention.num_heads = 4\n")
    sweep = sweep_of(BASE + "sweep.list = {'mixer': {'mine': [\"include 'mine.gin'\"]}}")
    assert "Retention.num_heads = 4" in lines(resolve(sweep)["mine"].text)


def test_what_a_point_runs_reads_as_itself(sweep_of, tmp_path):
    """train.py is given the resolved text, and keeps what it has read of it."""
    text = resolve(sweep_of(BASE + MIXERS))["gla"].text
    (tmp_path / "again.gin").write_text(text)
    config.parse([tmp_path / "again.gin"])
    assert config.config_text() == text


@pytest.mark.parametrize(
    ("product", "names"),
    [
        ("{'TextData.paths': ['/data/a b', '/data/c']}", ["data_a_b", "data_c"]),
        ("{'LanguageModel.pattern': [('based',), ('rglru', 'based')]}", ["based", "rglru,based"]),
        ("{'AdamW.learning_rate': [1e-5, 3], 'SGD.learning_rate': [None]}", ["1e-05-None", "3-None"]),
    ],
)
def test_names_are_fit_for_files(sweep_of, product, names):
    sweep = sweep_of(f"sweep.product = {product}")
    assert [point.name for point in sweep.points] == names


def test_parameters_of_one_name_are_axes_of_two(sweep_of):
    sweep = sweep_of("sweep.product = {'AdamW.learning_rate': [1e-5], 'SGD.learning_rate': [None]}")
    assert [*sweep.order] == ["AdamW.learning_rate", "SGD.learning_rate"]


def test_long_names_are_cut_and_stay_different(sweep_of):
    long = "x" * 200
    names = [p.name for p in sweep_of(f"sweep.product = {{'TextData.paths': ['{long}a', '{long}b']}}").points]
    assert len(set(names)) == 2 and all(len(name) == LONGEST_NAME for name in names)


def test_a_zipped_option_is_named_by_all_of_its_values_where_the_first_comes_twice(sweep_of):
    sweep = sweep_of("sweep.zip = {'task': {'train.seq_len': [64, 64], 'MQAR.num_kv_pairs': [4, 8]}}")
    assert sweep.order == {"task": ["64, 4", "64, 8"]} and sweep.points[0].name == "64,4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "sweep.gin binds no axis: expected one of sweep.list, sweep.zip and sweep.product"),
        ("sweep.prodct = {}", r"sweep.gin:\d+: sweep has no parameter 'prodct': did you mean 'product'"),
        ("sweep.product = {'train.seed': 3}", r"sweep.gin:\d+: sweep.product = .* expected Mapping"),
        ("sweep.product = {'train.seed': []}", r"sweep.product\['train.seed'\] is empty"),
        ("sweep.product = {'train.seed': [1, 1]}", r"sweep.product\['train.seed'\] has 1 twice"),
        ("sweep.product = {'train.seed': %SEEDS}", "no macro or constant is named 'SEEDS'"),
        (
            "sweep.zip = {'task': {'train.seq_len': [64, 128], 'MQAR.num_kv_pairs': [4]}}",
            "equally many values of each binding, found 2 of train.seq_len, 1 of MQAR.num_kv_pairs",
        ),
        ("sweep.list = {'seed': {'a b': [], 'a_b': []}}", "two points would be named 'a_b': seed = a b and seed = a_b"),
        ("sweep.list = {'seed': {'logs': []}}", "would be named 'logs'"),
        ("sweep.list = {'seed': {'a': []}}\nsweep.product = {'train.seed': [1]}", "a second axis is named 'seed'"),
        ("@sweep.overrides = [({'sed': 1}, [])]", "the sweep has no axis 'sed'; did you mean 'seed'"),
        ("@sweep.overrides = [({'seed': 5}, [])]", "no point has seed = 5, .*; valid: 0, 1"),
        ("@sweep.best_of = ['sead']", "the sweep has no axis 'sead'; did you mean 'seed'"),
        ("@sweep.evaluate = ['perplexity', 'perplexity --lengths 5']", "has two results 'perplexity'.*--name"),
        ("@sweep.evaluate = [' ']", "sweep.evaluate has ' ': expected the name of a suite"),
    ],
)
def test_what_is_wrong_with_the_axes_is_one_line(sweep_of, line, message):
    text = line.replace("@", "sweep.product = {'train.seed': [0, 1]}\n")
    with pytest.raises(InputError, match=message) as raised:
        sweep_of(BASE + text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "sweep.product = {'LanguageModel.d_modle': [16, 32]}",
            r"attention-16 and the 3 other points: .*sweep.gin:\d+ \(sweep.product\['LanguageModel.d_modle'\]\): "
            "LanguageModel has no parameter 'd_modle': did you mean 'd_model'",
        ),
        (
            "sweep.overrides = [({'mixer': 'gla'}, ['GatedLinearAttention.num_heads = 3'])]",
            r"gla: GatedLinearAttention: .* not divisible by 3 heads",
        ),
        (
            "sweep.overrides = [({'mixer': 'gla'}, ['SoftmaxAttention.num_heads = 3'])]",
            r"gla: .*sweep.gin:\d+ \(sweep.overrides, mixer = gla\): SoftmaxAttention.num_heads has no effect",
        ),
        (
            "sweep.overrides = [({'mixer': 'gla'}, [\"include 'mixers/based.gin'\"])]",
            r"gla: .*\(sweep.overrides, mixer = gla\): cannot include 'mixers/based.gin'",
        ),
        (
            "sweep.overrides = [({'mixer': 'gla'}, ['train.steps = = 3'])]",
            r"gla: .*syntax error in 'train.steps = = 3'",
        ),
        (
            "sweep.product = {'train.seed': [3, -1]}",
            r"attention--1 and 1 more of 4 points: the data seed is -1; expected 0",
        ),
        (
            "sweep.product = {'AdamW.warmup_steps': [1, 8]}",
            "attention-8 and 1 more of 4 points: .*less than the 8 steps",
        ),
        ("sweep.product = {'train.steps': [5, 0]}", "attention-0 and 1 more of 4 points: train.steps is 0"),
        ("sweep.product = {'train.seq_len': [64, 4]}", "attention-4 and 1 more of 4 points: "),
        ("sweep.product = {'DeviceMesh.data': [3, -1]}", "attention-3 and 1 more of 4 points: .*data"),
        ("sweep.metric = 'acuracy'", r"attention and the other point: .*sweep.metric is 'acuracy'; .* 'accuracy'"),
        ("sweep.metric = 'bits_per_byte'", ".*'bits_per_byte'; valid: accuracy, loss"),
        ("train.eval_every = 4\ntrain.goal = ('acuracy', 0.9)", r".*train.goal is \('acuracy', 0.9\), .*'accuracy'"),
    ],
)
def test_a_bad_point_is_named_with_what_is_wrong_before_anything_runs(sweep_of, line, message):
    with pytest.raises(InputError) as raised:
        resolve(sweep_of(BASE + MIXERS + line))
    assert "\n" not in str(raised.value) and re.match(message, str(raised.value)), raised.value


def test_every_cause_has_its_line(sweep_of):
    text = BASE + MIXERS + "sweep.product = {'train.steps': [5, 0, -1], 'train.batch_size': [2, 4]}\n"
    with pytest.raises(InputError) as raised:
        resolve(sweep_of(text))
    assert str(raised.value).splitlines() == [
        f"attention-{steps}-2 and 3 more of 12 points: train.steps is {steps}: expected a whole number of at least 1"
        for steps in (0, -1)
    ]


def test_a_metric_of_the_data_can_be_compared(sweep_of):
    text = BASE.replace("mqar", "selective_copying") + MIXERS + "sweep.metric = 'example_accuracy'"
    assert len(resolve(sweep_of(text))) == 2


def test_points_that_differ_in_no_shape_are_traced_once(sweep_of, traces):
    seen = []
    text = BASE + "include 'configs/mixers/retention.gin'\nRetention.num_heads = 2\n"
    text += (
        "sweep.product = {'train.seed': [0, 1], 'AdamW.learning_rate': [1e-3, 1e-2], 'LanguageModel.d_model': [16, 32]}"
    )
    sweep = sweep_of(text)
    resolved = resolve(sweep, progress=seen.append)
    assert sorted(traces) == [(16, 64), (32, 64)]
    assert seen == [point.name for point in sweep.points] == [*resolved]
    assert len({point.fingerprint for point in resolved.values()}) == 8


def test_what_was_checked_before_is_not_built_again(sweep_of, traces):
    sweep = sweep_of(BASE + MIXERS)
    known = {name: (point.fingerprint, point.steps) for name, point in resolve(sweep).items()}
    traces.clear()
    assert resolve(sweep, known)["gla"].steps == 8 and not traces
    resolve(sweep_of(BASE + MIXERS.replace("gla.num_heads", "") + "LanguageModel.d_model = 32"), known)
    assert [d_model for d_model, _ in traces] == [32, 32]


def test_filters_choose_points(sweep_of):
    sweep = sweep_of(ALL)
    assert len(choose(sweep, [])) == 16
    assert {p.axes["mixer"] for p in choose(sweep, ["mixer=gla"])} == {"gla"}
    assert [p.name for p in choose(sweep, ["learning_rate=0.001", "task=64", "seed=0"])] == [
        "attention-64-0-0.001",
        "gla-64-0-0.001",
    ]
    assert [p.name for p in choose(sweep, ["gla-64-1", "0.003"])] == ["gla-64-1-0.003"]
    with pytest.raises(InputError, match="--only mixer=glaa: axis 'mixer' has no 'glaa'; did you mean 'gla'"):
        choose(sweep, ["mixer=glaa"])
    with pytest.raises(InputError, match="the sweep has no axis 'mixr'; did you mean 'mixer'"):
        choose(sweep, ["mixr=gla"])
    with pytest.raises(InputError, match="no point is left"):
        choose(sweep, ["mamba"])


def test_train_py_says_what_a_sweep_is_for(sweep_of):
    file = sweep_of(BASE + MIXERS).file
    with pytest.raises(InputError, match=r"sweep.gin:12: the file is a sweep .*`python -m seqmodels.tools.sweep FILE`"):
        config.parse([file])


@pytest.mark.parametrize(
    ("evaluation", "name"),
    [("perplexity --lengths 5", "perplexity"), ("recall --name far --lengths 5", "far"), ("recall --name=far", "far")],
)
def test_a_result_has_the_name_of_its_suite_or_its_own(evaluation, name):
    assert result_of(evaluation) == name


def test_evaluations_that_would_be_refused_are_found_before_anything_runs(sweep_of):
    text = BASE + MIXERS
    check_evaluations(sweep_of(text + "sweep.evaluate = ['perplexity --lengths 5']"))
    with pytest.raises(InputError, match=r"sweep.gin:\d+: .*'perplexty' does not exist; did you mean 'perplexity'"):
        check_evaluations(sweep_of(text + "sweep.evaluate = ['perplexty --lengths 5']"))
    with pytest.raises(InputError, match=r"sweep.gin:\d+: .*unrecognized arguments: --lenghts"):
        check_evaluations(sweep_of(text + "sweep.evaluate = ['perplexity --lenghts 5']"))
    with pytest.raises(InputError, match=r"sweep.gin:\d+: .*--step is 3: expected none"):
        check_evaluations(sweep_of(text + "sweep.evaluate = ['perplexity --step 3']"))


def test_an_evaluation_counts_once_it_was_noted_and_as_it_was_then(tmp_path):
    point, (file, asked) = PointFolder(tmp_path, tmp_path / "log"), ("perplexity.json", "perplexity --lengths 5")
    (tmp_path / "DONE").write_text('{"step": 3, "metrics": {}}')
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / file).write_text('{"step": 3}')
    assert not point.is_evaluated(asked)  # whoever wrote it
    point.note_evaluation(asked)
    assert point.is_evaluated(asked) and not point.is_evaluated("perplexity --lengths 6")
    (tmp_path / "evaluations" / file).write_text('{"step": 3, "rows": []}')
    assert not point.is_evaluated(asked)


# The folder


def put(sweep, folder: Path) -> list[str]:
    """Write the sweep into its folder, as a start does; the points that are gone."""
    of_sweep, resolved = SweepFolder(folder), {}
    for point in sweep.points:
        config.parse([sweep.file], sweep.overrides, texts=point.texts, apart="sweep")
        resolved[point.name] = Resolved(config.config_text(), 8)
    of_sweep.check(sweep, resolved)
    with of_sweep.open():
        return of_sweep.write(sweep, resolved)


def test_a_point_says_what_it_is(sweep_of, tmp_path):
    folder = tmp_path / "folder"
    sweep = sweep_of(ALL, "AdamW.b2=0.9")
    put(sweep, folder)
    written = json.loads((folder / "gla-64-1-0.003/point.json").read_text())
    assert written["name"] == "gla-64-1-0.003" and written["sweep"] == str(sweep.file)
    assert written["axes"] == {"mixer": "gla", "task": 64, "seed": 1, "learning_rate": 0.003}
    assert written["order"] == sweep.order and written["question"] == sweep.question
    assert (written["metric"], written["best_of"]) == ("accuracy", ["learning_rate"])
    assert written["bindings"] == [*sweep.points[-1].bindings, "AdamW.b2=0.9"]
    whole = json.loads((folder / "sweep.json").read_text())
    assert [point["name"] for point in whole["points"]] == [point.name for point in sweep.points]
    assert "AdamW.b2 = 0.9" in (folder / "gla-64-1-0.003/config.gin").read_text()


def test_a_second_start_writes_nothing_and_a_longer_file_adds_points(sweep_of, tmp_path):
    folder, text = tmp_path / "folder", BASE + MIXERS
    put(sweep_of(text + "sweep.product = {'train.seed': [0, 1]}"), folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.name != ".lock"}
    put(sweep_of(text + "sweep.product = {'train.seed': [0, 1]}"), folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.name != ".lock"}
    gone = put(sweep_of(text + "sweep.product = {'train.seed': [1, 2]}"), folder)
    assert gone == ["attention-0", "gla-0"]
    assert all((folder / f"{mixer}-{seed}/point.json").exists() for mixer in ("attention", "gla") for seed in range(3))


def test_another_metric_is_checked_again(sweep_of, tmp_path):
    folder, text = SweepFolder(tmp_path / "folder"), BASE + MIXERS
    put(sweep_of(text), tmp_path / "folder")
    assert folder.checked(sweep_of(text)).keys() == {"attention", "gla"}
    assert folder.checked(sweep_of(text + "sweep.metric = 'los'")) == {}


def test_a_point_that_has_begun_with_another_config_is_refused_with_the_difference(sweep_of, tmp_path):
    folder, text = tmp_path / "folder", BASE + MIXERS
    put(sweep_of(text), folder)
    (folder / "gla/environment.json").write_text("[]")
    before = (folder / "gla/config.gin").read_text()
    with pytest.raises(InputError) as raised:
        put(sweep_of(text.replace("train.steps = 8", "train.steps = 9")), folder)
    first, *difference = str(raised.value).splitlines()
    assert "folder/gla has begun with another config" in first
    assert difference == ["- train.steps = 8", "+ train.steps = 9"]
    assert (folder / "gla/config.gin").read_text() == before


def test_a_point_that_has_not_begun_follows_its_file(sweep_of, tmp_path):
    folder, text = tmp_path / "folder", BASE + MIXERS
    put(sweep_of(text), folder)
    put(sweep_of(text.replace("train.steps = 8", "train.steps = 9")), folder)
    assert "train.steps = 9" in (folder / "gla/config.gin").read_text()


def test_folders_of_others_are_refused(sweep_of, tmp_path):
    mine, text = tmp_path / "mine", BASE + MIXERS
    mine.mkdir()
    (mine / "letters.txt").write_text("dear")
    with pytest.raises(InputError, match=r"it holds 'letters.txt' and no sweep.json"):
        put(sweep_of(text), mine)
    put(sweep_of(text), tmp_path / "folder")
    with pytest.raises(InputError, match=r"folder of another sweep, .*none of its 2 points"):
        put(
            sweep_of(BASE + "sweep.list = {'mixer': {'r': [\"include 'configs/mixers/retention.gin'\"]}}"),
            tmp_path / "folder",
        )
    with pytest.raises(InputError, match="is in a bucket: expected a folder"):
        SweepFolder("gs://bucket/sweep")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: expected a folder"):
        put(sweep_of(text), tmp_path / "file")


def test_a_folder_is_of_one_runner(sweep_of, tmp_path):
    folder = SweepFolder(tmp_path / "folder")
    with (
        folder.open(),
        pytest.raises(InputError, match=r"folder is in use by process \d+ on this machine"),
        folder.open(),
    ):
        pass
