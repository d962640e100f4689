"""Tasks of the harness, read from files that the tests write: nothing is downloaded."""

import json
import subprocess
import sys

import pytest
from catalogue import CONF

from llm.commands.evaluate import evaluate
from llm.commands.export import ExportConfig, export
from llm.errors import ConfigError

lm_eval = pytest.importorskip("lm_eval")

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.json}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
UNTIL = """
task: local_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.json}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["and"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"{n} plus {n} makes",
            "choices": [f" {2 * n},", f" {3 * n + 1}.", " and"],
            "answer": n % 3,
            "text": f"{n} plus 1 makes {n + 1}, and {n} times 7 makes {7 * n}. It goes on for more than one window.",
        }
        for n in range(10)
    ]
    (folder / "choice.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def judged(trained, tasks, judging, tmp_path_factory, monkeypatch_module):
    out = tmp_path_factory.mktemp("out")
    names = "eval.lm_eval.tasks=[local_choice,local_rolling,local_until]"
    evaluate(judging(f"run_dir={trained[0]}", "eval=[lm_eval]", names, f"eval.lm_eval.include_path={tasks}"), out)
    return json.loads((out / "lm_eval.json").read_text())


@pytest.fixture(scope="module")
def monkeypatch_module(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
        yield


def test_scores_equal_those_of_the_export_under_the_model_class_of_the_harness(trained, tasks, judged, tmp_path):
    pytest.importorskip("transformers")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    keys = {"checkpoint": "last", "average": 1, "format": "hf", "dtype": "float32", "tokens": 64}
    out = export(ExportConfig(run_dir=str(trained[0]), out=str(tmp_path / "hf"), **keys))
    manager = TaskManager(include_path=str(tasks))
    options = {"task_manager": manager, "bootstrap_iters": 0, "log_samples": True}
    alike = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=4)
    theirs = simple_evaluate(model=alike, tasks=["local_choice", "local_until"], **options)["results"]
    assert judged["local_choice"]["acc,none"] == theirs["local_choice"]["acc,none"]
    assert judged["local_until"]["exact_match,none"] == theirs["local_until"]["exact_match,none"]
    bare = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=4, add_bos_token=False)
    rolling = simple_evaluate(model=bare, tasks=["local_rolling"], **options)["results"]["local_rolling"]
    for name in ("word_perplexity,none", "bits_per_byte,none"):
        # fp32 sums over some 90 tokens, in another order
        assert judged["local_rolling"][name] == pytest.approx(rolling[name], rel=1e-5)


def test_single_answers_equal_those_of_the_exported_model(trained, tasks, tmp_path):
    pytest.importorskip("transformers")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from llm.commands.lm_eval_cli import CrucibleLM

    keys = {"checkpoint": "last", "average": 1, "format": "hf", "dtype": "float32", "tokens": 64}
    out = export(ExportConfig(run_dir=str(trained[0]), out=str(tmp_path / "hf"), **keys))
    theirs = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=3)
    ours = CrucibleLM(run_dir=str(trained[0]), batch_size=3)
    pairs = [("", "3 plus"), ("3 plus 4", " makes 7,"), ("12 times 3 makes ", "36"), ("x" * 60, " and")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (score, greedy), (their_score, their_greedy) in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert score == pytest.approx(their_score, abs=1e-4)  # fp32 in another order
        assert greedy == their_greedy
    prompts = [("3 plus 4 makes", {"until": ["and", "."], "max_gen_toks": 12}), ("9", {"until": [], "max_gen_toks": 6})]
    asked = [Instance("generate_until", {}, prompt, i) for i, prompt in enumerate(prompts)]
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def harness(*arguments):
    command = [sys.executable, "-m", "llm.harness", "run", "--model", "crucible", *arguments]
    return subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=200, check=False)


def test_the_command_line_of_the_harness_gives_the_scores_of_eval_py(trained, tasks, judged, monkeypatch_module):
    result = harness("--model_args", f"run_dir={trained[0]}", "--tasks", "local_choice", "--include_path", str(tasks))
    assert result.returncode == 0, result.stderr
    (row,) = [line.split("|") for line in result.stdout.splitlines() if line.startswith("|local_choice")]
    assert float(row[7]) == pytest.approx(judged["local_choice"]["acc,none"], abs=1e-4)  # printed digits


@pytest.mark.parametrize(
    ("task", "answer"),
    [("local_choice", "error: run_dir=nowhere: holds no config.yaml"), ("nope", "error: --tasks=nope: no such task")],
)
def test_the_command_line_of_the_harness_reports_a_missing_run_or_task_in_one_line(
    tasks, task, answer, monkeypatch, capsys
):
    from llm.commands.lm_eval_cli import main

    arguments = ("--model", "crucible", "--model_args", "run_dir=nowhere", "--tasks", task, "--include_path", tasks)
    monkeypatch.setattr("sys.argv", ["lm_eval", "run", *map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.splitlines()[-1].startswith(answer)


def test_an_unknown_task_is_named_with_a_suggestion(trained, tasks, judging, tmp_path):
    settings = (f"run_dir={trained[0]}", "eval=[lm_eval]")
    wrong = judging(*settings, "eval.lm_eval.tasks=[local_choise]", f"eval.lm_eval.include_path={tasks}")
    with pytest.raises(
        ConfigError, match=r"eval\.lm_eval\.tasks=local_choise: no such task; did you mean local_choice"
    ):
        evaluate(wrong, tmp_path)
    with pytest.raises(ConfigError, match=r"include_path=nowhere: no such folder"):
        evaluate(judging(*settings, "eval.lm_eval.tasks=[x]", "eval.lm_eval.include_path=nowhere"), tmp_path)


def test_a_task_that_leaves_no_room_for_its_prompt_is_refused(trained):
    from lm_eval.api.instance import Instance

    from llm.commands.lm_eval_cli import CrucibleLM

    model = CrucibleLM(run_dir=str(trained[0]))
    with pytest.raises(ConfigError, match="max_gen_toks=256: no room for a prompt in the 32 tokens"):
        model.generate_until([Instance("generate_until", {}, ("3 plus", {"until": ["."]}), 0)])
    with pytest.raises(ConfigError, match="num_beams"):
        model.generate_until([Instance("generate_until", {}, ("3", {"num_beams": 2, "max_gen_toks": 4}), 0)])


def test_scores_have_standard_errors(judged):
    mean = judged["local_choice"]["acc,none"]
    expected = (mean * (1 - mean) / (10 - 1)) ** 0.5  # ten questions, each right or wrong
    assert judged["local_choice"]["acc_stderr,none"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({"do_sample": True, "temperature": 0.0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({}, 0.0),
    ],
)
def test_a_temperature_of_zero_is_greedy_whatever_do_sample_says(given, temperature):
    from llm.evals.harness import generation_options

    assert generation_options(given)["temperature"] == temperature


def test_settings_of_generation_that_change_nothing_are_accepted():
    from llm.evals.harness import generation_options

    options = generation_options({"until": ["", "x"], "max_tokens": 5, "num_beams": 1, "top_k": 0, "top_p": None})
    assert (options["stop"], options["max_new_tokens"], options["top_k"]) == (["x"], 5, None)


def test_a_continuation_longer_than_the_window_is_scored_whole_and_reported(trained, caplog):
    from lm_eval.api.instance import Instance

    from llm.commands.lm_eval_cli import CrucibleLM

    model = CrucibleLM(run_dir=str(trained[0]))
    text = "3 plus 4 makes 7, and " * 3
    assert len(text) > model.max_length
    (score, _), (start, _) = model.loglikelihood(
        [Instance("loglikelihood", {}, ("", part), 0) for part in (text, text[: model.max_length])]
    )
    (rolled,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert score == pytest.approx(rolled, rel=1e-5)  # fp32 in another order
    assert score < start
    assert "1 continuations are longer than the 32 tokens" in caplog.text


def test_a_batch_size_of_auto_halves_where_memory_runs_out(trained, monkeypatch):
    import torch
    from lm_eval.api.instance import Instance

    from llm.commands.lm_eval_cli import CrucibleLM

    model, whole = (CrucibleLM(run_dir=str(trained[0]), batch_size=size) for size in ("auto", 4))
    score = model._score

    def limited(requests):
        if len(requests) > 2:
            raise torch.OutOfMemoryError
        return score(requests)

    monkeypatch.setattr(model, "_score", limited)
    requests = [Instance("loglikelihood", {}, ("3 plus", f" {n} makes"), n) for n in range(5)]
    ours, theirs = model.loglikelihood(requests), whole.loglikelihood(requests)
    assert [pair[0] for pair in ours] == pytest.approx([pair[0] for pair in theirs], rel=1e-5)
    assert model.batch_size == 2


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ({"run_dri": "x"}, "--model_args=run_dri=x: unknown key; did you mean run_dir"),
        ({}, "run_dir is missing"),
        ({"run_dir": "x", "max_length": "long"}, "--model_args=max_length=long: must be a whole number"),
        ({"run_dir": "RUN", "batch_size": "many"}, "batch_size=many: must be at least 1, or auto"),
    ],
)
def test_wrong_arguments_of_the_model_are_named(trained, arguments, answer):
    from llm.commands.lm_eval_cli import CrucibleLM

    arguments = {key: str(trained[0]) if value == "RUN" else value for key, value in arguments.items()}
    with pytest.raises(ConfigError, match=answer):
        CrucibleLM(**arguments)


def test_a_chat_template_is_refused_in_one_line(trained):
    from llm.commands.lm_eval_cli import CrucibleLM

    model = CrucibleLM(run_dir=str(trained[0]))
    assert model.chat_template(False) is None
    with pytest.raises(ConfigError, match="has no chat template; remove this option"):
        model.chat_template(True)
