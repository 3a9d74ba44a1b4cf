"""Beyond the paper: merging the checkpoints along fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pma.studies import charts, seeds
from pma.studies.fine_tuning import chosen
from pma.studies.lab import HELD_OUT, VALIDATION, Lab
from pma.studies.measuring import Measured, Reading
from pma.studies.seeds import shown
from pma.studies.stages import LAST, Schedule, Stage
from pma.studies.telling import Finding, Table, Told, sign_verdict

VERSION = 1
RAW = (1, 0)  # the window of one checkpoint


def run(lab: Lab) -> dict[str, Any]:
    """Merges of several windows along two of the fine-tuning runs from last: cosine and constant rate."""
    tuning = chosen(lab)
    shapes = (("constant", tuning.steady), ("cosine", tuning.best))
    measured = {name: _measured(lab, tuning.of(schedule, LAST)) for name, schedule in shapes}
    ends = _ends(lab)
    both = [
        (measured["cosine"][HELD_OUT, ends[-1], RAW][i].text, best.text)
        for i, best in enumerate(
            measured["constant"][HELD_OUT, ends[-1], _selected(lab, measured["constant"], ends[-1])]
        )
    ]
    return {
        "size": tuning.size,
        "steps": lab.preset.stage_steps,
        "rows_a_step": tuning.of(tuning.best, LAST)[0].trunk.recipe.run.batch_sequences,
        "trajectories": [_told(lab, name, schedule, measured[name]) for name, schedule in shapes],
        "instead_of_decay": seeds.loss_gain(both).to_json(),
    }


Window = tuple[int, int]  # how many, how many steps apart
Measures = dict[tuple[str, int, Window], list[Reading]]


def _ends(lab: Lab) -> list[int]:
    """The middle, three quarters and the end, as far as there is something to merge."""
    every, steps = lab.preset.every_steps, lab.preset.stage_steps
    wanted = sorted({steps * share // 4 // every * every for share in (2, 3, 4)})
    return [end for end in wanted if _windows(lab, end)]


def _windows(lab: Lab, end: int) -> list[Window]:
    """Those that lie within the run, and behind its warmup."""
    every, warmup = lab.preset.every_steps, lab.preset.stage_steps // 20
    return [
        (last, apart)
        for last in sorted({2, 3, 6, lab.preset.last})
        for apart in (every, 2 * every)
        if end - (last - 1) * apart >= max(warmup, every)
    ]


def _measured(lab: Lab, runs: Sequence[Stage]) -> Measures:
    """Each window and the raw model at each end, by seed, on validation and on held-out responses."""
    keys = [(end, window) for end in _ends(lab) for window in (RAW, *_windows(lab, end))]
    models = [
        Measured(run=each, at=end, last=last, every=max(apart, 1))
        for end, (last, apart) in keys
        for each in runs
    ]
    found: Measures = {}
    for where in (VALIDATION, HELD_OUT):
        readings = lab.measure(models, where=where)
        for i, (end, window) in enumerate(keys):
            found[where, end, window] = readings[i * len(runs) : (i + 1) * len(runs)]
    return found


def _selected(lab: Lab, measured: Measures, end: int) -> Window:
    """The window that is best on validation responses, on the mean over seeds."""

    def loss(window: Window) -> float:
        return sum(reading.text.loss.value for reading in measured[VALIDATION, end, window])

    return min(_windows(lab, end), key=loss)


def _told(lab: Lab, name: str, schedule: Schedule, measured: Measures) -> dict[str, Any]:
    ends = []
    for end in _ends(lab):
        selected = _selected(lab, measured, end)
        raw = measured[HELD_OUT, end, RAW]
        windows = [
            {
                "last": window[0],
                "every": window[1],
                "selected": window == selected,
                "validation": _losses(measured[VALIDATION, end, window]),
                "held_out": _losses(measured[HELD_OUT, end, window]),
                "gain": _gain(raw, measured[HELD_OUT, end, window]),
            }
            for window in _windows(lab, end)
        ]
        ends.append({"step": end, "raw": _losses(raw), "windows": windows})
    return {"name": name, "schedule": schedule.to_json(), "ends": ends}


def _losses(readings: Sequence[Reading]) -> list[float]:
    return [reading.text.loss.value for reading in readings]


def _gain(raw: Sequence[Reading], merged: Sequence[Reading]) -> dict[str, Any]:
    return seeds.loss_gain([(a.text, b.text) for a, b in zip(raw, merged, strict=True)]).to_json()


def _best(end: dict[str, Any]) -> dict[str, Any]:
    return next(window for window in end["windows"] if window["selected"])


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    findings = []
    for trajectory in results["trajectories"]:
        gain = _best(trajectory["ends"][-1])["gain"]
        findings.append(
            Finding(
                claim=f"merging along fine-tuning lowers the held-out response loss at its end "
                f"({trajectory['name']} rate)",
                verdict=sign_verdict(gain["low"], gain["high"]),
                evidence=f"By {shown(gain, 4)} nats a token.",
            )
        )
    instead = results["instead_of_decay"]
    findings.append(
        Finding(
            claim="a merge at constant rate is better than a raw model whose rate has decayed",
            verdict=sign_verdict(instead["low"], instead["high"]),
            evidence=f"By {shown(instead, 4)} nats a token, at the same number of rows.",
        )
    )
    return Told(
        set_up=_set_up(results),
        tables=[_table(results)],
        findings=findings,
        more="post-training as it is done: reinforcement learning, preferences, larger models, scores of "
        "generated answers.",
    )  # fmt: skip


def _set_up(results: dict[str, Any]) -> str:
    peaks = {t["name"]: t["schedule"]["peak"] for t in results["trajectories"]}
    return (
        f"{results['size']}, fine-tuned from the last checkpoint of its trunk as in `table1`, "
        f"{results['steps']} steps of {results['rows_a_step']} rows, at constant rate "
        f"{peaks['constant']:.2g} or by cosine from it to a tenth. At three points the mean of several of "
        "the newest checkpoints against the newest alone. Of the windows tried, the best on validation "
        "responses is reported on held-out ones. Gains are nats a token, positive where the merge is better; "
        "95% intervals over rows and seeds."
    )


def _table(results: dict[str, Any]) -> Table:
    rows = []
    for trajectory in results["trajectories"]:
        for end in trajectory["ends"]:
            best = _best(end)
            gains = [window["gain"]["value"] for window in end["windows"]]
            rows.append(
                [
                    trajectory["name"],
                    f"{end['step']}",
                    f"{sum(end['raw']) / len(end['raw']):.4f}",
                    f"{best['last']} × {best['every']} steps",
                    shown(best["gain"], 4),
                    f"{min(gains):+.4f} to {max(gains):+.4f}".replace("-", "−"),
                ]
            )
    columns = ["rate", "step", "raw loss", "selected window", "its gain", "gains of all windows"]
    return Table(columns=columns, rows=rows)


def draw(results: dict[str, Any]) -> Any:
    """Held-out response loss along fine-tuning: raw, and the merges of each number of checkpoints at their
    best distance.
    """
    points = []
    for trajectory in results["trajectories"]:
        place = {"panel": f"{trajectory['name']} rate", "metric": "held-out response loss"}
        for end in trajectory["ends"]:
            lines = {"raw": end["raw"], "merged": _best(end)["held_out"]}
            for model, losses in lines.items():
                points += [{**place, "x": end["step"], "y": loss, "model": model} for loss in losses]
    return charts.panels(points, x="steps of fine-tuning", models=("raw", "merged"))
