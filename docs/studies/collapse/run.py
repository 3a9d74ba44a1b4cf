"""A mixture of experts is driven into a collapse by an exceptionally high learning rate, and led past it.

    python docs/studies/collapse/run.py -o SCRATCH --seeds 10,11,12,13,14,15,16,17,18,19,20,21

For every seed a run until after its collapse, which `pma spikes` must find within 20 steps. Then training
goes on from the average of the 3 checkpoints before it (`pma init --before-step S --last 3`), and from the
newest of the three alone, each with the same data and with the data until after the collapse left out. Writes
result.json and result.png beside itself. What is in SCRATCH already is not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pma import logs, trajectory, verbs
from pma.evaluation import Document, read_documents
from pma.logs.breakaways import find
from pma.pretraining import Recipe, load_recipe, pretrain, resume, run_folder
from pma.trajectory import WayPast, Window
from pma.verbs import Candidate, Choice

HERE = Path(__file__).parent
FIRST_PIECE, PIECE, LONGEST = 255, 45, 435  # steps of the run: so many, and more until it collapses
LAST = 3
WITHIN = 20  # steps within which the collapse must be found
HELD = 50  # steps past the place of the collapse that a continuation must get
AFTER = 75  # steps past it that a continuation is trained
TAIL = 25  # last steps, whose mean training loss is compared
# the average of the three, the newest of them, the oldest of them
STARTS = ("merge", "rollback", "further rollback")
DATA = ("same data", "data skipped")
COLLAPSED = 1.0  # nats above the best mean of 20 steps so far
COMPARED = ("held_steps_past_the_collapse", "last_25_steps", "held_out")
CHARACTERS_A_DOCUMENT = 1_000


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """A run that collapsed: the first step whose loss is a nat above the best, which has nothing to do with
    the detector, and the way past that `pma spikes` tells.

    `limit`: the loss at which a continuation counts as collapsed too.
    """

    run: Path
    step: int
    limit: float
    way: WayPast
    first_alarm: dict[str, Any]

    def start_step(self, start: str) -> int:
        """The step at which a continuation begins."""
        return self.way.checkpoints[0 if start == "further rollback" else -1].step or 0


def trunk(recipe: Recipe, seed: int, scratch: Path) -> Path:
    """The run of a seed, in pieces until it has collapsed; text is prepared once for all."""
    asked = replace(recipe, run=replace(recipe.run, seed=seed, tokens=FIRST_PIECE * recipe.tokens_a_step))
    folder, first = scratch / f"trunk-{seed}", scratch / "trunk-0"
    if folder != first and first.is_dir():
        run_folder.enter(folder, run_folder.RunRecord(recipe=asked, text=()))
        run_folder.borrow_text(folder, first)
    for length in range(FIRST_PIECE, LONGEST + 1, PIECE):
        if not (folder / f"checkpoint-{length + PIECE}").is_dir():  # not when it is longer already
            pretrain(replace(asked, run=replace(asked.run, tokens=length * recipe.tokens_a_step)), folder)
        steps, losses = logs.read(folder).series("loss")
        learned, loss = best(steps, losses)
        step = first_worse(steps, losses, loss + COLLAPSED, after=learned)
        if step is not None and step + WITHIN <= steps[-1]:
            break
    return folder


def collapse_of(run: Path) -> Collapse | None:
    """Where the run lost what it had learned; None if it did not.

    Asserts that the detector tells it within 20 steps, from what had been logged by then.
    """
    steps, losses = logs.read(run).series("loss")
    learned, loss = best(steps, losses)
    limit = loss + COLLAPSED
    step = first_worse(steps, losses, limit, after=learned)
    if step is None:
        return None
    known = steps <= step + WITHIN
    found = [b for b in find(steps[known], losses[known], "loss") if b.last_step >= step]
    assert found, f"{run}: nothing was found within {WITHIN} steps of step {step}"
    ways = trajectory.spikes(run).ways_past
    way = next(w for w in ways if w.breakaway.first_step == found[0].first_step)
    assert len(way.checkpoints) == LAST, way.reserve
    told = way.breakaway
    alarm = {"first_step": told.first_step, "seen_step": told.seen_step, "kind": told.kind.value}
    return Collapse(run=run, step=step, limit=limit, way=way, first_alarm=alarm)


def best(steps: NDArray[np.int64], losses: NDArray[np.float64]) -> tuple[int, float]:
    """Where the lowest mean of 20 steps ends, and that mean; a run that collapses has it before."""
    means = np.convolve(losses, np.ones(20) / 20, mode="valid")
    lowest = int(np.nanargmin(means))
    return int(steps[lowest + 19]), float(means[lowest])


def first_worse(
    steps: NDArray[np.int64], losses: NDArray[np.float64], limit: float, *, after: int
) -> int | None:
    """The first step past `after` whose loss is `limit` or more, or no number."""
    worse = np.flatnonzero(~(losses < limit) & (steps > after))
    return int(steps[worse[0]]) if len(worse) else None


def go_on(collapse: Collapse, recipe: Recipe, start: str, data: str, scratch: Path) -> Path:
    """Train from one of `STARTS` until after the place of the collapse."""
    checkpoint = collapse.way.checkpoints[0 if start == "further rollback" else -1].path
    if start == "merge":
        merged = scratch / f"{collapse.run.name}-init"
        if not merged.is_dir():
            # checkpoints of the end of the warmup may be among them
            window = Choice(paths=(collapse.run,), window=Window(last=LAST), allow_mixed_phases=True)
            verbs.init(window, merged, before_step=collapse.way.before_step)
        checkpoint = merged
    out = scratch / f"{collapse.run.name}-{start}-{data}".replace(" ", "-")
    until = (collapse.step + AFTER) * recipe.tokens_a_step
    # past the collapse, so that nothing that was seen up to it is seen again
    skipped = collapse.step + WITHIN - collapse.start_step(start) if data == "data skipped" else 0
    if not out.is_dir() or run_folder.newest_checkpoint(out) is None:
        resume(checkpoint, out, tokens=until, skip_steps=skipped)
    return out


def outcome(collapse: Collapse, start: str, run: Path) -> dict[str, Any]:
    """What became of a continuation."""
    steps, losses = logs.read(run).series("loss")
    begun = collapse.start_step(start)
    mine = steps > begun
    worse = first_worse(steps[mine], losses[mine], collapse.limit, after=begun)
    return {
        "start_step": begun,
        "passed": worse is None or worse > collapse.step + HELD,
        "collapsed_at": worse,
        # at most to the end of the continuation; less than zero where it collapsed sooner than the run had
        "held_steps_past_the_collapse": int(steps[-1] if worse is None else worse) - collapse.step,
        "first_10_steps": float(losses[mine][:10].mean()),
        "last_25_steps": float(losses[-TAIL:].mean()),
        "losses": [round(float(v), 4) for v in losses[mine]],
    }


def held_out_losses(runs: dict[str, Path], documents: list[Document]) -> dict[str, float]:
    """Held-out loss of the last checkpoint of each."""
    candidates = [
        Candidate(name=name, choice=Choice(paths=(verbs.newest(path),))) for name, path in runs.items()
    ]
    return {e.name: e.loss.value for e in verbs.evaluate(candidates, documents, cloze=0)}


def one_seed(recipe: Recipe, seed: int, scratch: Path) -> dict[str, Any]:
    """The raw numbers of a seed."""
    run = trunk(recipe, seed, scratch)
    steps, losses = logs.read(run).series("loss")
    row: dict[str, Any] = {"seed": seed, "trunk": [round(float(v), 4) for v in losses]}
    collapse = collapse_of(run)
    if collapse is None:
        return {**row, "collapsed": False}
    pairs = [(start, data) for start in STARTS for data in DATA]
    runs = {f"{s}, {d}": go_on(collapse, recipe, s, d, scratch) for s, d in pairs}
    texts = read_documents([run / run_folder.TEXT_FOLDER / run_folder.HELD_OUT_FILE])
    documents = [Document(name=d.name, text=d.text[:CHARACTERS_A_DOCUMENT]) for d in texts]
    held_out = held_out_losses(runs | {"start": collapse.way.checkpoints[-1].path}, documents)
    newest = collapse.start_step("merge")
    before = losses[(steps > newest - TAIL) & (steps <= newest)]
    return {
        **row,
        "collapsed": True,
        "collapse_step": collapse.step,
        "limit": collapse.limit,
        "found": collapse.first_alarm,
        "checkpoints": [point.step for point in collapse.way.checkpoints],
        "loss_before": float(before.mean()),
        "held_out_before": held_out.pop("start"),
        "arms": {
            name: {**outcome(collapse, start, run), "held_out": held_out[name]}
            for (name, run), (start, _) in zip(runs.items(), pairs, strict=True)
        },
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often each passed; merge less rollback, paired by seed, with 95% intervals (Student's t)."""
    mine = [row for row in rows if row["collapsed"]]
    told: dict[str, Any] = {"seeds": len(rows), "collapsed": len(mine)}
    for data in DATA:
        arms = {s: [row["arms"][f"{s}, {data}"] for row in mine] for s in STARTS}
        told[data] = {"passed": {s: sum(arm["passed"] for arm in arms[s]) for s in STARTS}}
        for other in STARTS[1:]:
            both = list(zip(arms["merge"], arms[other], strict=True))
            only_merge = sum(a["passed"] and not b["passed"] for a, b in both)
            only_other = sum(b["passed"] and not a["passed"] for a, b in both)
            unlike = only_merge + only_other
            told[data][f"merge less {other}"] = {
                "passed_by_merge_only": only_merge,
                "passed_by_other_only": only_other,
                # the sign test on the seeds in which they differ
                "p": float(stats.binomtest(only_merge, unlike).pvalue) if unlike else 1.0,
                **{key: paired([a[key] - b[key] for a, b in both]) for key in COMPARED},
            }
    return told


