"""Figure 4: schemes, at early, middle and late stages."""

from __future__ import annotations

from typing import Any

from pma.studies import charts
from pma.studies.cases import MARGIN, Case, loss_characters, measured
from pma.studies.lab import Lab
from pma.studies.making import Trunk
from pma.studies.measuring import Measured
from pma.studies.presets import Preset
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, most, share_verdict, sign_verdict
from pma.studies.tuning import trunks

VERSION = 1
RAW, SMA, WMA, EMA_SLOW, EMA_FAST = "raw", "sma", "wma", "ema:0.1", "ema:0.2"
SCHEMES = (SMA, WMA, EMA_SLOW, EMA_FAST, "ema-normalized:0.1", "ema-normalized:0.2", "1-sqrt", "cosine")
OF_THE_PAPER = (SMA, WMA, EMA_SLOW, EMA_FAST)
SCORED = (RAW, SMA, WMA)
STAGES = ("early", "middle", "late")


def run(lab: Lab) -> dict[str, Any]:
    """All schemes over the usual window at three stages of the middle sizes."""
    preset = lab.preset
    runs = {name: list(trunks(lab, preset.size(name)).values()) for name in preset.middle}
    wanted = {(name, at): _models(runs[name], at, preset) for name in runs for at in preset.stages}
    cases = measured(lab, wanted)
    ends = (preset.stages[0], preset.stages[-1])
    few = {key: {name: models[name] for name in SCORED} for key, models in wanted.items() if key[1] in ends}
    scored = measured(lab, few, scored=True)
    return {
        "loss_characters": loss_characters(preset),
        "last": preset.last,
        "every_steps": preset.every_steps,
        "tokens_a_step": preset.sizes[0].recipe.tokens_a_step,
        "stages": [
            {"size": name, "stage": stage, "step": at, **_of_stage(cases[name, at])}
            for name in runs
            for stage, at in zip(STAGES, preset.stages, strict=True)
        ],
        "scores": [{"size": name, "step": at, **_scored(case)} for (name, at), case in scored.items()],
    }


def _models(runs: list[Trunk], at: int, preset: Preset) -> dict[str, list[Measured]]:
    merges = {
        scheme: [
            Measured(run=run, at=at, last=preset.last, every=preset.every_steps, scheme=scheme)
            for run in runs
        ]
        for scheme in SCHEMES
    }
    return {RAW: [Measured(run=run, at=at) for run in runs], **merges}


def _of_stage(case: Case) -> dict[str, Any]:
    others = [name for name in SCHEMES if name != SMA]
    return {
        "values": {name: case.values(name) for name in case.readings},
        "gain": {name: case.gain(RAW, name) for name in SCHEMES},
        "over_sma": {name: case.gain(SMA, name) for name in others},
        "share_over_sma": {name: case.share((SMA, name), (RAW, SMA)) for name in others},
        "wma_over": {name: case.gain(name, WMA) for name in OF_THE_PAPER if name != WMA},
        "fast_over_slow": case.gain(EMA_SLOW, EMA_FAST),
    }


def _scored(case: Case) -> dict[str, Any]:
    return {
        "values": {name: case.values(name) for name in SCORED},
        "gain": {name: case.gains(RAW, name) for name in SCORED if name != RAW},
        "wma_over_sma": case.gains(SMA, WMA),
    }


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    early, late = ([s for s in results["stages"] if s["stage"] == at] for at in (STAGES[0], STAGES[-1]))
    return Told(
        set_up=f"The last {results['last']} checkpoints, {results['every_steps']} steps apart, at constant "
        "rate, weighted by each scheme, at three stages; `ema` is eq. 4, `ema-normalized` the other form the "
        "paper prints, divided by its sum. Gains in loss over the raw checkpoint, nats a token, on the first "
        f"{results['loss_characters']:,} characters of each held-out document; 95% intervals over seeds and "
        "documents.",
        tables=[_table(results), _scores(results)],
        findings=[
            _above_raw(early),
            _wma_best(early),
            _one(early, "fast_over_slow", f"early, {EMA_FAST} is better than {EMA_SLOW}"),
            _vanish(late),
        ],
        more="more seeds, and windows over which the weights change more.",
    )


def _table(results: dict[str, Any]) -> Table:
    rows = [[name, *(shown(stage["gain"][name], 4) for stage in results["stages"])] for name in SCHEMES]
    columns = ["scheme", *(f"{stage['size']}, step {stage['step']:,}" for stage in results["stages"])]
    return Table(columns=columns, rows=rows)


def _scores(results: dict[str, Any]) -> Table:
    scores = results["scores"]
    rows = [
        [f"{metric}, {name}", *(shown(stage["gain"][name][metric]) for stage in scores)]
        for metric in scores[0]["wma_over_sma"]
        for name in SCORED
        if name != RAW
    ]
    columns = ["gain in score", *(f"{stage['size']}, step {stage['step']:,}" for stage in scores)]
    return Table(columns=columns, rows=rows)


def _above_raw(early: list[dict[str, Any]]) -> Finding:
    gains = [(stage["size"], name, stage["gain"][name]) for stage in early for name in OF_THE_PAPER]
    size, name, least = min(gains, key=lambda each: float(each[2]["value"]))
    return Finding(
        claim="early, the paper's four schemes are above the raw model",
        verdict=most([sign_verdict(gain["low"], gain["high"]) for _, _, gain in gains]),
        evidence=f"The least gain is that of {name}, {size}: {shown(least)}.",
    )


def _wma_best(early: list[dict[str, Any]]) -> Finding:
    gains = [(stage["size"], other, gain) for stage in early for other, gain in stage["wma_over"].items()]
    told = "; ".join(f"{size}, over {other} {shown(gain, 4)}" for size, other, gain in gains)
    return Finding(
        claim="early, WMA is the best of them",
        verdict=most([sign_verdict(gain["low"], gain["high"]) for _, _, gain in gains]),
        evidence=f"It gains: {told}.",
    )


def _one(stages: list[dict[str, Any]], key: str, claim: str) -> Finding:
    told = "; ".join(f"{stage['size']} {shown(stage[key], 4)}" for stage in stages)
    verdicts = [sign_verdict(stage[key]["low"], stage[key]["high"]) for stage in stages]
    return Finding(claim=claim, verdict=most(verdicts), evidence=f"By {told}.")


def _vanish(late: list[dict[str, Any]]) -> Finding:
    """Of the paper's other schemes, against sma."""
    verdicts, told = [], []
    for stage in late:
        for name in OF_THE_PAPER[1:]:
            verdicts.append(share_verdict(stage["share_over_sma"][name], MARGIN))
            told.append(f"{stage['size']}, {name} {shown(stage['over_sma'][name], 4)}")
    return Finding(
        claim=f"late, the differences vanish (each within {MARGIN:.0%} of SMA's gain from SMA)",
        verdict=most(verdicts),
        evidence=f"Gain over SMA: {'; '.join(told)}.",
    )


def draw(results: dict[str, Any]) -> Any:
    """A panel a size: gain over raw by stage, a bar a scheme, as in the paper."""
    rows = [
        {
            "panel": stage["size"],
            "metric": "schemes",
            "group": charts.stage_name(stage, results["tokens_a_step"]),
            "model": name,
            **stage["gain"][name],
        }
        for stage in results["stages"]
        for name in SCHEMES
    ]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    return charts.bars(rows, y="loss below raw (nats a token)", groups=groups, models=SCHEMES)
