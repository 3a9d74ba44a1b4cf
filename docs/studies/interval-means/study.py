"""Held-out loss of merges of N snapshots, of N stored interval means, and of the average over every step, of
one window.

    python docs/studies/interval-means/study.py -o /tmp/interval-means

Pre-trains nano-dense once for each seed (a minute or two each). While the window is trained, a callback
does what a recorder does: for each spacing it keeps the running fp32 mean of the weights since the last
checkpoint and stores both, so that each spacing has a run folder of its own, which pma merges. A second call
trains only what is missing. Writes result.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import TrainerCallback

from pma import MergeOptions, Window, pretrain, verbs
from pma.evaluation import Document, read_documents
from pma.evaluation.evaluate import Evaluation, evaluate
from pma.evaluation.model import load_scorer
from pma.evaluation.paired import paired_difference
from pma.formats.interval_mean import METADATA_KEY, IntervalMean, file_of
from pma.pretraining import load_recipe, train
from pma.verbs import Choice

HERE = Path(__file__).parent
RECIPE = "nano-dense"
WINDOW_STEPS = 200
COUNTS = (2, 4, 5, 10)
CHARACTERS_A_DOCUMENT = 8_000


class KeepMeans(TrainerCallback):
    """Stores, for each N, a checkpoint and its interval mean at the N ends of equal parts of the window; and
    the fp64 mean over all of its steps.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        self._folder, self._last = folder, last_step
        self._means: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        into_window = step - (self._last - WINDOW_STEPS)
        if into_window <= 0:
            return
        weights = {name: p.detach() for name, p in model.named_parameters()}  # those that are tied, once
        for count in (1, *COUNTS):  # 1: the whole window
            self._add(count, weights)
            if into_window % (WINDOW_STEPS // count) == 0:
                self._store(count, step, model)

    def _add(self, count: int, weights: dict[str, torch.Tensor]) -> None:
        wide = torch.float64 if count == 1 else torch.float32
        zeros = {name: torch.zeros_like(value, dtype=wide) for name, value in weights.items()}
        updates, mean = self._means.get(count, (0, zeros))
        for name, value in weights.items():
            mean[name] += (value.to(wide) - mean[name]) / (updates + 1)
        self._means[count] = (updates + 1, mean)

    def _store(self, count: int, step: int, model: Any) -> None:
        updates, mean = self._means.pop(count)
        path = self._folder / f"{count}" / f"checkpoint-{step}"
        model.save_pretrained(path)
        history = {"global_step": step, "log_history": []}
        (path / "trainer_state.json").write_text(json.dumps(history))
        record = IntervalMean(
            first_step=step - updates + 1, last_step=step, updates=updates, every=1, averaged="weights"
        )
        tensors = {name: tensor.float().numpy() for name, tensor in mean.items()}
        save_file(tensors, file_of(path), metadata={"format": "pt", METADATA_KEY: record.to_json()})


def trained(scratch: Path, seed: int) -> Path:
    """The folder of a seed: `run`, and a folder of checkpoints with means for each N."""
    folder = scratch / f"seed-{seed}"
    done = folder / "done"
    if done.exists():
        return folder
    if folder.exists():
        shutil.rmtree(folder)  # what was added up of the window is lost with the process
    recipe = load_recipe(RECIPE)
    recipe = replace(recipe, run=replace(recipe.run, seed=seed))
    made = train._trainer

    def with_means(*arguments: Any, **how: Any) -> Any:
        trainer = made(*arguments, **how)
        trainer.add_callback(KeepMeans(folder, recipe.steps_for(recipe.run.tokens)))
        return trainer

    train._trainer = with_means
    try:
        pretrain(recipe, folder / "run", progress=lambda step, last, loss: said(f"seed {seed}", step, last))
    finally:
        train._trainer = made
    done.touch()
    return folder


def said(what: str, step: int, last: int) -> None:
    if step % 250 == 0:
        print(f"{what}: {step} of {last} steps", file=sys.stderr, flush=True)


def models(folder: Path) -> dict[str, tuple[Choice, MergeOptions]]:
    """What is evaluated of a seed, by name."""
    found: dict[str, tuple[Choice, MergeOptions]] = {}
    last = Choice(paths=(folder / "1",), window=Window(last=1))
    found["last"] = (last, MergeOptions())
    # one mean, of the whole window, kept in fp64
    found["exact"] = (last, MergeOptions(use="interval-means"))
    for count in COUNTS:
        choice = Choice(paths=(folder / f"{count}",), window=Window(last=count))
        found[f"snapshots {count}"] = (choice, MergeOptions())
        found[f"means {count}"] = (choice, MergeOptions(use="interval-means"))
    return found


def of_seed(folder: Path) -> dict[str, Any]:
    """Losses of a seed's models, their differences to the exact average, and how far the weights are off."""
    texts = read_documents([folder / "run" / "text" / "held_out.txt"])
    documents = [Document(name=d.name, text=d.text[:CHARACTERS_A_DOCUMENT]) for d in texts]
    evaluations: dict[str, Evaluation] = {}
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, (choice, options) in models(folder).items():
        weights[name] = verbs.average(choice, options)
        scorer = load_scorer(weights[name], verbs.newest(folder / "run"))
        evaluations[name] = evaluate(name, scorer, documents, cloze=0)
        print(f"{folder.name} {name}: {evaluations[name].loss.value:.4f}", file=sys.stderr, flush=True)
    exact = evaluations["exact"]
    largest = max(float(tensor.abs().max()) for tensor in weights["exact"].values())
    rows = {}
    for name, found in evaluations.items():
        difference = paired_difference(found.nats, exact.nats, exact.tokens)
        off = max(float((t - weights["exact"][n]).abs().max()) for n, t in weights[name].items())
        rows[name] = {
            "loss": found.loss.value,
            "above_exact": difference.value,
            "above_exact_standard_error": difference.standard_error,
            "largest_weight_difference": off,
        }
    return {
        "documents": len(documents),
        "tokens": int(np.sum(exact.tokens)),
        "largest_weight": largest,
        "models": rows,
    }


def over_seeds(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with errors over seeds."""
    table = {}
    for name in next(iter(by_seed.values()))["models"]:
        losses_S = np.array([found["models"][name]["loss"] for found in by_seed.values()])
        above_S = np.array([found["models"][name]["above_exact"] for found in by_seed.values()])
        error = float(above_S.std(ddof=1) / np.sqrt(len(above_S))) if len(above_S) > 1 else None
        table[name] = {
            "loss": float(losses_S.mean()),
            "above_exact": float(above_S.mean()),
            "above_exact_standard_error_over_seeds": error,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    by_seed = {seed: of_seed(trained(given.out, seed)) for seed in seeds}
    result = {
        "command": "python docs/studies/interval-means/study.py -o SCRATCH --seeds " + given.seeds,
        "recipe": RECIPE,
        "window_steps": WINDOW_STEPS,
        "counts": COUNTS,
        "characters_a_document": CHARACTERS_A_DOCUMENT,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("pma-llm", "torch", "transformers", "numpy")},
        },
        "over_seeds": over_seeds(by_seed),
        "seeds": by_seed,
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