def paired(differences: list[float]) -> dict[str, Any]:
    """Mean of paired differences and its 95% interval."""
    values = np.array(differences)
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else math.nan
    mean = float(values.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "median": float(np.median(values))}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss of the trunk and of its continuations, a panel a seed."""
    import altair as alt

    alt.data_transformers.disable_max_rows()
    points = []
    for row in [row for row in rows if row["collapsed"]]:
        around = range(row["checkpoints"][0] - 30, row["collapse_step"] + AFTER)
        series = {"the run that collapsed": (0, row["trunk"])}
        # with the same data a rollback is the run again, to the bit: one line is enough
        drawn = {name: arm for name, arm in row["arms"].items() if name != "further rollback, same data"}
        series |= {name: (arm["start_step"], arm["losses"]) for name, arm in drawn.items()}
        for name, (offset, losses) in series.items():
            smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
            points += [
                {"seed": f"seed {row['seed']}", "step": offset + i + 5, "loss": min(v, 8.0), "run": name}
                for i, v in enumerate(smooth.tolist())
                if offset + i + 5 in around
            ]
    order = ["the run that collapsed", *(f"{s}, {d}" for s in STARTS for d in DATA)]
    order.remove("further rollback, same data")
    colours = ["#999999", "#0b6e4f", "#6fc3a1", "#b3401f", "#f0a27f", "#8da2e8"]
    chart = (
        alt.Chart(alt.Data(values=points))
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X("step:Q", scale=alt.Scale(zero=False), title="step"),
            y=alt.Y(
                "loss:Q", scale=alt.Scale(domain=[4, 8]), title="training loss (mean of 5 steps; cut at 8)"
            ),
            color=alt.Color("run:N", sort=order, scale=alt.Scale(domain=order, range=colours), title=None),
        )
        .properties(width=300, height=170)
        .facet(alt.Facet("seed:N", title=None), columns=3)
        .resolve_scale(x="independent")
    )
    chart.save(path, scale_factor=1.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--scratch", type=Path, required=True)
    parser.add_argument("--seeds", default=",".join(map(str, range(10, 22))))
    parser.add_argument("--recipe", default=str(HERE / "recipe.toml"))
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        rows.append(one_seed(recipe, seed, arguments.scratch))
        shown = {k: v for k, v in rows[-1].items() if k not in ("trunk", "arms")}
        arms = rows[-1].get("arms", {})
        print(shown, {n: {k: v for k, v in a.items() if k != "losses"} for n, a in arms.items()}, flush=True)
        names = ("pma-llm", "torch", "transformers", "numpy")
        result = {
            "command": f"python docs/studies/collapse/run.py -o SCRATCH --seeds {arguments.seeds}",
            "versions": {name: version(name) for name in names},
            "recipe": recipe.to_json(),
            "summary": summary(rows) if any(row["collapsed"] for row in rows) else None,
            "rows": rows,
        }
        (arguments.out / "result.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result["summary"], indent=1))
    draw(rows, arguments.out / "result.png")


if __name__ == "__main__":
    main()
