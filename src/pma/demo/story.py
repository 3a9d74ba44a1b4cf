"""`pma demo`: pre-train, merge, anneal, evaluate, report. Each step is skipped where its result is there
already.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pma import trajectory, verbs
from pma.demo import steps, wording
from pma.demo.steps import LAST, SCHEMES, Demo, TrainingBar
from pma.engine import MergeOptions
from pma.errors import UsageError
from pma.evaluation import Document
from pma.evaluation.compare import compare
from pma.evaluation.evaluate import Evaluation
from pma.formats.strict_json import load_object
from pma.pretraining import load_recipe
from pma.quantities import count_text
from pma.reporting import RESULTS_FILE, report_folder, series_from_log
from pma.verbs import Candidate, Choice

Say = Callable[[str], None]
MARKER_FILE = "demo.json"
_CURVE_POINTS = 8
_CURVE_CHARACTERS = 2_500
_CLOZE_ITEMS = 400


def run_demo(folder: Path, *, mixture_of_experts: bool, say: Say, bar: TrainingBar) -> dict[str, Any]:
    """Run what is missing of the demo in `folder` and write its report; returns what the report shows."""
    started = time.monotonic()
    demo = Demo(folder=folder, recipe=load_recipe("nano-moe" if mixture_of_experts else "nano-dense"))
    _enter(demo)
    lines = iter(demo.commands())

    def announce(count: int = 1) -> None:
        for command in (next(lines) for _ in range(count)):
            say(f"{command['title']}\n  $ {command['line']}")

    announce()
    if not demo.checkpoint(demo.steps).is_dir():
        steps.pretrain_until(demo, demo.recipe.run.tokens, bar, "pre-training")
    for scheme in SCHEMES:
        announce()
        steps.merge(demo, scheme)
    announce()
    annealed = steps.anneal(demo, bar)
    announce()
    steps.pretrain_until(demo, demo.all_tokens, bar, "going on")
    announce(2)
    documents = verbs.held_out_documents((), demo.run)
    evaluations = _evaluations(demo, annealed.checkpoint, documents)
    curve = _curve(demo, annealed.checkpoint, documents)
    results = _results(demo, evaluations, curve, documents)
    results["seconds"] = time.monotonic() - started
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n")
    page, pictures = report_folder(folder, folder)
    return {**results, "report": str(page), "pictures": [str(picture) for picture in pictures]}


def _enter(demo: Demo) -> None:
    """Mark the folder as this demo's. Raises UsageError where it holds something else."""
    marker = demo.folder / MARKER_FILE
    if marker.is_file():
        there = load_object(marker, 4096).get("recipe")
        if there != demo.recipe.name:
            raise UsageError(
                f"{demo.folder} holds the demo of {there}, not of {demo.recipe.name}; choose another folder"
            )
        return
    if demo.folder.exists() and (not demo.folder.is_dir() or any(demo.folder.iterdir())):
        raise UsageError(f"{demo.folder} exists and is not a demo; choose another folder with -o")
    demo.folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"recipe": demo.recipe.name}) + "\n")


def _evaluations(demo: Demo, annealed: Path, documents: Sequence[Document]) -> dict[str, Evaluation]:
    """Every model of the comparison, on the whole held-out text."""
    candidates = {
        "last": Choice(paths=(demo.checkpoint(demo.steps),)),
        **{scheme: Choice(paths=(demo.merged(scheme),)) for scheme in SCHEMES},
        "annealed": Choice(paths=(annealed,)),
        "raw later": Choice(paths=(demo.checkpoint(demo.last_step),)),
        "sma later": demo.window(demo.last_step),
    }
    return {
        name: _evaluated(demo, name, choice, documents, cloze=_CLOZE_ITEMS)
        for name, choice in candidates.items()
    }


