"""Figure 6: continued training on another domain, from the last checkpoint and from the merge."""

from __future__ import annotations

from typing import Any

import numpy as np

from pma.studies import charts, seeds
from pma.studies.lab import Lab
from pma.studies.making import Trunk
from pma.studies.measuring import Reading
from pma.studies.presets import Size
from pma.studies.seeds import shown
from pma.studies.stages import (
    LAST,
    MERGE,
    Schedule,
    Stage,
    StageText,
    at_moment,
    constant,
    curve,
    logged,
    moments,
    stage,
)
from pma.studies.telling import Finding, Table, Told, Verdict, equal_verdict, most, sign_verdict
from pma.studies.tuning import trunks, tuned

VERSION = 1
STRETCHES = 12
PARITY = 0.01  # nats a token that count as equal
STARTS = (LAST, MERGE)


def schedules(rate: float) -> list[Schedule]:
    """The trunk's own rate, constant; a decay from it to a tenth; one from a third of it to a thirtieth."""
    return [
        constant("constant", rate),
        Schedule(name="from the trunk's rate", peak=rate, final=rate / 10),
        Schedule(name="from a third of it", peak=rate / 3, final=rate / 30),
    ]


def run(lab: Lab) -> dict[str, Any]:
    """Stages on the other domain, of the middle dense size."""
    size = lab.preset.size(lab.preset.middle[0])
    return {
        "steps": lab.preset.stage_steps,
        "tokens_a_step": size.recipe.tokens_a_step,
        "window": [lab.preset.last, lab.preset.every_steps, lab.preset.steps],
        "moments": moments(lab),
        **_of_size(lab, size),
    }


def _of_size(lab: Lab, size: Size) -> dict[str, Any]:
    rate = tuned(lab, (size,))[size.name].rate
    other = lab.data.other_domain

    def text(trunk: Trunk) -> StageText:
        return StageText(trunk=trunk, text=other, instructions=False)

    runs = {
        (schedule.name, start): [
            stage(lab, trunk, start, text(trunk), schedule) for trunk in trunks(lab, size).values()
        ]
        for schedule in schedules(rate)
        for start in STARTS
    }
    lab.make([run for each in runs.values() for run in each])
    one = next(iter(runs.values()))[0]
    steps = moments(lab)
    keys = [(name, step, i) for name in runs for step in steps for i in range(len(lab.seeds))]
    models = [at_moment(runs[name][i], step) for name, step, i in keys]
    new = dict(zip(keys, lab.measure(models, of=one.text), strict=True))
    ends = [key for key in keys if key[1] in (0, steps[-1])]
    trunk_text = one.text.needs()[0]
    of_ends = [at_moment(runs[name][i], step) for name, step, i in ends]
    old = dict(zip(ends, lab.measure(of_ends, cloze=0, of=trunk_text), strict=True))
    return {
        "size": size.name,
        "rate": rate,
        "schedules": [
            {
                **schedule.to_json(),
                "training": _training(lab, [runs[schedule.name, start] for start in STARTS]),
                "points": [_point(lab, new, old, schedule.name, step) for step in steps],
            }
            for schedule in schedules(rate)
        ],
        "retuned": _retuned(lab, new, list(runs), steps[-1]),
    }


def _training(lab: Lab, runs: list[list[Stage]]) -> dict[str, Any]:
    """The training loss over steps, by start and seed; and by how much it is lower from the merge on the same
    data, over each stretch of steps.
    """
    series = [[logged(lab, run, "loss") for run in several] for several in runs]
    pairs = list(zip(*series, strict=True))
    stretches = np.array_split(np.arange(len(pairs[0][0])), min(STRETCHES, len(pairs[0][0])))
    return {
        **{start: [curve(each) for each in several] for start, several in zip(STARTS, series, strict=True)},
        "gain": [
            {
                "from": int(each[0]) + 1,
                "to": int(each[-1]) + 1,
                **seeds.series_gain([(a[each], b[each]) for a, b in pairs], 1).to_json(),
            }
            for each in stretches
        ],
    }


Key = tuple[tuple[str, str], int, int]  # schedule and start, step, seed's number


