"""How busy training keeps the machine: model FLOPs a second of a size of the studies, and their share of the
peak.

    python benchmarks/model_flops.py --preset gpu --size dense-120M --steps 60 [--text FILE] [--peak-tflops
    989]

Trains as `pma study` does and times the steps after the first twenty (which compile and warm up). Model
FLOPs are those of forward and backward passes without recomputation: 6 a weight that takes part and token
(not of the embedding, which is looked up), and 12 a layer, width and token of context for attention, half of
which causality spares. A mixture's inactive experts do not take part. The peak is the GPU's, dense bf16;
without a GPU there is none.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pma.pretraining import Recipe, pretrain
from pma.studies.presets import preset

WARM_UP_STEPS = 20
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def flops_a_token(recipe: Recipe) -> float:
    """Of forward and backward passes."""
    model = recipe.model
    width, layers = model["hidden_size"], model["num_hidden_layers"]
    active = model.get("num_experts_per_tok", 1)
    feed_forward = 3 * width * model["intermediate_size"] * active + width * model.get("num_experts", 0)
    weights = layers * (4 * width**2 + feed_forward) + width * recipe.text.vocabulary_tokens
    return 6.0 * weights + 12.0 * layers * width * recipe.text.context_tokens / 2


def peak_tflops() -> float | None:
    """The GPU's, where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def measure(recipe: Recipe, steps: int, text: list[str]) -> dict[str, Any]:
    """Tokens a second of the steps after the warm-up."""
    tokens = (steps + WARM_UP_STEPS) * recipe.tokens_a_step
    run = replace(recipe.run, tokens=tokens, checkpoint_every_tokens=tokens, interval_means=False)
    times: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            replace(recipe, run=run),
            Path(folder) / "run",
            text=text,
            progress=lambda step, last, loss: times.__setitem__(step, time.perf_counter()),
        )
    seconds = times[steps + WARM_UP_STEPS - 1] - times[WARM_UP_STEPS]
    a_second = (steps - 1) * recipe.tokens_a_step / seconds
    return {
        "size": recipe.name,
        "tokens_a_second": a_second,
        "model_tflops": a_second * flops_a_token(recipe) / 1e12,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="gpu")
    parser.add_argument("--size", default="dense-120M")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--peak-tflops", type=float, default=peak_tflops())
    given = parser.parse_args()
    size = preset(given.preset).size(given.size)
    result = measure(size.at(size.rates[0], seed=0), given.steps, given.text)
    if given.peak_tflops is not None:
        result["share_of_peak"] = result["model_tflops"] / given.peak_tflops
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