def _evaluated(
    demo: Demo, name: str, choice: Choice, documents: Sequence[Document], *, cloze: int
) -> Evaluation:
    """The evaluation of `choice`, computed unless it is kept from these very files, this text and these
    settings.
    """
    options = MergeOptions()
    with verbs.plan(choice, options) as planned:
        content = [[asdict(identity) for identity in source.files] for source in planned.sources]
    text = [document.text for document in documents]
    key = hashlib.blake2b(json.dumps([content, text, cloze]).encode(), digest_size=8).hexdigest()
    path = demo.folder / "evaluations" / f"{name.replace(' ', '-').replace(':', '-')}-{key}.json"
    if path.is_file():
        return Evaluation.from_json(json.loads(path.read_text()))
    evaluation = verbs.evaluate(
        [Candidate(name=name, choice=choice, options=options)], documents, cloze=cloze
    )[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(evaluation.to_json()) + "\n")
    return evaluation


def _curve(demo: Demo, annealed: Path, documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Held-out loss of raw and merged models over training, on the start of each document."""
    starts = [Document(name=d.name, text=d.text[:_CURVE_CHARACTERS]) for d in documents]
    every = demo.recipe.run.checkpoint_every_tokens // demo.recipe.tokens_a_step
    first = LAST * every + demo.recipe.optimizer.warmup_steps // every * every
    marks = [
        first + (demo.steps - first) * i // (_CURVE_POINTS - 1) // every * every for i in range(_CURVE_POINTS)
    ]
    points: list[dict[str, Any]] = []
    for step in [*marks, demo.last_step]:
        tokens = step * demo.recipe.tokens_a_step
        for model, kind, choice in (
            ("raw checkpoint", "raw", Choice(paths=(demo.checkpoint(step),))),
            (f"sma of the last {LAST}", "merged", demo.window(step)),
        ):
            loss = _evaluated(demo, f"curve {kind} {step}", choice, starts, cloze=0).loss.value
            points.append({"tokens": tokens, "loss": loss, "model": model, "kind": kind})
    end = _evaluated(demo, "curve annealed", Choice(paths=(annealed,)), starts, cloze=0).loss.value
    fork_loss = next(
        p["loss"] for p in points if p["kind"] == "raw" and p["tokens"] == demo.recipe.run.tokens
    )
    for tokens, loss in ((demo.recipe.run.tokens, fork_loss), (demo.all_tokens, end)):
        points.append({"tokens": tokens, "loss": loss, "model": "annealed fork", "kind": "annealed"})
    return points


def _results(
    demo: Demo, evaluations: dict[str, Evaluation], curve: list[dict[str, Any]], documents: Sequence[Document]
) -> dict[str, Any]:
    """Everything the report shows, as plain values."""
    rows = compare(list(evaluations.values()), evaluations["annealed"])
    more = count_text(demo.anneal_tokens)
    titles = {
        "last": (f"last (step {demo.steps})", "raw", 0),
        **{scheme: (f"merged: {scheme} of the last {LAST}", "merged", 0) for scheme in SCHEMES},
        "annealed": (f"annealed: {steps.ANNEAL}, {more} tokens more", "annealed", demo.anneal_tokens),
        "raw later": (f"raw: constant rate, {more} tokens more", "raw", demo.anneal_tokens),
        "sma later": (f"merged: sma there, {more} tokens more", "merged", demo.anneal_tokens),
    }
    comparison = []
    for row in rows:
        title, kind, extra_tokens = titles[row.name]
        comparison.append({**row.to_json(), "title": title, "kind": kind, "extra_tokens": extra_tokens})
    constant = trajectory.discover([demo.run]).log
    fork = trajectory.discover([demo.annealed]).log
    a_step = demo.recipe.tokens_a_step
    series = [
        series_from_log("constant learning rate", "raw", constant, a_step),
        series_from_log("annealed fork", "annealed", fork, a_step, after_step=demo.steps),
    ]
    return {
        "pma_demo": 1,
        "title": "Pre-trained model averaging: the demo",
        "lead": wording.lead(demo),
        "verdict": wording.verdict(demo, rows),
        "protocol": wording.protocol(demo, len(documents)),
        "curve_protocol": wording.curve_protocol(_CURVE_CHARACTERS),
        "comparison": comparison,
        "curve": curve,
        "training": [asdict(item) for item in series],
        "commands": demo.commands(),
        "recipe": demo.recipe.to_json(),
    }
