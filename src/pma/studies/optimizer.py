"""What becomes of the optimizer's state when training goes on from a merge: four treatments, and how long the
merge's advantage over the run itself lasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pma.evaluation.evaluate import Evaluation
from pma.studies import charts, seeds
from pma.studies.lab import Lab
from pma.studies.making import Merged, Resumed, Run, Trunk
from pma.studies.measuring import Measured, Reading
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, Verdict, most, sign_verdict
from pma.studies.tuning import trunks

VERSION = 1
TREATMENTS = ("newest", "second-moment", "average", "reset")
LOOKS, BETWEEN_LOOKS = 10, 2  # at a continuation; checkpoints from one look to the next
PARITY = 0.01  # nats a token
RAW, AT_END = "raw", "merged at the end"


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run and its continuations from the merge at step `start`, measured each `every` steps up to
    `until`.
    """

    run: Trunk
    start: int
    every: int
    until: int
    last: int

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that are compared."""
        between = BETWEEN_LOOKS * self.every
        return list(range(self.start + between, self.until + 1, between))

    def resumed(self, treatment: str) -> Resumed:
        """What goes on from the merge."""
        start = Merged(run=self.run, last=self.last, every=self.every, at=self.start, optimizer=treatment)
        return Resumed(start=start, until=self.until)

    def _merge(self, run: Run, at: int) -> Measured:
        return Measured(run=run, at=at, last=self.last, every=self.every)

    def models(self) -> dict[tuple[str, int | str], Measured]:
        """By treatment and step: raw checkpoints; at the start the merge itself; and the merge at the end."""
        runs: dict[str, Run] = {RAW: self.run, **{name: self.resumed(name) for name in TREATMENTS}}
        made: dict[tuple[str, int | str], Measured] = {
            (RAW, self.start): Measured(run=self.run, at=self.start),
            ("merge", self.start): self._merge(self.run, self.start),
        }
        for name, run in runs.items():
            made |= {(name, step): Measured(run=run, at=step) for step in self.steps}
            made[name, AT_END] = self._merge(run, self.until)
        return made


def run(lab: Lab) -> dict[str, Any]:
    """Each middle size: the run, and what goes on from its merge under each treatment."""
    preset = lab.preset
    start = preset.stages[1]
    until = min(preset.steps, start + LOOKS * BETWEEN_LOOKS * preset.every_steps)
    cases = {
        name: [
            Course(run=run, start=start, every=preset.every_steps, until=until, last=preset.last)
            for run in trunks(lab, preset.size(name)).values()
        ]
        for name in preset.middle
    }
    models = {name: [course.models() for course in courses] for name, courses in cases.items()}
    wanted = [model for by_seed in models.values() for mine in by_seed for model in mine.values()]
    characters = preset.characters_a_document // 2  # many checkpoints, far apart in loss
    readings = iter(lab.measure(wanted, cloze=0, characters_a_document=characters))
    sizes = []
    for name, by_seed in models.items():
        read = [{key: next(readings) for key in mine} for mine in by_seed]
        sizes.append({"size": name, **_compared(read, start, cases[name][0].steps)})
    return {
        "start": start,
        "until": until,
        "every_steps": preset.every_steps,
        "last": preset.last,
        "characters_a_document": characters,
        "tokens_a_step": preset.size(preset.middle[0]).recipe.tokens_a_step,
        "sizes": sizes,
    }


def _compared(
    by_seed: list[dict[tuple[str, int | str], Reading]], start: int, steps: list[int]
) -> dict[str, Any]:
    """The advantage of each treatment over the run itself at the same steps, on average over them, and of the
    merges at the end.
    """
    texts = [{key: reading.text for key, reading in readings.items()} for readings in by_seed]

    def gain(first: tuple[str, int | str], second: tuple[str, int | str]) -> dict[str, Any]:
        return seeds.loss_gain([(mine[first], mine[second]) for mine in texts]).to_json()

    def whole(name: str) -> list[Evaluation]:
        return [averaged([mine[name, step] for step in steps]) for mine in texts]

    def over_all(first: str, second: str) -> dict[str, Any]:
        return seeds.loss_gain(list(zip(whole(first), whole(second), strict=True))).to_json()

    treatments = {}
    for name in TREATMENTS:
        advantage = [gain((RAW, step), (name, step)) for step in steps]
        treatments[name] = {
            "loss": [[mine[name, step].loss.value for mine in texts] for step in steps],
            "advantage": advantage,
            "gone_at": gone(advantage, steps),
            "mean_advantage": over_all(RAW, name),
            "above_newest": over_all(name, TREATMENTS[0]) if name != TREATMENTS[0] else None,
            "merged_advantage": gain((RAW, AT_END), (name, AT_END)),
        }
    return {
        "steps": steps,
        "raw": [[mine[RAW, step].loss.value for mine in texts] for step in steps],
        "raw_merged": [mine[RAW, AT_END].loss.value for mine in texts],
        "advantage_at_start": gain((RAW, start), ("merge", start)),
        "treatments": treatments,
    }


def averaged(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The mean of evaluations of the same documents, document by document: the area under a curve, a step."""
    first = evaluations[0]
    nats = np.mean([each.nats for each in evaluations], axis=0)
    return replace(first, nats=tuple(nats.tolist()))


