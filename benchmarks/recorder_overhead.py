"""What the recorder costs a training step, recording every step.

    python benchmarks/recorder_overhead.py [--sequences 16] [--rounds 7]

Takes turns between steps without a recorder, with one that adds at once, and with one that copies and adds by
a thread; prints and writes the ratios of neighbouring steps (of their time, and of their processor time,
which says more where others use the machine), the share of a step that `update` itself takes, and the time to
store a mean: `benchmarks/results/recorder_overhead.json`, under the number of sequences. On the CPU the model
is that of the recipe small-dense; a step there takes 128 sequences, here `--sequences`, so the share is that
many times less there. Where there is a GPU, also a model of 100M parameters on it, with peaks of its memory;
else it says that there is none.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from summary import machine, spread
from transformers import AutoModelForCausalLM

from pma.evaluation.quiet import quiet_transformers
from pma.online import Recorder
from pma.pretraining import load_recipe
from pma.pretraining.recipe import Recipe
from pma.pretraining.train import _config

RESULTS = Path(__file__).parent / "results" / "recorder_overhead.json"
# width, layers: about 100M parameters with the vocabulary of 8,192
_GPU_MODEL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 13,
    "num_attention_heads": 12,
}
_WAYS: dict[str, dict[str, Any] | None] = {
    "without": None,
    "at once": {"on_cpu": False},
    "by a thread": {"on_cpu": True},
}


class Training:
    """A model, its optimizer, and random tokens: a step takes as long as with real ones."""

    def __init__(self, recipe: Recipe, sequences: int, micro_sequences: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = AutoModelForCausalLM.from_config(_config(recipe, end_of_text=0)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.optimizer.learning_rate)
        self.micro_batches = max(1, sequences // micro_sequences)
        shape = (min(sequences, micro_sequences), recipe.text.context_tokens)
        self.tokens = torch.randint(recipe.text.vocabulary_tokens, shape, device=device)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> None:
        for _ in range(self.micro_batches):
            with torch.autocast(self.device, torch.bfloat16):
                loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
            (loss / self.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def timed(training: Training, call: Callable[[], None]) -> float:
    """Seconds, all of the device's work included."""
    training.wait()
    started = time.perf_counter()
    call()
    training.wait()
    return time.perf_counter() - started


def measure(training: Training, rounds: int, steps_a_round: int) -> dict[str, Any]:
    """Each way in turns. A recorder made for a round is warmed up by one step before it is timed."""
    seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
    processor: dict[str, list[float]] = {way: [] for way in _WAYS}
    shares: dict[str, list[float]] = {way: [] for way in _WAYS if way != "without"}
    recorders = {
        way: Recorder(training.model, optimizer=training.optimizer, **settings)
        for way, settings in _WAYS.items()
        if settings is not None
    }
    counts = dict.fromkeys(recorders, 0)

    def updated(way: str) -> None:
        counts[way] += 1
        recorders[way].update(counts[way])

    training.step()
    for way in recorders:
        updated(way)
    for _ in range(rounds):
        for way in _WAYS:
            in_update = 0.0

            def steps(way: str = way) -> None:
                nonlocal in_update
                for _ in range(steps_a_round):
                    training.step()
                    if way in recorders:
                        started = time.perf_counter()
                        updated(way)
                        in_update += time.perf_counter() - started

            before = time.process_time()
            seconds[way].append(timed(training, steps))
            if way in shares:
                shares[way].append(100 * in_update / seconds[way][-1])
                recorders[way]._feed.wait()  # what is left to add must not slow the next way's steps
            processor[way].append(time.process_time() - before)
    with tempfile.TemporaryDirectory() as folder:
        storing = timed(training, lambda: recorders["at once"].save(folder) and None)
    pairs, processor_pairs = (
        {way: [a / b for a, b in zip(times[way], times["without"], strict=True)] for way in recorders}
        for times in (seconds, processor)
    )
    return {
        "parameters": training.parameters,
        "step_seconds": spread([value / steps_a_round for value in seconds["without"]]),
        "step_with_recorder_over_without": {way: spread(values) for way, values in pairs.items()},
        "processor_time_with_recorder_over_without": {w: spread(v) for w, v in processor_pairs.items()},
        "percent_of_step_in_update": {way: spread(values) for way, values in shares.items()},
        "store_seconds": round(storing, 3),
    }


def measure_memory(recipe: Recipe, sequences: int) -> dict[str, Any]:
    """Peak memory of the GPU over three steps with each way, above that without, in bytes a parameter."""
    peaks = {}
    for way, settings in _WAYS.items():
        training = Training(recipe, sequences, sequences, "cuda")
        training.step()
        recorder = None if settings is None else Recorder(training.model, **settings)
        torch.cuda.reset_peak_memory_stats()
        for step in range(1, 4):
            training.step()
            if recorder is not None:
                recorder.update(step)
        training.wait()
        peaks[way] = torch.cuda.max_memory_allocated()
        parameters = training.parameters
        del training, recorder
        torch.cuda.empty_cache()
    above = {way: round((peak - peaks["without"]) / parameters, 3) for way, peak in peaks.items()}
    return {"peak_bytes": peaks, "bytes_a_parameter_above_without": above}


def on_gpu(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """A model of 100M parameters, 32 sequences a step."""
    large = replace(recipe, model={**recipe.model, **_GPU_MODEL})
    memory = measure_memory(large, 32)
    training = Training(large, 32, 32, "cuda")
    return {"device": torch.cuda.get_device_name(), **measure(training, rounds, 20), **memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    quiet_transformers()
    recipe = load_recipe("small-dense")
    result: dict[str, Any] = {
        "machine": machine(None),
        "recipe": recipe.name,
        "sequences_a_step": arguments.sequences,
        "sequences_a_step_in_the_recipe": recipe.run.batch_sequences,
        "rounds": arguments.rounds,
        "torch_threads": torch.get_num_threads(),
    }
    training = Training(recipe, arguments.sequences, min(arguments.sequences, 16), "cpu")
    result["cpu"] = measure(training, arguments.rounds, 1)
    result["gpu"] = (
        on_gpu(recipe, arguments.rounds) if torch.cuda.is_available() else "no GPU here: not measured"
    )
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[f"{arguments.sequences} sequences a step"] = result
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    cpu = result["cpu"]
    millions, step = cpu["parameters"] / 1e6, cpu["step_seconds"]["median"]
    print(f"{millions:.1f}M parameters on the CPU, a step of {arguments.sequences} sequences: {step:.2f} s")
    for way, percent in cpu["percent_of_step_in_update"].items():
        print(f"{way}: update takes % of a step: {percent}")
        print(
            f"{way}: a step with it is so many times as long: {cpu['step_with_recorder_over_without'][way]}"
        )
    print(f"storing a mean: {cpu['store_seconds']:.2f} s; GPU: {json.dumps(result['gpu'])}")


if __name__ == "__main__":
    main()
