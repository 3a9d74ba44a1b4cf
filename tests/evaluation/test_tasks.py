"""Tasks through the real harness, offline: log-likelihoods against torch, pairing, groups, refusals."""

import functools
import importlib.metadata
import json
import pickle
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pma import verbs
from pma.errors import InputError, MismatchError, MissingExtra, UsageError
from pma.evaluation.model import load_scorer
from pma.evaluation.paired import mean_estimate, stratified_mean
from pma.evaluation.scoring import Scorer
from pma.evaluation.tasks import TaskResult, prepared, run_task, scores, task_weights
from pma.evaluation.tasks.compare import compare_tasks
from pma.evaluation.tasks.model import harness_model
from pma.testing import tiny_llama_run
from pma.verbs import Candidate, Choice

from . import task_files

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that tries, though the libraries swallow the error, and as if they had not been told."""
    from datasets import config

    tries: list[object] = []

    def refuse(*arguments: object, **named: object) -> None:
        tries.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load.get_session", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    yield
    assert not tries


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tiny_llama_run(folder / "run", steps=2)
    task_files.write_all(folder / "evals")
    return folder / "run"


def scorer_of(path: Path, **options: int) -> Scorer:
    return load_scorer(verbs.average(Choice(paths=(path,))), path, **options)


def results_of(scorer: Scorer, *specs: object, limit: int | None = None) -> dict[str, TaskResult]:
    with prepared([str(spec) for spec in specs], limit) as (tasks, _):
        return {task.name: run_task(scorer, task) for task in tasks}


def direct_nats(scorer: Scorer, context: str, answer: str) -> float:
    """-log p(answer | context), token by token, each from its whole past."""
    given = scorer.encode(context) or [scorer.start_token]
    ids = given + scorer.encode(answer)
    total = 0.0
    for position in range(len(given), len(ids)):
        with torch.no_grad():
            logits = scorer.model(input_ids=torch.tensor([ids[:position]])).logits[0, -1]
        total -= float(torch.log_softmax(logits.double(), 0)[ids[position]])
    return total


def test_loglikelihoods_and_scores_are_what_torch_computes(run: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10")
    found = results_of(scorer, run.parent / "evals")
    assert sorted(found) == ["arc", "choices", "pairs", "targets"]
    [part] = found["choices"].parts
    for item, loglikelihoods in zip(task_files.CHOICES, part.loglikelihoods, strict=True):
        expected = [-direct_nats(scorer, item["context"], f" {choice}") for choice in item["choices"]]
        assert loglikelihoods == pytest.approx(expected, rel=1e-5)
    for metric, length in (("acc", lambda text: 1), ("acc_norm", len)):
        right = [
            float(
                np.argmax([n / length(c) for n, c in zip(ns, item["choices"], strict=True)]) == item["gold"]
            )
            for item, ns in zip(task_files.CHOICES, part.loglikelihoods, strict=True)
        ]
        assert list(part.scores[f"{metric},none"]) == right
    [part] = found["pairs"].parts
    expected = [-direct_nats(scorer, "", f" {task_files.PAIRS[3][side]}") for side in ("good", "bad")]
    assert part.loglikelihoods[3] == pytest.approx(expected, rel=1e-5)
    [part] = found["targets"].parts
    expected = [-direct_nats(scorer, item["context"], f" {item['target']}") for item in task_files.TARGETS]
    assert [answer for (answer,) in part.loglikelihoods] == pytest.approx(expected, rel=1e-5)
    nats = scores.nats(found["targets"])
    assert nats is not None
    assert nats.value == pytest.approx(-np.mean(expected), rel=1e-5)
    assert [found[name].metric for name in sorted(found)] == [
        "acc_norm,none",
        "acc_norm,none",
        "acc,none",
        "acc,none",
    ]


def test_score_and_error_are_the_harness_own(run: Path) -> None:
    result = results_of(scorer_of(run / "checkpoint-10"), run.parent / "evals" / "choices.jsonl")["choices"]
    theirs = result.harness["results"]["choices"]
    assert theirs["sample_len"] == 9
    assert scores.score(result).value == pytest.approx(theirs["acc_norm,none"])
    assert scores.score(result).standard_error == pytest.approx(theirs["acc_norm_stderr,none"])
    assert set(result.harness) >= {
        "results",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
    }
    again = TaskResult.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again == result


def test_batches_do_not_change_results(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of(run / "checkpoint-10")
    many = results_of(scorer, run.parent / "evals")
    monkeypatch.setattr("pma.evaluation.tasks.model.TOKENS_A_BATCH", 1)
    for name, one in results_of(scorer, run.parent / "evals").items():
        for a, b in zip(one.parts[0].loglikelihoods, many[name].parts[0].loglikelihoods, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_loglikelihoods_of_a_bf16_model_are_not_rounded(tmp_path: Path) -> None:
    [path] = tiny_llama_run(tmp_path / "run", steps=1, dtype="bfloat16")
    scorer = scorer_of(path)
    result = results_of(scorer, task_files.write_jsonl(tmp_path / "t.jsonl", task_files.TARGETS))["t"]
    values = np.array([answer for (answer,) in result.parts[0].loglikelihoods])
    assert (torch.tensor(values).bfloat16().double() != torch.tensor(values)).all()


def test_choices_that_look_like_dates_stay_text(run: Path, tmp_path: Path) -> None:
    rows = [{"context": "1999-01-01", "choices": ["2020-01-01", "2021-01-01"], "gold": 0}] * 3
    result = results_of(scorer_of(run / "checkpoint-10"), task_files.write_jsonl(tmp_path / "d.jsonl", rows))
    scorer = scorer_of(run / "checkpoint-10")
    expected = [-direct_nats(scorer, "1999-01-01", f" {choice}") for choice in rows[0]["choices"]]
    assert result["d"].parts[0].loglikelihoods[0] == pytest.approx(expected, rel=1e-5)


def test_templates_in_a_file_are_only_text(run: Path, tmp_path: Path) -> None:
    rows = [{"context": "{{1 + 1}} {{gold}}", "choices": ["{{2*2}}", "[1]"], "gold": 0}] * 2
    scorer = scorer_of(run / "checkpoint-10")
    result = results_of(scorer, task_files.write_jsonl(tmp_path / "t.jsonl", rows))["t"]
    expected = -direct_nats(scorer, "{{1 + 1}} {{gold}}", " {{2*2}}")
    assert result.parts[0].loglikelihoods[0][0] == pytest.approx(expected, rel=1e-5)


# ---- two models ----


def test_differences_are_paired_by_item(run: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [
        {
            "context": f"{i}",
            "choices": ["".join(draw.choices(ascii_lowercase, k=4)) for _ in range(3)],
            "gold": 0,
        }
        for i in range(40)
    ]
    path = task_files.write_jsonl(tmp_path / "letters.jsonl", rows)
    a, b = (results_of(scorer_of(run / f"checkpoint-{step}"), path)["letters"] for step in (10, 20))
    items = np.array(b.parts[0].scores["acc_norm,none"]) - np.array(a.parts[0].scores["acc_norm,none"])
    assert items.any()
    difference = scores.score_difference(b, a)
    assert difference.value == pytest.approx(items.mean())
    assert difference.standard_error == pytest.approx(items.std(ddof=1) / np.sqrt(len(items)))
    interval = stats.t.interval(0.95, len(items) - 1, items.mean(), stats.sem(items))
    assert (difference.low, difference.high) == pytest.approx(interval)
    gold = [row["gold"] for row in rows]
    nats = [
        [-answers[right] for answers, right in zip(r.parts[0].loglikelihoods, gold, strict=True)]
        for r in (a, b)
    ]
    better = scores.nats_difference(a, b)
    assert better is not None
    assert better.value == pytest.approx(np.mean(nats[0]) - np.mean(nats[1]))
    same = scores.score_difference(a, a)
    assert (same.value, same.standard_error, same.low, same.high) == (0, 0, 0, 0)


def test_a_table_of_models_and_their_weighted_mean(run: Path) -> None:
    names = ["checkpoint-10", "checkpoint-20"]
    with prepared([str(run.parent / "evals")]) as (tasks, left_out):
        assert len(left_out) == 1
        _, results = verbs.evaluate_with_tasks(
            [Candidate(name=n, choice=Choice(paths=(run / n,))) for n in names], [], tasks
        )
    weights = {"arc": 1.0, "choices": 2.0, "pairs": 3.0, "targets": 0.0}
    rows = compare_tasks(names, results, weights)
    assert [row["task"] for row in rows] == [t for t in [*weights, "weighted mean"] for _ in names]
    assert rows[0]["improvement"] is None
    means = [row for row in rows if row["task"] == "weighted mean"]
    for model, row in enumerate(means):
        single = [each["score"] for each in rows[model:-2:2]]
        shares = np.array(list(weights.values())) / 6
        assert row["score"]["value"] == pytest.approx(
            sum(w * s["value"] for w, s in zip(shares, single, strict=True))
        )
        error = np.sqrt(sum((w * s["standard_error"]) ** 2 for w, s in zip(shares, single, strict=True)))
        assert row["score"]["standard_error"] == pytest.approx(error)
    gain = means[1]["score"]["value"] - means[0]["score"]["value"]
    assert means[1]["improvement"]["value"] == pytest.approx(gain)


def test_other_items_cannot_be_paired(run: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10")
    path = run.parent / "evals" / "choices.jsonl"
    a, b = (results_of(scorer, path, limit=limit)["choices"] for limit in (None, 5))
    assert len(b.parts[0].loglikelihoods) == 5
    with pytest.raises(InputError, match="not evaluated on the same items"):
        scores.score_difference(a, b)


def test_the_mean_of_one_set_is_that_of_its_items() -> None:
    values = [0.0, 1.0, 1.0, 4.0]
    assert stratified_mean([values], [7.0]) == mean_estimate(values, [1] * 4)
    with pytest.raises(InputError, match="at least two items"):
        stratified_mean([values, [1.0]], [1, 1])


def test_the_interval_of_two_sets_is_that_of_welch() -> None:
    a, b = np.array([0.0, 1, 1, 4, 2]), np.array([3.0, 5, 4])
    # mean(a) + mean(-b), as a weighted mean of weights 1/2
    found = stratified_mean([a, -b], [1, 1])
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (2 * found.low, 2 * found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a=1", "leaves out b"),
        ("a=1,b", "expected task=number"),
        ("a=1,c=1", "expected task=number"),
        ("a=1,b=-1", "expected task=number"),
        ("a=1,b=nan", "expected task=number"),
        ("a=1,b=inf", "expected task=number"),
        ("a=0,b=0", "all 0"),
    ],
)
def test_weights_that_cannot_be(text: str, words: str) -> None:
    assert task_weights(["a", "b"], "b=2,a=1") == {"a": 1.0, "b": 2.0}
    assert task_weights(["a", "b"], None) == {"a": 1.0, "b": 1.0}
    with pytest.raises(UsageError, match=words):
        task_weights(["a", "b"], text)


# ---- the harness's own tasks, from YAML files of its form in place of those it ships ----

_CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
_ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # these are allowed to reach for it
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tmp_path / "own"
    big = task_files.write_jsonl(folder / "big.jsonl", task_files.CHOICES)
    small = task_files.write_jsonl(folder / "small.jsonl", task_files.CHOICES[3:7])
    for path, shots in ((big, 2), (small, 0)):
        write_yaml(folder, path.stem, path, {**_CHOICES, "num_fewshot": shots, "metric_list": [_ACC]})
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "context",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    write_yaml(folder, "rolling", big, rolling)
    write_yaml(folder, "unsafe", big, {**_CHOICES, "unsafe_code": True, "metric_list": [_ACC]})
    write_yaml(folder, "gone", folder / "nowhere.jsonl", {**_CHOICES, "metric_list": [_ACC]})
    for by_size in (True, False):
        group = {
            "group": f"both_{by_size}",
            "task": ["big", "small"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_size}],
        }
        (folder / f"both_{by_size}.yaml").write_text(json.dumps(group))
    from lm_eval.tasks import TaskManager

    ours = functools.partial(TaskManager, include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", ours)
    return folder


def write_yaml(folder: Path, name: str, data: Path, rest: dict[str, Any]) -> None:
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    common = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps({**common, "doc_to_text": "context", **rest}))


def test_a_group_scores_as_the_harness_has_it(run: Path, own: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10", context_tokens=256)
    for by_size in (True, False):
        group = f"both_{by_size}"
        result = results_of(scorer, group)[group]
        theirs = result.harness["results"]
        assert scores.score(result).value == pytest.approx(theirs[group]["acc,none"])
        assert [part.name for part in result.parts] == ["big", "small"]
        parts = [theirs[name]["acc_stderr,none"] for name in ("big", "small")]
        shares = [9 / 13, 4 / 13] if by_size else [0.5, 0.5]
        error = np.hypot(shares[0] * parts[0], shares[1] * parts[1])
        assert scores.score(result).standard_error == pytest.approx(error)


def test_every_model_sees_the_same_examples(run: Path, own: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10", context_tokens=256)
    with prepared(["big"], limit=5) as ([task], _):
        first, second = run_task(scorer, task), run_task(scorer, task)
    assert first.harness["n-shot"] == {"big": 2}
    assert first.parts == second.parts
    assert len(first.parts[0].loglikelihoods) == 5


def test_a_task_sent_to_another_process_is_the_same_there(run: Path, own: Path, tmp_path: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10", context_tokens=256)
    with prepared(["both_True", str(run.parent / "evals")], limit=3) as (tasks, _):
        here = [run_task(scorer, task) for task in tasks]
        sent = pickle.dumps(tasks)
    there = pickle.loads(sent)
    assert [run_task(scorer, task).parts for task in there] == [result.parts for result in here]
    (own / "big.jsonl").write_text(json.dumps({"context": "other", "choices": ["a", "b"], "gold": 0}) + "\n")
    group = next(task for task in pickle.loads(sent) if task.name == "both_True")
    with pytest.raises(MismatchError, match="other items here"):
        group.load()


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("bigg", UsageError, r"did you mean big"),
        ("rolling", UsageError, "held-out losses are measured with --text"),
        ("unsafe", UsageError, "runs code that the model writes"),
        ("gone", InputError, "data cannot be reached"),
    ],
)
def test_own_tasks_that_cannot_be_used(own: Path, name: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words), prepared([name]):
        pass


def test_the_path_of_a_yaml_file_is_no_task(tmp_path: Path, own: Path) -> None:
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    (tmp_path / "evil.yaml").write_text("task: evil\ndoc_to_text: !function code.run\n")
    for spec in (str(tmp_path / "evil.yaml"), "evil.yaml"):
        with pytest.raises((UsageError, InputError)), prepared([spec]):
            pass
    assert not (tmp_path / "canary").exists()


def test_a_file_named_like_another_task(own: Path) -> None:
    with pytest.raises(UsageError, match="two tasks named big"), prepared(["big", str(own / "big.jsonl")]):
        pass


# ---- refusals ----


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    with pytest.raises(MissingExtra, match=r"pma-llm\[eval\]"), prepared(["x.jsonl"]):
        pass


def test_an_answer_longer_than_the_context(run: Path, tmp_path: Path) -> None:
    path = task_files.write_jsonl(tmp_path / "long.jsonl", [{"context": "a", "target": "b" * 64}] * 2)
    with pytest.raises(InputError, match="65 tokens, expected 1 to 64"):
        results_of(scorer_of(run / "checkpoint-10"), path)


def test_a_long_context_loses_its_beginning(run: Path, tmp_path: Path) -> None:
    rows = [{"context": f"{'x' * (i + 100)}abc", "target": "d"} for i in range(2)]
    scorer = scorer_of(run / "checkpoint-10", context_tokens=16)
    result = results_of(scorer, task_files.write_jsonl(tmp_path / "l.jsonl", rows))["l"]
    expected = -direct_nats(
        scorer, "x" * 12 + "abc", " d"
    )  # 16 tokens predict the last, and " " is given too
    assert result.parts[0].loglikelihoods[0] == pytest.approx(result.parts[0].loglikelihoods[1], rel=1e-6)
    assert result.parts[0].loglikelihoods[0][0] == pytest.approx(expected, rel=1e-4)


def test_a_broken_model_is_an_error(run: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10")
    with torch.no_grad():
        next(scorer.model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="log-likelihood nan"):
        results_of(scorer, run.parent / "evals" / "targets.jsonl")


def test_the_harness_gets_the_model_itself(run: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10")
    model = harness_model(scorer)
    assert model.model is scorer.model
    assert (model.max_length, model.prefix_token_id) == (64, scorer.start_token)
