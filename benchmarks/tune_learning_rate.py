"""The learning rate of a built-in recipe: lowest annealed loss over several rates and seeds, on validation
text.

    python benchmarks/tune_learning_rate.py nano-dense --rates 1e-3,2e-3,3e-3 --seeds 0,1,2 -o /tmp/tuning

Every run is pre-trained, forked with a cosine anneal of a fifth of its length, and its last 10 checkpoints
merged. The result is `docs/learning-rates/RECIPE.json`; a second call computes only what is missing. Held-out
text is not touched.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs" / "learning-rates"
CHARACTERS_A_DOCUMENT = 8_000


def one(recipe_name: str, rate: float, seed: int, scratch: Path) -> dict[str, Any]:
    """Train, anneal and merge one run; validation losses of the three models."""
    import torch

    torch.set_num_threads(1)  # runs are parallel, not steps
    from pma import engine, trajectory
    from pma.evaluation import Document, read_documents
    from pma.evaluation.evaluate import evaluate
    from pma.evaluation.model import load_scorer
    from pma.pretraining import fork, load_recipe, pretrain

    recipe = load_recipe(recipe_name)
    recipe = replace(
        recipe,
        optimizer=replace(recipe.optimizer, learning_rate=rate),
        run=replace(recipe.run, seed=seed),
    )
    folder = scratch / f"{recipe_name}-{rate:g}-{seed}"
    run = pretrain(recipe, folder / "run")
    annealed = fork(run.checkpoint, folder / "annealed", anneal="cosine", tokens=recipe.run.tokens // 5)
    texts = read_documents([folder / "run" / "text" / "validation.txt"])
    documents = [Document(name=d.name, text=d.text[:CHARACTERS_A_DOCUMENT]) for d in texts]
    windows = {
        "last": trajectory.from_checkpoints([run.checkpoint]),
        "sma": trajectory.discover([folder / "run"]),
        "annealed": trajectory.from_checkpoints([annealed.checkpoint]),
    }
    losses = {}
    for name, found in windows.items():
        with engine.plan(found.points[-10:]) as plan:
            scorer = load_scorer(engine.average(plan), found.points[-1].path)
        losses[name] = evaluate(name, scorer, documents, cloze=0).loss.value
    shutil.rmtree(folder)
    return {"recipe": recipe_name, "learning_rate": rate, "seed": seed, **losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--rates", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("-o", "--scratch", type=Path, required=True)
    parser.add_argument("--parallel", type=int, default=2)
    arguments = parser.parse_args()
    DOCS.mkdir(parents=True, exist_ok=True)
    path = DOCS / f"{arguments.recipe}.json"
    results = json.loads(path.read_text()) if path.is_file() else []
    done = {(r["learning_rate"], r["seed"]) for r in results}
    wanted = [
        (float(rate), int(seed)) for seed in arguments.seeds.split(",") for rate in arguments.rates.split(",")
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.parallel, mp_context=context) as pool:
        futures = [
            pool.submit(one, arguments.recipe, rate, seed, arguments.scratch)
            for rate, seed in wanted
            if (rate, seed) not in done
        ]
        for future in futures:
            results.append(future.result())
            results.sort(key=lambda r: (r["learning_rate"], r["seed"]))
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(results[-1] if not results else future.result(), flush=True)


if __name__ == "__main__":
    main()
