"""Snapshots, or means over intervals: N checkpoints sample a window of training, means that the trainer kept
cover every step of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pma.engine.means import INTERVAL_MEANS
from pma.studies import charts, seeds
from pma.studies.lab import Lab
from pma.studies.making import Trunk
from pma.studies.measuring import Measured, Reading
from pma.studies.presets import Preset
from pma.studies.telling import Finding, Table, Told, most, sign_verdict
from pma.studies.tuning import trunks

VERSION = 1
COUNTS = (2, 4, 5, 10, 20)
AS_GOOD = 0.005  # nats a token within which two losses are as good as each other
EXACT, LAST = "every step", "last"


@dataclass(frozen=True, kw_only=True)
class Window:
    """The steps up to `at`, `steps` of them; a checkpoint lies each `every` steps."""

    at: int
    steps: int
    every: int

    @property
    def counts(self) -> tuple[int, ...]:
        """How many snapshots, evenly spaced, there are of it."""
        stored = self.steps // self.every
        return tuple(sorted(n for n in {*COUNTS, stored} if 1 < n <= stored and stored % n == 0))

    def models(self, run: Trunk) -> dict[str, Measured]:
        """The last checkpoint, the mean over every step, N snapshots at the ends of N equal parts; and two in
        the middles of halves, where checkpoints lie there.
        """
        stored = self.steps // self.every
        exact = Measured(run=run, at=self.at, last=stored, every=self.every, use=INTERVAL_MEANS)
        made = {LAST: Measured(run=run, at=self.at), EXACT: exact}
        for count in self.counts:
            apart = self.steps // count
            made[f"ends {count}"] = Measured(run=run, at=self.at, last=count, every=apart)
            if count == 2 and apart % (2 * self.every) == 0:
                middle = self.at - apart // 2
                made[f"middles {count}"] = Measured(run=run, at=middle, last=count, every=apart)
        return made


def windows(preset: Preset, warmup_steps: int) -> list[Window]:
    """Two lengths at each stage of training; those that would reach into the warmup are left out."""
    found = [
        Window(at=at, steps=times * preset.last * preset.every_steps, every=preset.every_steps)
        for at in preset.stages
        for times in (2, 1)
    ]
    return [window for window in found if window.at - window.steps >= warmup_steps]


def run(lab: Lab) -> dict[str, Any]:
    """Each middle size: snapshots and interval means of the same windows."""
    cases = [
        (name, window, [window.models(run) for run in trunks(lab, lab.preset.size(name)).values()])
        for name in lab.preset.middle
        for window in windows(lab.preset, lab.preset.size(name).recipe.optimizer.warmup_steps)
    ]
    wanted = [model for _, _, by_seed in cases for models in by_seed for model in models.values()]
    readings = iter(lab.measure(wanted, cloze=0))
    rows = []
    for name, window, by_seed in cases:
        read = [{key: next(readings) for key in models} for models in by_seed]
        rows.append({"size": name, "at": window.at, "window_steps": window.steps, **_compared(read)})
    a_step = lab.preset.size(lab.preset.middle[0]).recipe.tokens_a_step
    return {"every_steps": lab.preset.every_steps, "tokens_a_step": a_step, "rows": rows}


def _compared(by_seed: list[dict[str, Reading]]) -> dict[str, Any]:
    """Losses by model and seed; what each gains over the last checkpoint, and how far it is above the mean
    over every step.
    """
    models = {}
    for name in by_seed[0]:
        texts = [(readings[LAST].text, readings[name].text, readings[EXACT].text) for readings in by_seed]
        models[name] = {
            "loss": [mine.loss.value for _, mine, _ in texts],
            "gain": seeds.loss_gain([(last, mine) for last, mine, _ in texts]).to_json(),
            "above_exact": seeds.loss_gain([(mine, exact) for _, mine, exact in texts]).to_json(),
        }
    return {"models": models}


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    every = results["every_steps"]
    return Told(
        set_up=(
            "Runs at the tuned constant rate that store a checkpoint, and the mean of the weights over every "
            f"step since the one before, each {every} steps. The mean of all stored means of a window is the "
            "average over every step of it, and would be the same of two means as of twenty (tests check "
            "that). Against it stand plain averages of N snapshots, at the ends of N equal parts of the "
            "window, as a trainer that stores only those would have them. Held-out loss in nats a token; 95% "
            "intervals over seeds and documents."
        ),
        tables=[_table(results)],
        findings=[_most_snapshots(results), _two(results), _ten(results)],
        more="wider windows at higher rates, where weights wander further between checkpoints.",
        notes=_middles(results),
    )


def _rows(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each window with its name."""
    return [
        (f"{row['size']} at {row['at']:,}, {row['window_steps']} steps", row["models"])
        for row in results["rows"]
    ]


def _most(models: dict[str, Any]) -> int:
    return max(int(name.split()[1]) for name in models if name.startswith("ends"))


