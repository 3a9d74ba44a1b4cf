"""Table 1 and Figure 7, left: fine-tuning on prompts and responses, from the last checkpoint and from the
merge.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pma.studies import charts, seeds
from pma.studies.fine_tuning import FineTuning, chosen
from pma.studies.lab import HELD_OUT, Lab
from pma.studies.making import Trunk
from pma.studies.measuring import Measured, Reading
from pma.studies.seeds import shown
from pma.studies.stable_phase import compared
from pma.studies.stages import LAST, MERGE, begun, curve, logged
from pma.studies.telling import Finding, Table, Told, most, not_below_verdict, sign_verdict

VERSION = 1
MARGIN_NATS, MARGIN_SCORE = 0.01, 0.01  # what counts as no loss
BLOCKS = 12  # stretches of steps as the unit of chance
STARTS = (LAST, MERGE)


def run(lab: Lab) -> dict[str, Any]:
    """Stages on the rows, of the middle dense size, by each schedule from each start."""
    tuning = chosen(lab)
    trunk = next(iter(tuning.runs.values()))[0].trunk
    ends = {
        "before": {start: [begun(each) for each in tuning.of(tuning.schedules[0], start)] for start in STARTS}
    }
    for schedule in tuning.schedules:
        ends[schedule.name] = {
            start: [Measured(run=each, at=each.steps) for each in tuning.of(schedule, start)]
            for start in STARTS
        }
    return {
        "size": tuning.size,
        "rate": tuning.trunk_rate,
        "steps": lab.preset.stage_steps,
        "rows_a_step": trunk.recipe.run.batch_sequences,
        "window": [lab.preset.last, lab.preset.every_steps, lab.preset.steps],
        "tuning": list(tuning.rows),
        "schedules": [schedule.to_json() for schedule in tuning.schedules],
        "after": {name: _compared(lab, tuning, trunk, pair) for name, pair in ends.items()},
        "gradients": {schedule.name: _gradients(lab, tuning, schedule.name) for schedule in tuning.schedules},
    }


def _compared(
    lab: Lab, tuning: FineTuning, trunk: Trunk, models: dict[str, list[Measured]]
) -> dict[str, Any]:
    """Response loss, and what the trunk was measured on: text, cloze, tasks."""
    flat = [*models[LAST], *models[MERGE]]
    count = len(models[LAST])

    def pairs(readings: list[Reading]) -> list[tuple[Reading, Reading]]:
        return list(zip(readings[:count], readings[count:], strict=True))

    responses = pairs(lab.measure(flat, where=HELD_OUT, of=tuning.text))
    general = compared(pairs(lab.measure(flat, tasks=True, of=tuning.trunk_text)))
    gain = seeds.loss_gain([(last.text, merge.text) for last, merge in responses]).to_json()
    told: dict[str, Any] = {"gain": {"response loss": gain, **general["gain"]}}
    for side, (start, key) in enumerate(((LAST, "raw"), (MERGE, "merged"))):
        told[start] = [
            {"response loss": pair[side].text.loss.value, **values}
            for pair, values in zip(responses, general[key], strict=True)
        ]
    return told


def _gradients(lab: Lab, tuning: FineTuning, name: str) -> dict[str, Any]:
    """Gradient norms over the steps and on the mean, and how much calmer they are from the merge."""
    pairs = [
        (logged(lab, last, "grad_norm"), logged(lab, merge, "grad_norm"))
        for last, merge in zip(tuning.runs[name, LAST], tuning.runs[name, MERGE], strict=True)
    ]
    jumps = [(np.abs(np.diff(last)), np.abs(np.diff(merge))) for last, merge in pairs]
    block = max(1, len(pairs[0][0]) // BLOCKS)
    return {
        "gain": {
            "norm": seeds.series_gain(pairs, block).to_json(),
            "jump": seeds.series_gain(jumps, block).to_json(),
        },
        "mean": {start: [float(p[side].mean()) for p in pairs] for side, start in enumerate(STARTS)},
        "jump": {start: [float(j[side].mean()) for j in jumps] for side, start in enumerate(STARTS)},
        "curves": {start: [curve(p[side]) for p in pairs] for side, start in enumerate(STARTS)},
    }


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    names = [schedule["name"] for schedule in results["schedules"]]
    gains = [results["after"][name]["gain"] for name in names]
    tasks = [name for name in gains[0] if name not in ("response loss", "loss")]
    gradients = [results["gradients"][name] for name in names]
    findings = [
        Finding(
            claim=f"fine-tuning from the merge is never worse in {name} (by more than {margin} {unit})",
            verdict=most([not_below_verdict(g[name]["low"], g[name]["high"], margin) for g in gains]),
            evidence="By schedule: " + "; ".join(shown(gain[name]) for gain in gains) + ".",
        )
        for name, margin, unit in (
            ("response loss", MARGIN_NATS, "nats a token"),
            *((name, MARGIN_SCORE, "of 1") for name in tasks),
        )
    ]
    findings += [
        Finding(
            claim=f"the gradient norm is {what} from the merge",
            verdict=most([sign_verdict(g["gain"][key]["low"], g["gain"][key]["high"]) for g in gradients]),
            evidence=f"Lower by {'; '.join(_of(g, key, means) for g in gradients)}.",
        )
        for what, key, means in (
            ("lower on the mean", "norm", "mean"),
            ("steadier (by its change from step to step)", "jump", "jump"),
        )
    ]
    return Told(
        set_up=_set_up(results),
        tables=[_table(results, names, tasks), _tuning(results)],
        findings=findings,
        more="models that follow instructions at all, which takes hundreds of millions of parameters; here "
        "it is the loss on held-out responses that tells.",
    )


def _of(gradient: dict[str, Any], key: str, means: str) -> str:
    """A gain, and what it is a part of: the mean over seeds from last."""
    from_last = gradient[means][LAST]
    return f"{shown(gradient['gain'][key])} of {sum(from_last) / len(from_last):.3f}"


def _set_up(results: dict[str, Any]) -> str:
    last, every, at = results["window"]
    return (
        f"{results['size']} after {at:,} steps at constant rate {results['rate']:g}: the last checkpoint, or "
        f"the mean of the last {last}, {every} steps apart; fine-tuned for {results['steps']} steps of "
        f"{results['rows_a_step']} rows of prompt and response, loss on responses, the same rows in the same "
        "order; by cosine from three peak rates to a tenth, and constant at the one that was best from last "
        "on validation responses (last table). Gains are last less merge, positive where the merge is "
        "better; 95% intervals over rows, documents or items and over seeds, of gradient norms over "
        f"{BLOCKS} stretches of steps."
    )


def _table(results: dict[str, Any], names: list[str], tasks: list[str]) -> Table:
    rows = []
    for name in ("before", *names):
        after = results["after"][name]
        gain = after["gain"]
        losses = " / ".join(f"{charts.mean_of(after[start], 'response loss'):.4f}" for start in STARTS)
        rows.append([name, losses, *(shown(gain[each]) for each in ("response loss", "loss", *tasks))])
    columns = ["schedule", "response loss, last / merge", "gain in it", "gain in the trunk's text's loss"]
    return Table(columns=[*columns, *(f"gain in {name}" for name in tasks)], rows=rows)


def _tuning(results: dict[str, Any]) -> Table:
    rows = results["tuning"]
    best = min(row[LAST] for row in rows)
    cells = [f"**{row[LAST]:.4f}**" if row[LAST] == best else f"{row[LAST]:.4f}" for row in rows]
    return Table(
        columns=["start", *(f"{row['peak']:.2g}" for row in rows)],
        rows=[["last", *cells], ["merge", *(f"{row[MERGE]:.4f}" for row in rows)]],
        title="Validation loss on responses, by peak rate (first seed):",
    )


def draw(results: dict[str, Any]) -> Any:
    """Gradient norm over fine-tuning as in Fig. 7, left; a column for each schedule."""
    points = []
    for schedule in results["schedules"]:
        curves = results["gradients"][schedule["name"]]["curves"]
        for start, model in ((LAST, "raw"), (MERGE, "merged")):
            for series in curves[start]:
                points += [
                    {
                        "panel": schedule["name"],
                        "metric": "gradient norm",
                        "x": entry["step"],
                        "y": entry["value"],
                        "model": model,
                    }
                    for entry in series
                ]
    return charts.panels(points, x="steps of fine-tuning", models=("raw", "merged"))
