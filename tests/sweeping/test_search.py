"""A search finds what an exhaustive one does, within its budget, and chooses by one half of the text."""

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pma import averaging
from pma.engine import MergeOptions
from pma.errors import InputError, UsageError
from pma.evaluation.text import Document
from pma.quantities import Steps, Tokens
from pma.sweeping import Outcome, Space, findings
from pma.sweeping.halves import halved
from pma.trajectory import Preset

from .scripted import Reading, losses, searched, text, write_run

# about 1 from above, with noise: merges are better than any of them
NUMBERS = [1 + 2.0 ** (-n / 4) + 0.4 * float(np.sin(7.0 * n)) for n in range(24)]
DOCUMENTS = text(64)
PLENTY = 1e6


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", NUMBERS)


def loss_on(number: float, documents: tuple[Document, ...]) -> float:
    nats, tokens = losses(number, documents)
    return sum(nats) / sum(tokens)


def every_candidate(space: Space) -> list[tuple[float, tuple[int, ...], str]]:
    """Loss on the half to choose by, steps and scheme of everything in `space`, the naive way, best first."""
    assert space.lasts is not None
    assert space.schemes is not None
    assert space.best is not None
    selection = halved(DOCUMENTS).selection
    steps = [10 * (n + 1) for n in range(len(NUMBERS))]
    orders = []
    for last, apart in product(space.lasts, (1, 2)):
        chosen = range(len(NUMBERS) - 1, -1, -apart)[:last]
        if len(chosen) == last:
            orders.append((sorted(chosen), True))
    pool = range(len(NUMBERS))[-2 * max(space.best) :]
    ranked = sorted(pool, key=lambda n: loss_on(NUMBERS[n], selection))
    for best in space.best:
        orders += [(sorted(ranked[:best]), True), (ranked[:best][::-1], False)]
    tried = {(loss_on(NUMBERS[-1], selection), (steps[-1],), "sma")}
    tried.add((loss_on(float(np.mean(NUMBERS[-10:])), selection), tuple(steps[-10:]), "sma"))
    for (order, by_step), scheme in product(orders, space.schemes):
        # by loss, the best last, they are evenly spaced
        positions = [float(steps[n]) for n in order] if by_step else [float(i) for i in range(len(order))]
        merged = float(averaging.scheme(scheme)(positions) @ np.array([NUMBERS[n] for n in order]))
        tried.add((loss_on(merged, selection), tuple(steps[n] for n in sorted(order)), scheme))
    return sorted(tried)


@pytest.mark.parametrize("schemes", [("wma",), ("sma", "wma", "ema:0.3", "1-sqrt")])
def test_with_a_large_budget_it_is_exhaustive(run: Path, schemes: tuple[str, ...]) -> None:
    space = Space(lasts=(2, 3, 5, 8, 13), everys=(None, Steps(20)), schemes=schemes, best=(2, 4, 7))
    outcome = searched(run, DOCUMENTS, PLENTY, space)
    assert len(outcome.rungs) == 1
    assert outcome.evaluations < outcome.budget
    found = {
        (tuple(row["steps"]), row["scheme"], round(row["loss"], 5)) for row in findings(outcome)["ranked"]
    }
    expected = every_candidate(space)
    assert found == {(steps, scheme, round(loss, 5)) for loss, steps, scheme in expected}
    best = outcome.winner
    assert (tuple(point.step for point in best.points), best.scheme) == expected[0][1:]


def model_numbers(outcome: Outcome) -> dict[str, set[str]]:
    halves = outcome.halves
    return {
        "selection": {document.name for document in halves.selection},
        "report": {document.name for document in halves.report},
    }


@pytest.mark.parametrize("budget", [None, 12.0, 25.0])
def test_a_rung_reads_the_same_documents_and_the_report_is_of_others(run: Path, budget: float | None) -> None:
    reading = Reading()
    outcome = searched(run, DOCUMENTS, budget, reading=reading)
    assert outcome.evaluations <= outcome.budget
    names = model_numbers(outcome)
    by_documents = Counter(documents for _, documents in reading.seen)
    of_report = [documents for documents in by_documents if set(documents) & names["report"]]
    # winner, last checkpoint and plain window read all of the report half, and nobody else does
    assert len(of_report) == 1
    assert set(of_report[0]) == names["report"]
    assert by_documents.pop(of_report[0]) <= 3
    parts = [tuple(document.name for document in part) for part in outcome.halves.parts]
    assert set(by_documents) == set(parts)
    # so many read a part as there are candidates of its rung, and at first the single checkpoints
    counts = [by_documents[part] for part in parts]
    for before, rung in zip((0, *(r.parts for r in outcome.rungs)), outcome.rungs, strict=False):
        reads = set(counts[before : rung.parts])
        singles = len(outcome.field.pool) if before == 0 else 0
        assert len(reads) == 1
        # last checkpoint and plain window read all parts, whether they are in the rung or not
        assert rung.candidates <= reads.pop() <= rung.candidates + max(2, singles)
    assert outcome.tokens_read == sum(sum(losses(number, _named(docs))[1]) for number, docs in reading.seen)