def _most_snapshots(results: dict[str, Any]) -> Finding:
    """Whether the mean over every step is at least as good as all the snapshots that there are."""
    cases = [models[f"ends {_most(models)}"]["above_exact"] for _, models in _rows(results)]
    values = [case["value"] for case in cases]
    return Finding(
        claim=f"few stored means are as good as many snapshots of the window (within {AS_GOOD:g} nats)",
        verdict=most([sign_verdict(case["low"] + AS_GOOD, case["high"] + AS_GOOD) for case in cases]),
        evidence=f"The most snapshots are {_range(values)} above the mean over every step.",
    )


def _two(results: dict[str, Any]) -> Finding:
    cases = [models["ends 2"]["above_exact"] for _, models in _rows(results) if "ends 2" in models]
    return Finding(
        claim="two stored means are better than two snapshots",
        verdict=most([sign_verdict(case["low"], case["high"]) for case in cases]),
        evidence=f"Two snapshots are {_range([case['value'] for case in cases])} above it.",
    )


def _ten(results: dict[str, Any]) -> Finding:
    """Whether ten snapshots do too; and from how many on they do, by window."""
    cases = [models["ends 10"]["above_exact"] for _, models in _rows(results) if "ends 10" in models]
    fewest = {name: enough(models) for name, models in _rows(results)}
    counts = sorted({count for count in fewest.values() if count is not None})
    lacking = [name for name, count in fewest.items() if count is None]
    evidence = f"Snapshots surely are from N = {', '.join(map(str, counts)) or 'none'} on, by window."
    if lacking:
        evidence += f" At no N: {'; '.join(lacking)}."
    bounds = [(case["low"] - AS_GOOD, case["high"] - AS_GOOD) for case in cases]
    return Finding(
        claim=f"ten snapshots are as good as the mean over every step (within {AS_GOOD:g} nats)",
        verdict=most([sign_verdict(low, high, claimed_positive=False) for low, high in bounds]),
        evidence=evidence,
    )


def enough(models: dict[str, Any]) -> int | None:
    """The least N from which on snapshots are within `AS_GOOD` above the mean over every step, surely."""
    counts = sorted((int(name.split()[1]) for name in models if name.startswith("ends")), reverse=True)
    found = None
    for count in counts:
        if models[f"ends {count}"]["above_exact"]["high"] > AS_GOOD:
            break
        found = count
    return found


def _range(values: list[float]) -> str:
    low, high = (f"{value:+.4f}".replace("-", "−") for value in (min(values), max(values)))
    return f"{low} to {high} nats"


def _table(results: dict[str, Any]) -> Table:
    counts = sorted(
        {int(name.split()[1]) for row in results["rows"] for name in row["models"] if name.startswith("ends")}
    )
    rows = [
        [
            row["size"],
            f"{row['at']:,}",
            str(row["window_steps"]),
            _cell(row["models"][EXACT]["gain"]),
            *(_cell(row["models"].get(f"ends {n}", {}).get("above_exact")) for n in counts),
        ]
        for row in results["rows"]
    ]
    return Table(
        title="What the mean over every step gains over the last checkpoint, and how far N snapshots are "
        "above it in loss:",
        columns=["size", "up to step", "window", "gain", *(f"N = {n}" for n in counts)],
        rows=rows,
    )


def _cell(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return ""
    reach = (interval["high"] - interval["low"]) / 2
    return f"{interval['value']:+.4f} ± {reach:.4f}".replace("-", "−")


def _middles(results: dict[str, Any]) -> list[str]:
    """Snapshots at the ends of their parts are of later steps; what that is worth."""
    widest = max(row["window_steps"] for row in results["rows"])
    told = [
        "Snapshots lie at the ends of their parts, so their mean is of later steps than the mean over every "
        f"step: by half a part, {widest // 4} of {widest} steps with N = 2. Where training still moves, that "
        "favours them."
    ]
    pairs = [
        (name, models["ends 2"]["above_exact"], models["middles 2"]["above_exact"])
        for name, models in _rows(results)
        if "middles 2" in models
    ]
    if pairs:
        listed = "; ".join(
            f"{name} {_cell(ends)} at ends, {_cell(middles)} at middles" for name, ends, middles in pairs
        )
        told.append(
            f"Two snapshots in the middles of their parts instead, above the mean over every step: {listed}."
        )
    return told


def draw(results: dict[str, Any]) -> Any:
    """By size and stage: the gain over the last checkpoint, over N; a level line for every step."""
    points = []
    for row in results["rows"]:
        length, models = row["window_steps"], row["models"]
        at = {"panel": f"up to step {row['at']:,}", "metric": f"{row['size']}: nats below the last"}
        counts = [int(name.split()[1]) for name in models if name.startswith("ends")]
        for count in counts:
            for y in models[f"ends {count}"]["gain"]["by_seed"]:
                points.append({**at, "x": count, "y": y, "model": f"snapshots of {length} steps"})
        for x in (min(counts), max(counts)):
            for y in models[EXACT]["gain"]["by_seed"]:
                points.append({**at, "x": x, "y": y, "model": f"every step of {length}"})
    return charts.panels(points, x="N snapshots")