def _point(
    lab: Lab, new: dict[Key, Reading], old: dict[Key, Reading], name: str, step: int
) -> dict[str, Any]:
    """Both models after so many steps: losses and cloze by seed, and what the merge is ahead, positive where
    it is better.
    """

    def pairs(readings: dict[Key, Reading]) -> list[tuple[Any, Any]]:
        return [
            (readings[(name, LAST), step, i].text, readings[(name, MERGE), step, i].text)
            for i in range(len(lab.seeds))
        ]

    both = pairs(new)
    told: dict[str, Any] = {
        "step": step,
        "gain": {"loss": seeds.loss_gain(both).to_json(), "cloze": seeds.cloze_gain(both).to_json()},
    }
    for side, start in enumerate(STARTS):
        told[start] = [{"loss": p[side].loss.value, "cloze": p[side].cloze_accuracy} for p in both]
    if ((name, LAST), step, 0) in old:
        both = pairs(old)
        told["gain"]["old_loss"] = seeds.loss_gain(both).to_json()
        for side, start in enumerate(STARTS):
            for mine, pair in zip(told[start], both, strict=True):
                mine["old_loss"] = pair[side].loss.value
    return told


def _retuned(lab: Lab, new: dict[Key, Reading], names: list[tuple[str, str]], end: int) -> dict[str, Any]:
    """The best schedule of each start at the end, and what the merge would gain by its own instead of the
    one that is best for last.
    """
    several = range(len(lab.seeds))
    best: dict[str, str] = {}
    for start in STARTS:
        losses = {
            name: sum(new[(name, start), end, i].text.loss.value for i in several)
            for name, begun in names
            if begun == start
        }
        best[start] = min(losses, key=lambda name: losses[name])
    both = [(new[(best[LAST], MERGE), end, i].text, new[(best[MERGE], MERGE), end, i].text) for i in several]
    return {"best": best, "gain": seeds.loss_gain(both).to_json()}


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    moments_ = results["moments"]
    first, end = moments_[1], moments_[-1]
    gains = [_by_step(schedule) for schedule in results["schedules"]]
    at_first, at_end = [gain[first] for gain in gains], [gain[end] for gain in gains]
    findings = [
        Finding(
            claim=f"from the merge the held-out loss is lower at first ({first} steps), by each schedule",
            verdict=most([sign_verdict(g["loss"]["low"], g["loss"]["high"]) for g in at_first]),
            evidence=f"By {_range(at_first, 'loss')}.",
        ),
        Finding(
            claim="and the score is higher at first (cloze on the new domain)",
            verdict=most([sign_verdict(g["cloze"]["low"], g["cloze"]["high"]) for g in at_first]),
            evidence=f"By {_range(at_first, 'cloze')}.",
        ),
        Finding(
            claim=f"at the end the two are equal (within {PARITY} nats a token), by each schedule",
            verdict=most([equal_verdict(g["loss"]["low"], g["loss"]["high"], PARITY) for g in at_end]),
            evidence=f"After {end} steps the merge is ahead by {_range(at_end, 'loss')}.",
        ),
        Finding(
            claim="the rate need not be tuned again: what is best from last is best from the merge",
            verdict=_same_schedule(results["retuned"]),
            evidence=_best(results["retuned"]),
        ),
    ]
    return Told(
        set_up=_set_up(results),
        tables=[_table(results), _training_table(results)],
        findings=findings,
        more="several seeds (`--seeds 3`), and a stage that is longer beside the trunk.",
    )