def _named(names: tuple[str, ...]) -> list[Document]:
    return [DOCUMENTS[int(name)] for name in names]


def test_what_it_reports_is_arithmetic(run: Path) -> None:
    found = findings(searched(run, DOCUMENTS, PLENTY, Space(schemes=("sma",))))
    halves = halved(DOCUMENTS)
    last = NUMBERS[-1]
    plain = float(np.mean(NUMBERS[-10:]))
    assert found["last"]["report"]["loss"]["value"] == pytest.approx(loss_on(last, halves.report), abs=1e-6)
    gain = loss_on(last, halves.report) - loss_on(plain, halves.report)
    assert found["plain"]["report"]["gain"]["value"] == pytest.approx(gain, abs=1e-6)
    selected, reported = (found["winner"][half]["gain"] for half in ("selection", "report"))
    flattered = found["flattered_by"]
    assert flattered["value"] == selected["value"] - reported["value"]
    errors = selected["standard_error"], reported["standard_error"]
    assert flattered["standard_error"] == pytest.approx(np.hypot(*errors))
    winner = found["winner"]
    merged = float(np.mean([NUMBERS[step // 10 - 1] for step in winner["steps"]]))
    on_halves = [loss_on(plain, half) - loss_on(merged, half) for half in (halves.selection, halves.report)]
    beyond = found["flattered_beyond_plain"]["value"]
    assert beyond == pytest.approx(on_halves[0] - on_halves[1], abs=1e-6)
    below = found["winner_below_plain"]["value"]
    assert below == pytest.approx(reported["value"] - found["plain"]["report"]["gain"]["value"])


def test_an_interrupted_search_goes_on_and_reads_nothing_twice(run: Path, tmp_path: Path) -> None:
    whole = Reading()
    expected = findings(searched(run, DOCUMENTS, 15.0, reading=whole, store=tmp_path / "whole"))
    store, seen = tmp_path / "interrupted", []
    for stop_after in (7, 120, 3, 60):
        reading = Reading(stop_after)
        with pytest.raises(KeyboardInterrupt):
            searched(run, DOCUMENTS, 15.0, reading=reading, store=store)
        seen += reading.seen
    reading = Reading()
    found = findings(searched(run, DOCUMENTS, 15.0, reading=reading, store=store))
    assert Counter(seen + reading.seen) == Counter(whole.seen)
    assert found.pop("tokens_known") == sum(sum(losses(number, _named(docs))[1]) for number, docs in seen)
    assert found == {name: value for name, value in expected.items() if name != "tokens_known"}
    again = Reading()
    outcome = searched(run, DOCUMENTS, 15.0, reading=again, store=store)
    assert again.seen == []
    assert outcome.tokens_known == outcome.tokens_read
    wider = Reading()
    searched(run, DOCUMENTS, PLENTY, reading=wider, store=store)
    assert not set(wider.seen) & set(whole.seen)


def test_a_budget_in_tokens_is_one_in_readings(run: Path, tmp_path: Path) -> None:
    tokens = sum(losses(1.0, DOCUMENTS)[1])
    by_tokens = searched(run, DOCUMENTS, Tokens(15 * tokens), store=tmp_path / "a")
    by_readings = searched(run, DOCUMENTS, 15.0, store=tmp_path / "b")
    assert by_tokens.budget == pytest.approx(15.0)
    assert by_tokens.rungs == by_readings.rungs
    assert by_tokens.tokens_read <= 15 * tokens
    assert by_tokens.evaluations == pytest.approx(by_tokens.tokens_read / tokens)


def test_too_small_a_budget_says_what_is_enough(run: Path) -> None:
    with pytest.raises(UsageError, match="are too few for") as refused:
        searched(run, DOCUMENTS, 2.0, reading=Reading(stop_after=0))
    enough = float(str(refused.value).split("give at least ")[1].split(",")[0])
    assert searched(run, DOCUMENTS, enough).evaluations <= enough
    with pytest.raises(UsageError, match="are too few for"):
        searched(run, DOCUMENTS, enough - 0.2)


def test_a_merge_that_is_no_better_does_not_win(tmp_path: Path) -> None:
    outcome = searched(write_run(tmp_path / "run", [1.5] * 24), DOCUMENTS, PLENTY)
    assert outcome.winner == outcome.field.last
    schemes = [ranked.contender.scheme for ranked in outcome.ranked if ranked.contender.best_of is None]
    assert schemes == sorted(schemes, key=("sma", "wma", "ema:0.2").index)


def test_the_best_of_the_recent_past_are_of_one_phase(tmp_path: Path) -> None:
    rates = {step: 1e-3 if step <= 100 else 5e-4 for step in range(10, 250, 10)}
    run = write_run(tmp_path / "run", NUMBERS, rates)
    outcome = searched(run, DOCUMENTS, PLENTY, Space(best=(3, 6, 10)))
    assert [point.step for point in outcome.field.pool] == list(range(110, 250, 10))
    assert all(min(found["steps"]) > 100 for found in findings(outcome)["ranked"])
    narrow = searched(run, DOCUMENTS, PLENTY, Space(best=(3, 20)))
    assert narrow.field.best == (3,)
    assert "--best 20: only 14 checkpoints" in narrow.field.skipped[0]


def test_the_best_are_named_by_their_own_losses(run: Path) -> None:
    outcome = searched(run, DOCUMENTS, PLENTY, Space(lasts=(2,), best=(3,), schemes=("sma", "wma")))
    selection = outcome.halves.selection
    recent = range(len(NUMBERS) - 6, len(NUMBERS))
    ranked = sorted(recent, key=lambda n: loss_on(NUMBERS[n], selection))
    best = [10 * (n + 1) for n in ranked[:3]]
    found = {
        (row["scheme"], row["weights"] is not None): dict(
            zip(row["steps"], row["weights"] or (None,) * 3, strict=True)
        )
        for row in findings(outcome)["ranked"]
        if row["best_of"] == 6
    }
    assert set(found) == {("sma", False), ("wma", False), ("wma", True)}
    assert list(found["wma", False]) == list(found["sma", False]) == sorted(best)
    assert [found["wma", True][step] for step in best] == pytest.approx([3 / 6, 2 / 6, 1 / 6])


def test_runs_and_texts_that_are_too_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", NUMBERS[:2])
    with pytest.raises(UsageError, match="at least 3 complete checkpoints of one phase; up to checkpoint-20"):
        searched(run, DOCUMENTS, None)
    assert searched(run, DOCUMENTS, None, Space(lasts=(2,))).winner.last in (1, 2)
    with pytest.raises(UsageError, match="no window of the search exists"):
        searched(run, DOCUMENTS, None, Space(lasts=(30,)))
    with pytest.raises(InputError, match="needs at least 8"):
        searched(run, DOCUMENTS[:7], None, Space(lasts=(2,)))
    with pytest.raises(UsageError, match="--best 1: a merge"):
        Space(best=(1,))


def test_its_own_choice_is_what_the_run_has(run: Path) -> None:
    outcome = searched(run, DOCUMENTS, PLENTY)
    windows = {(w.last, w.every and w.every.count, w.scheme) for w in outcome.field.windows}
    shapes = [(3, None), (6, None), (10, None), (20, None), (3, 20), (6, 20), (10, 20), (3, 40), (6, 40)]
    assert windows == {(*shape, scheme) for shape in shapes for scheme in ("sma", "wma", "ema:0.2")}
    assert (len(outcome.field.pool), outcome.field.best) == (20, (3, 10))
    assert outcome.field.plain.last == 10
    assert len(outcome.ranked) == 1 + len(windows) + 2 * 5
    assert findings(outcome)["skipped"] == []


def test_the_plain_window_is_the_papers_where_it_had_such_models(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(**size: Any) -> tuple[int, Tokens | Steps | None]:
        known = {"last": 4, "every_tokens": 3000, "extrapolated": False, "capped": False}
        monkeypatch.setattr("pma.choosing._preset", lambda found: Preset(**{**known, **size}))
        contender = searched(run, DOCUMENTS, None).field.plain
        return contender.last, contender.every

    assert plain() == (4, Tokens(3000))
    assert plain(extrapolated=True) == plain(capped=True) == (10, None)
    assert plain(last=9) == (10, None)  # the run is not that long


def test_ends_of_windows_are_searched_too(run: Path) -> None:
    outcome = searched(run, DOCUMENTS, PLENTY, Space(lasts=(3,), ats=(120, 200), best=()))
    assert outcome.field.last.at == 200
    assert {ranked.contender.at for ranked in outcome.ranked} == {120, 200}


def test_best_does_not_go_with_stored_means(run: Path) -> None:
    with pytest.raises(UsageError, match="does not go with --use interval-means"):
        options = MergeOptions(use="interval-means")
        searched(run, DOCUMENTS, None, Space(lasts=(2,), best=(3,)), options=options)