def gone(advantage: Sequence[dict[str, Any]], steps: Sequence[int]) -> int | None:
    """The first step from which on no interval lies above zero; None if the last one does."""
    found = None
    for each, step in zip(reversed(advantage), reversed(steps), strict=True):
        if each["low"] > 0:
            break
        found = step
    return found


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    length = results["until"] - results["start"]
    return Told(
        set_up=(
            f"Runs at the tuned constant rate. At step {results['start']:,} training goes on for {length} "
            f"steps from the merge of the last {results['last']} checkpoints, {results['every_steps']} steps "
            "apart (`pma init --optimizer`: moments of the newest checkpoint; the first zero, the second the "
            "newest's; both averaged; all zero, and Adam's count of steps), with the same data, and is "
            "compared with the run itself at the same step, on the first "
            f"{results['characters_a_document']:,} characters of each held-out document. Step, schedule and "
            "rate are kept by all four: a reset has no warmup of its own. Nats a token, 95% intervals over "
            "seeds and documents. *Gone*: from there on no interval lies above zero."
        ),
        tables=[_table(results)],
        findings=[
            _better(results),
            *(_parity(results, name) for name in (TREATMENTS[0], TREATMENTS[-1])),
            _newest_best(results),
            _merges(results),
        ],
        more="more seeds, other rates, and a reset with a warmup.",
    )


def _cases(results: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    return [(size["size"], size["treatments"][name]) for size in results["sizes"]]


def _every(results: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{size}, {name}", case[key])
        for name in TREATMENTS
        for size, case in _cases(results, name)
        if case[key] is not None
    ]


def _better(results: dict[str, Any]) -> Finding:
    cases = _every(results, "mean_advantage")
    return Finding(
        claim="whatever the treatment, going on from the merge is better than going on from the last, on "
        "average over the continuation",
        verdict=most([sign_verdict(each["low"], each["high"]) for _, each in cases]),
        evidence=_extremes(cases),
    )


def _parity(results: dict[str, Any], name: str) -> Finding:
    ends = [(size, case["advantage"][-1]) for size, case in _cases(results, name)]
    return Finding(
        claim=f"with `{name}` there is parity at the end, to {PARITY:g} nats",
        verdict=most([within(each) for _, each in ends]),
        evidence="; ".join(f"{size} {shown(each, 4)}" for size, each in ends) + ".",
    )


def within(interval: dict[str, Any]) -> Verdict:
    """Of a claim that a difference is within `PARITY`."""
    if -interval["low"] <= PARITY and interval["high"] <= PARITY:
        return Verdict.AGREES
    apart = interval["low"] > PARITY or interval["high"] < -PARITY
    return Verdict.DISAGREES if apart else Verdict.CANNOT_TELL


def _newest_best(results: dict[str, Any]) -> Finding:
    cases = _every(results, "above_newest")
    return Finding(
        claim="the newest moments, the default, are at least as good as any other treatment, on average (to "
        f"{PARITY:g} nats)",
        verdict=most([sign_verdict(each["low"] + PARITY, each["high"] + PARITY) for _, each in cases]),
        evidence=f"Others are above it by: {_extremes(cases)}",
    )


def _merges(results: dict[str, Any]) -> Finding:
    cases = _every(results, "merged_advantage")
    return Finding(
        claim="the advantage survives in the merges at the end",
        verdict=most([sign_verdict(each["low"], each["high"]) for _, each in cases]),
        evidence=f"Merge of the continuation's last {results['last']} against the run's: {_extremes(cases)}",
    )


def _extremes(cases: list[tuple[str, dict[str, Any]]]) -> str:
    by_value = sorted(cases, key=lambda case: float(case[1]["value"]))
    least, greatest = by_value[0], by_value[-1]
    return f"Least {shown(least[1], 4)} ({least[0]}), most {shown(greatest[1], 4)} ({greatest[0]})."


def _table(results: dict[str, Any]) -> Table:
    rows = []
    for size in results["sizes"]:
        for name, case in size["treatments"].items():
            after = None if case["gone_at"] is None else case["gone_at"] - results["start"]
            rows.append(
                [
                    size["size"],
                    name,
                    shown(case["advantage"][0], 4),
                    shown(case["mean_advantage"], 4),
                    shown(case["advantage"][-1], 4),
                    "not yet" if after is None else f"{after} ({after * results['tokens_a_step']:,})",
                    shown(case["merged_advantage"], 4),
                ]
            )
    first = results["sizes"][0]["steps"][0] - results["start"]
    starts = ", ".join(f"{s['size']} {shown(s['advantage_at_start'], 4)}" for s in results["sizes"])
    columns = ["size", "moments", f"after {first} steps", "mean", "at the end", "gone after steps (tokens)"]
    return Table(
        title=f"The merge's own advantage over the newest it is made of: {starts}. Then over the run:",
        columns=[*columns, "merges at the end"],
        rows=rows,
    )


def draw(results: dict[str, Any]) -> Any:
    """The advantage over the run itself, over tokens since the merge; a panel a size, a line a treatment."""
    points = []
    for size in results["sizes"]:
        at = {"panel": size["size"], "metric": "nats a token below the run itself"}
        for name, case in size["treatments"].items():
            begun = [(results["start"], size["advantage_at_start"])]
            for step, interval in [*begun, *zip(size["steps"], case["advantage"], strict=True)]:
                tokens = (step - results["start"]) * results["tokens_a_step"]
                points += [{**at, "x": tokens, "y": y, "model": name} for y in interval["by_seed"]]
        ends = (0, (results["until"] - results["start"]) * results["tokens_a_step"])
        points += [{**at, "x": x, "y": 0, "model": RAW} for x in ends]
    return charts.panels(points, x="training tokens since the merge", models=[RAW, *TREATMENTS], width=330)
