"""Figure 6: continued training on another domain, from the last checkpoint and from the merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pma.studies import charts, seeds
from pma.studies.lab import Lab
from pma.studies.making import Trunk
from pma.studies.measuring import Reading
from pma.studies.presets import DENSE, MIXTURE, Size
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
PARITY = 0.01  # nats a token that count as equal
STARTS = (LAST, MERGE)


def schedules(rate: float, family: str = DENSE) -> list[Schedule]:
    """The trunk's own rate, constant; a decay from it to a tenth; one from a third of it to a thirtieth. A
    mixture, which takes longer, has the second alone.
    """
    decay = Schedule(name="from the trunk's rate", peak=rate, final=rate / 10)
    if family == MIXTURE:
        return [decay]
    lower = Schedule(name="from a third of it", peak=rate / 3, final=rate / 30)
    return [constant("constant", rate), decay, lower]


def run(lab: Lab) -> dict[str, Any]:
    """Stages on the other domain, of the middle size of each family."""
    sizes = [lab.preset.size(name) for name in lab.preset.middle]
    return {
        "steps": lab.preset.stage_steps,
        "tokens_a_step": sizes[0].recipe.tokens_a_step,
        "window": [lab.preset.last, lab.preset.every_steps, lab.preset.steps],
        "moments": moments(lab),
        "sizes": [_of_size(lab, size) for size in sizes],
    }


def _of_size(lab: Lab, size: Size) -> dict[str, Any]:
    rate = tuned(lab, (size,))[size.name].rate
    runs = {
        (schedule.name, start): [
            stage(lab, trunk, start, _text(lab, trunk), schedule) for trunk in trunks(lab, size).values()
        ]
        for schedule in schedules(rate, size.family)
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
                "training": {start: _curves(lab, runs[schedule.name, start]) for start in STARTS},
                "points": [_point(lab, new, old, schedule.name, step) for step in steps],
            }
            for schedule in schedules(rate, size.family)
        ],
        "retuned": _retuned(lab, new, list(runs), steps[-1]),
    }


def _text(lab: Lab, trunk: Trunk) -> StageText:
    return StageText(trunk=trunk, text=lab.data.other_domain, instructions=False)


def _curves(lab: Lab, runs: list[Stage]) -> list[list[dict[str, float]]]:
    """The training loss over steps, by seed."""
    return [curve(logged(lab, run, "loss")) for run in runs]


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
    for start, side in ((LAST, 0), (MERGE, 1)):
        told[start] = [{"loss": p[side].loss.value, "cloze": p[side].cloze_accuracy} for p in both]
    if ((name, LAST), step, 0) in old:
        both = pairs(old)
        told["gain"]["old_loss"] = seeds.loss_gain(both).to_json()
        for start, side in ((LAST, 0), (MERGE, 1)):
            told[start] = [
                {**mine, "old_loss": p[side].loss.value} for mine, p in zip(told[start], both, strict=True)
            ]
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


def _cases(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for size in results["sizes"]:
        for schedule in size["schedules"]:
            yield size, schedule


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    moments_ = results["moments"]
    first, end = moments_[1], moments_[-1]
    gains = [_by_step(schedule) for _, schedule in _cases(results)]
    at_first, at_end = [gain[first] for gain in gains], [gain[end] for gain in gains]
    several = [size for size in results["sizes"] if len(size["schedules"]) > 1]
    findings = [
        Finding(
            claim=f"from the merge the held-out loss is lower at first ({first} steps), by each schedule",
            verdict=most([_sign(gain["loss"]) for gain in at_first]),
            evidence=f"By {_range(at_first, 'loss')}.",
        ),
        Finding(
            claim="and the score is higher at first (cloze on the new domain)",
            verdict=most([_sign(gain["cloze"]) for gain in at_first]),
            evidence=f"By {_range(at_first, 'cloze')}.",
        ),
        Finding(
            claim=f"at the end the two are equal (within {PARITY} nats a token), by each schedule",
            verdict=most([equal_verdict(g["loss"]["low"], g["loss"]["high"], PARITY) for g in at_end]),
            evidence=f"After {end} steps the merge is ahead by {_range(at_end, 'loss')}.",
        ),
        Finding(
            claim="the rate need not be tuned again: what is best from last is best from the merge",
            verdict=most([_same_schedule(size["retuned"]) for size in several]),
            evidence=" ".join(_best(size) for size in several),
        ),
    ]
    return Told(
        set_up=_set_up(results),
        tables=[_table(results)],
        findings=findings,
        more="several seeds (`--seeds 3`), and a stage that is longer beside the trunk.",
    )


def _by_step(schedule: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {point["step"]: point["gain"] for point in schedule["points"]}


def _sign(gain: dict[str, Any]) -> Verdict:
    return sign_verdict(gain["low"], gain["high"])


def _range(gains: list[dict[str, Any]], name: str) -> str:
    """The smallest and the largest of them, with their intervals."""
    ordered = sorted((gain[name] for gain in gains), key=lambda gain: float(gain["value"]))
    return f"{shown(ordered[0])} at the least, {shown(ordered[-1])} at the most"


def _same_schedule(retuned: dict[str, Any]) -> Verdict:
    if retuned["best"][LAST] == retuned["best"][MERGE]:
        return Verdict.AGREES
    gain = retuned["gain"]
    return Verdict.DISAGREES if (gain["low"] or 0.0) > 0 else Verdict.CANNOT_TELL


def _best(size: dict[str, Any]) -> str:
    best, gain = size["retuned"]["best"], size["retuned"]["gain"]
    if best[LAST] == best[MERGE]:
        return f"{size['size']}: “{best[LAST]}” for both."
    its_own = f"“{best[MERGE]}” from the merge, which gains {shown(gain)} by it"
    return f"{size['size']}: “{best[LAST]}” from last, {its_own}."


def _set_up(results: dict[str, Any]) -> str:
    last, every, at = results["window"]
    tokens = results["steps"] * results["tokens_a_step"] / 1e3
    return (
        f"Trunks of {at:,} steps at constant rate, then {results['steps']} steps ({tokens:.0f}K tokens) on "
        "a domain that they have not seen (textbooks of mathematics; without `--data`, Python's "
        f"documentation), from the last checkpoint and from the mean of the last {last}, {every} steps "
        "apart: a fresh optimizer, the same data in the same order, three schedules: the trunk's tuned "
        "rate, constant; cosine from it to a tenth; cosine from a third of it to a thirtieth (of the mixture "
        "the second alone). Gains are held-out loss on the new domain from last less that from the merge, "
        "nats a token, positive where the merge is better; 95% intervals over documents and seeds."
    )


def _table(results: dict[str, Any]) -> Table:
    moments_ = results["moments"]
    shown_steps = [moments_[0], moments_[1], moments_[len(moments_) // 2], moments_[-1]]
    rows = []
    for size, schedule in _cases(results):
        by_step = _by_step(schedule)
        end = schedule["points"][-1]
        losses = " / ".join(f"{charts.mean_of(end[start], 'loss'):.3f}" for start in STARTS)
        forgotten = " / ".join(_rise(schedule, start) for start in STARTS)
        gains = [shown(by_step[step]["loss"]) for step in shown_steps]
        rates = f"{schedule['peak']:.2g} → {schedule['final']:.2g}"
        rows.append([size["size"], rates, *gains, losses, forgotten])
    return Table(
        columns=[
            *("model", "rate"),
            *(f"gain, step {step}" for step in shown_steps),
            *("loss at the end, last / merge", "rise of the old domain's loss"),
        ],
        rows=rows,
    )


def _rise(schedule: dict[str, Any], start: str) -> str:
    """Of the loss on the old domain, over the stage."""
    before, after = (charts.mean_of(schedule["points"][i][start], "old_loss") for i in (0, -1))
    return f"{after - before:+.3f}"


def draw(results: dict[str, Any]) -> Any:
    """A column for each schedule, as in the paper; rows: training loss, held-out loss and cloze of the new
    domain over the stage's tokens.
    """
    points = []
    for size, schedule in _cases(results):
        for start, model in ((LAST, "raw"), (MERGE, "merged")):
            common = {"panel": f"{size['size']}, {schedule['name']}", "model": model}
            rows = [
                ("training loss", entry["step"], entry["value"])
                for curve_ in schedule["training"][start]
                for entry in curve_
            ]
            for metric, title in (("loss", "held-out loss"), ("cloze", "cloze accuracy")):
                for point in schedule["points"]:
                    rows += [(title, point["step"], value[metric]) for value in point[start]]
            points += [
                {**common, "metric": title, "x": step * results["tokens_a_step"], "y": value}
                for title, step, value in rows
            ]
    return charts.panels(
        points, x="tokens of the new domain, from the raw checkpoint or the merge", models=("raw", "merged")
    )