def _by_step(schedule: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {point["step"]: point["gain"] for point in schedule["points"]}


def _range(gains: list[dict[str, Any]], name: str) -> str:
    """The smallest and the largest of them, with their intervals."""
    ordered = sorted((gain[name] for gain in gains), key=lambda gain: float(gain["value"]))
    return f"{shown(ordered[0])} at the least, {shown(ordered[-1])} at the most"


def _same_schedule(retuned: dict[str, Any]) -> Verdict:
    if retuned["best"][LAST] == retuned["best"][MERGE]:
        return Verdict.AGREES
    gain = retuned["gain"]
    return Verdict.DISAGREES if (gain["low"] or 0.0) > 0 else Verdict.CANNOT_TELL


def _best(retuned: dict[str, Any]) -> str:
    best = retuned["best"]
    if best[LAST] == best[MERGE]:
        return f"“{best[LAST]}” is for both."
    its_own = f"“{best[MERGE]}” from the merge, which gains {shown(retuned['gain'])} by it"
    return f"“{best[LAST]}” from last, {its_own}."


def _set_up(results: dict[str, Any]) -> str:
    last, every, at = results["window"]
    tokens = results["steps"] * results["tokens_a_step"] / 1e3
    return (
        f"{results['size']}, {at:,} steps at constant rate, then {results['steps']} steps ({tokens:.0f}K "
        "tokens) on a domain that it has not seen (textbooks of mathematics; without `--data`, Python's "
        f"documentation), from the last checkpoint and from the mean of the last {last}, {every} steps "
        "apart: a fresh optimizer, the same data in the same order, three schedules: the trunk's tuned "
        "rate, constant; cosine from it to a tenth; cosine from a third of it to a thirtieth. Gains are "
        "held-out loss on the new domain from last less that from the merge, nats a token, positive where "
        "the merge is better; 95% intervals over documents and seeds."
    )


def _table(results: dict[str, Any]) -> Table:
    rows = []
    for schedule in results["schedules"]:
        by_step, end = _by_step(schedule), schedule["points"][-1]
        rows.append(
            [
                f"{schedule['peak']:.2g} → {schedule['final']:.2g}",
                *(shown(by_step[step]["loss"]) for step in results["moments"]),
                " / ".join(f"{charts.mean_of(end[start], 'loss'):.3f}" for start in STARTS),
                " / ".join(_forgotten(schedule, start) for start in STARTS),
            ]
        )
    steps = (f"gain, step {step}" for step in results["moments"])
    more = ("loss at the end, last / merge", "loss on the trunk's text, last / merge")
    return Table(columns=["rate", *steps, *more], rows=rows)


def _training_table(results: dict[str, Any]) -> Table:
    """The first, second, middle and last stretch of training."""
    count = len(results["schedules"][0]["training"]["gain"])
    picked = sorted({0, min(1, count - 1), count // 2, count - 1})
    rows, columns = [], ["rate"]
    for schedule in results["schedules"]:
        stretches = [schedule["training"]["gain"][i] for i in picked]
        columns = ["rate", *(f"steps {each['from']} to {each['to']}" for each in stretches)]
        rates = f"{schedule['peak']:.2g} → {schedule['final']:.2g}"
        rows.append([rates, *(shown(each) for each in stretches)])
    title = "Training loss from last less that from the merge, on the same batches (intervals over steps):"
    return Table(columns=columns, rows=rows, title=title)


def _forgotten(schedule: dict[str, Any], start: str) -> str:
    """The loss on the trunk's own text, before and after the stage."""
    before, after = (charts.mean_of(schedule["points"][i][start], "old_loss") for i in (0, -1))
    return f"{before:.2f} → {after:.2f}"


def draw(results: dict[str, Any]) -> Any:
    """A column for each schedule, as in the paper; rows: training loss, by how much it is lower from the
    merge, held-out loss and cloze of the new domain, over the stage's tokens.
    """
    points = []
    for schedule in results["schedules"]:
        for start, model in ((LAST, "raw"), (MERGE, "merged")):
            common = {"panel": schedule["name"], "model": model}
            rows = [
                ("training loss", entry["step"], entry["value"])
                for curve_ in schedule["training"][start]
                for entry in curve_
            ]
            if start == MERGE:
                rows += [
                    ("training loss lower by", (each["from"] + each["to"]) / 2, value)
                    for each in schedule["training"]["gain"]
                    for value in each["by_seed"]
                ]
            for metric, title in (("loss", "held-out loss"), ("cloze", "cloze accuracy")):
                for point in schedule["points"]:
                    rows += [(title, point["step"], value[metric]) for value in point[start]]
            points += [
                {**common, "metric": title, "x": step * results["tokens_a_step"], "y": value}
                for title, step, value in rows
            ]
    return charts.panels(points, x="tokens of the new domain", models=("raw", "merged"))
