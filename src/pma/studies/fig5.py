"""Figure 5: how far apart checkpoints are (V), and how many (N)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pma.studies import charts
from pma.studies.cases import MARGIN, Case, loss_characters, measured
from pma.studies.lab import VALIDATION, Lab
from pma.studies.making import Trunk
from pma.studies.measuring import Measured
from pma.studies.presets import Preset
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, Verdict, most, share_verdict, sign_verdict
from pma.studies.tuning import trunks

VERSION = 1
INTERVALS = (1, 2, 4, 8)  # V, in checkpoints
NUMBERS = (3, 6, 10, 15)  # N
NUMBERS_AT = 2  # how many of the smallest V the numbers are varied at
RAW = "raw"
STAGES = ("early", "middle", "late")


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """A window: N checkpoints, V steps apart."""

    every: int
    last: int

    @property
    def name(self) -> str:
        """As results have it."""
        return f"N={self.last} V={self.every}"

    def exists(self, at: int, preset: Preset) -> bool:
        """Whether all its checkpoints up to step `at` are there and after the warmup."""
        warmup_steps = preset.sizes[0].recipe.optimizer.warmup_steps
        return at - self.every * (self.last - 1) >= max(warmup_steps, preset.every_steps)


def ablations(preset: Preset) -> dict[str, list[Shape]]:
    """What is varied, smallest first: V at the usual N; N at the smallest V."""
    every = preset.every_steps
    of_v = [Shape(every=every * times, last=preset.last) for times in INTERVALS]
    of_n = {
        f"N at V={every * times}": [Shape(every=every * times, last=last) for last in NUMBERS]
        for times in INTERVALS[:NUMBERS_AT]
    }
    return {f"V at N={preset.last}": of_v, **of_n}


def run(lab: Lab) -> dict[str, Any]:
    """All windows at three stages of the middle sizes, and which is best on validation text at the end."""
    preset = lab.preset
    runs = {name: list(trunks(lab, preset.size(name)).values()) for name in preset.middle}
    wanted = {(name, at): _models(runs[name], at, preset) for name in runs for at in preset.stages}
    cases = measured(lab, wanted)
    end = preset.stages[-1]
    validation = measured(lab, {name: wanted[name, end] for name in runs}, where=VALIDATION)
    usual = Shape(every=preset.every_steps, last=preset.last).name
    return {
        "loss_characters": loss_characters(preset),
        "tokens_a_step": preset.sizes[0].recipe.tokens_a_step,
        "ablations": {
            varied: [{"name": s.name, "every": s.every, "last": s.last} for s in shapes]
            for varied, shapes in ablations(preset).items()
        },
        "stages": [
            {"size": name, "stage": stage, "step": at, **_of_stage(cases[name, at], ablations(preset))}
            for name in runs
            for stage, at in zip(STAGES, preset.stages, strict=True)
        ],
        "best": [{"size": name, **_best(validation[name], cases[name, end], usual)} for name in runs],
    }


def _models(runs: list[Trunk], at: int, preset: Preset) -> dict[str, list[Measured]]:
    shapes = sorted({shape for varied in ablations(preset).values() for shape in varied})
    windows = {
        shape.name: [Measured(run=run, at=at, last=shape.last, every=shape.every) for run in runs]
        for shape in shapes
        if shape.exists(at, preset)
    }
    return {RAW: [Measured(run=run, at=at) for run in runs], **windows}


def _of_stage(case: Case, varied: dict[str, list[Shape]]) -> dict[str, Any]:
    """Gains over raw; and, in each ablation, over its smallest window, also as a share of that one's own
    gain.
    """
    over: dict[str, Any] = {}
    for name, shapes in varied.items():
        there = [shape.name for shape in shapes if shape.name in case.readings]
        over[name] = [
            {
                "window": other,
                "over": there[0],
                "gain": case.gain(there[0], other),
                "share": case.share((there[0], other), (RAW, there[0])),
            }
            for other in there[1:]
        ]
    return {
        "values": {name: case.values(name) for name in case.readings},
        "gain": {name: case.gain(RAW, name) for name in case.readings if name != RAW},
        "over_smallest": over,
    }


def _best(validation: Case, held_out: Case, usual: str) -> dict[str, Any]:
    """The window with the lowest mean loss on validation text, told on held-out text."""
    losses = {
        name: charts.mean_of(validation.values(name), "loss") for name in validation.readings if name != RAW
    }
    best = min(losses, key=lambda name: losses[name])
    return {
        "window": best,
        "validation_losses": losses,
        "gain": held_out.gain(RAW, best),
        "usual": usual,
        "over_usual": held_out.gain(usual, best),
    }


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    varied = results["ablations"]
    of_v, of_n = list(varied)[:2]
    early = [stage for stage in results["stages"] if stage["stage"] == STAGES[0]]
    late = [stage for stage in results["stages"] if stage["stage"] == STAGES[-1]]
    return Told(
        set_up=f"Plain averages of N checkpoints V steps apart, at constant rate, at three stages: {of_v}, "
        f"and {of_n} (in the figure at a larger V too). Windows that would reach into the warmup are left "
        "out. Gains in loss over the raw checkpoint, nats a token, on the first "
        f"{results['loss_characters']:,} characters of each held-out document; 95% intervals over seeds and "
        "documents.",
        tables=[_table(results, of_v), _table(results, of_n)],
        findings=[
            _large_interval(early, varied[of_v]),
            _more(early, of_n, claimed_better=False),
            _interval_hardly_matters(late, of_v),
            _more(late, of_n, claimed_better=True),
        ],
        notes=[_best_told(results)],
        more="runs in which ten checkpoints of the largest V are a small part of the stable phase.",
    )


def _table(results: dict[str, Any], varied: str) -> Table:
    shapes = results["ablations"][varied]
    rows = []
    for stage in results["stages"]:
        cells = [
            shown(stage["gain"][shape["name"]]) if shape["name"] in stage["gain"] else "no such window"
            for shape in shapes
        ]
        rows.append([stage["size"], f"{stage['step']:,}", *cells])
    key = "every" if varied.startswith("V") else "last"
    columns = ["size", "step", *(f"{varied[0]}={shape[key]}" for shape in shapes)]
    return Table(columns=columns, rows=rows, title=f"Gain over raw, {varied}:")


def _large_interval(early: list[dict[str, Any]], shapes: Sequence[dict[str, Any]]) -> Finding:
    """Of the largest V that there is, if it is not the smallest."""
    verdicts, told = [], []
    for stage in early:
        names = [shape["name"] for shape in shapes[1:] if shape["name"] in stage["gain"]]
        if not names:
            verdicts.append(Verdict.CANNOT_TELL)
            told.append(f"{stage['size']}: no larger window")
            continue
        gain = stage["gain"][names[-1]]
        verdicts.append(sign_verdict(gain["low"], gain["high"], claimed_positive=False))
        told.append(f"{stage['size']}, {names[-1]}: {shown(gain)}")
    return Finding(
        claim="early, a large V falls below the raw model",
        verdict=most(verdicts),
        evidence=f"Gain over raw of {'; '.join(told)}.",
    )


def _more(stages: list[dict[str, Any]], varied: str, *, claimed_better: bool) -> Finding:
    """The greatest N that there is against the least."""
    verdicts, told = [], []
    for stage in stages:
        others = stage["over_smallest"][varied]
        if not others:
            verdicts.append(Verdict.CANNOT_TELL)
            told.append(f"{stage['size']}: no larger window")
            continue
        gain = others[-1]["gain"]
        verdicts.append(sign_verdict(gain["low"], gain["high"], claimed_positive=claimed_better))
        told.append(f"{stage['size']}, {others[-1]['window']} over {others[-1]['over']}: {shown(gain)}")
    when, what = (STAGES[-1], "better") if claimed_better else (STAGES[0], "worse")
    evidence = f"Gain of {'; '.join(told)}."
    return Finding(claim=f"{when}, more checkpoints are {what}", verdict=most(verdicts), evidence=evidence)


def _interval_hardly_matters(late: list[dict[str, Any]], varied: str) -> Finding:
    verdicts, told = [], []
    for stage in late:
        for other in stage["over_smallest"][varied]:
            verdicts.append(share_verdict(other["share"], MARGIN))
            told.append(f"{stage['size']}, {other['window']}: {shown(other['gain'])}")
    return Finding(
        claim=f"late, V hardly matters (within {MARGIN:.0%} of the smallest V's gain)",
        verdict=most(verdicts),
        evidence=f"Gain over the smallest V: {'; '.join(told)}.",
    )


def _best_told(results: dict[str, Any]) -> str:
    each = "; ".join(
        f"{best['size']}: {best['window']}, on held-out text {shown(best['gain'])} over raw, "
        f"{shown(best['over_usual'])} over {best['usual']}"
        for best in results["best"]
    )
    return f"**Best window at the end**, chosen on validation text: {each}."


def draw(results: dict[str, Any]) -> Any:
    """A row an ablation, a column a size: gain over raw by stage, a bar a window, as in the paper."""
    rows, models = [], []
    for varied, shapes in results["ablations"].items():
        for shape in shapes:
            value = shape["every"] if varied.startswith("V") else shape["last"]
            models.append(f"{varied[0]}={value}")
            rows += [
                {
                    "panel": stage["size"],
                    "metric": varied,
                    "group": charts.stage_name(stage, results["tokens_a_step"]),
                    "model": models[-1],
                    **stage["gain"][shape["name"]],
                }
                for stage in results["stages"]
                if shape["name"] in stage["gain"]
            ]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    title = "loss below raw (nats a token)"
    return charts.bars(rows, y=title, groups=groups, models=list(dict.fromkeys(models)))
