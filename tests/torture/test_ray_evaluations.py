"""SIGKILL of processes that measure models on a Ray cluster, of a node and of the driver, and Ctrl-C: what
was measured is kept, and the same command measures the rest, with the results of one process.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pma import sweeping
from pma.engine import MergeOptions, OnRay
from pma.errors import MismatchError, NonfiniteError, UsageError
from pma.evaluation.evaluate import Evaluation
from pma.evaluation.measures import Measure
from pma.evaluation.on_ray import OnNodes
from pma.results import Store
from pma.sweeping import Grid
from pma.testing import tiny_llama_run, tiny_run

from . import ray_cluster as ray

# what every process of a node runs as it starts: a model is scored, and a part summed, slowly
SLOW = """
import importlib.abc, importlib.util, os, sys, time
SLOWED = {"pma.evaluation.scoring": "document_losses", "pma.engine.gram": "sums_of"}
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in SLOWED:
            return None
        function = SLOWED.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            quick = getattr(module, function)
            def slow(*arguments, **named):
                time.sleep(float(os.environ["SLOW_SECONDS"]))
                return quick(*arguments, **named)
            setattr(module, function, slow)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Slow())
"""
MODELS = 11
_SECONDS = 60


def pma(*arguments: object) -> subprocess.Popen[str]:
    """A command; its words are piped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ray.SOURCE)}
    command = [sys.executable, "-m", "pma", *map(str, arguments), "--threads", "1", "--json"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(command: subprocess.Popen[str]) -> dict[str, Any]:
    said, told = command.communicate(timeout=2 * _SECONDS)
    assert command.returncode == 0, told[-4000:]
    value: dict[str, Any] = json.loads(said)
    return value


def kept(store: Path) -> int:
    """How many results are in a store."""
    with Store(store) as opened:
        return len(opened.rows())


def wait_for(happened: Callable[[], object], command: subprocess.Popen[str]) -> None:
    """Until it has, while the command goes on."""
    deadline = time.monotonic() + _SECONDS
    while not happened():
        assert command.poll() is None, command.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(cluster: Any, name: str) -> bool:
    """Whether no process of a node does so any more, within some seconds."""
    deadline = time.monotonic() + 20
    while ray.workers(cluster, name) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not ray.workers(cluster, name)


def test_a_sweep_goes_on_whatever_is_killed(tmp_path: Path) -> None:
    run, store, text = tmp_path / "run", tmp_path / "store.sqlite", tmp_path / "text.txt"
    tiny_llama_run(run, steps=6)
    text.write_text("\n<|endoftext|>\n".join(f"Sentence {i}: {i} times {i} is {i * i}." for i in range(24)))
    sweep = ("sweep", run, "--last", "2,3,4,5,6", "--scheme", "sma,wma", "--text", text, "--cloze", 0)
    alone = finished(pma(*sweep, "--store", tmp_path / "alone.sqlite"))
    environment = {"SLOW_SECONDS": "1", "PYTHONPATH": ray.site(tmp_path / "site", SLOW)}
    with ray.cluster(2, **environment) as cluster:
        on = ("--store", store, "--on", "ray", "--ray-address", cluster.address)

        command = pma(*sweep, *on)
        wait_for(lambda: kept(store) >= 1, command)
        assert ray.kill(ray.workers(cluster, "Models.carry_out")[0])
        cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
        cluster.workers.append(ray.add_node(cluster, **environment))
        seen = kept(store)
        wait_for(lambda: kept(store) > seen, command)
        command.send_signal(signal.SIGINT)
        _, told = command.communicate(timeout=_SECONDS)
        assert command.returncode == 4, told[-4000:]
        assert "is given to a node again" in told
        assert ended(cluster, "Models")
        interrupted_with = kept(store)
        assert seen < interrupted_with < MODELS

        command = pma(*sweep, *on)
        wait_for(lambda: kept(store) > interrupted_with, command)
        command.kill()
        command.communicate()
        assert ended(cluster, "Models")
        killed_with = kept(store)
        assert interrupted_with < killed_with < MODELS

        command = pma(*sweep, *on)
        wait_for(lambda: kept(store) > killed_with, command)
        assert ray.kill(ray.workers(cluster, "Models.carry_out")[0])
        done = finished(command)
    assert done["from_store"] == killed_with
    assert done["rows"] == alone["rows"]
    print(f"\nof {MODELS}: {interrupted_with} when interrupted, {killed_with} when killed")


def test_a_diagnosis_goes_on_where_a_process_and_a_node_are_killed(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=4, shapes={"a.mlp": (20_000_000,), "b.norm": (3_000_001,)})
    diagnose = ("diagnose", tmp_path / "run")
    alone = finished(pma(*diagnose))
    environment = {"SLOW_SECONDS": "0.7", "PYTHONPATH": ray.site(tmp_path / "site", SLOW)}
    with ray.cluster(2, **environment) as cluster:
        command = pma(*diagnose, "--on", "ray", "--ray-address", cluster.address)
        wait_for(lambda: ray.workers(cluster, "_Adder.carry_out"), command)
        assert ray.kill(ray.workers(cluster, "_Adder.carry_out")[0])
        time.sleep(1)
        cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
        shared = finished(command)
    assert shared["bytes_read"] == alone["bytes_read"]
    for name, group in alone["groups"].items():
        for one, other in zip(flat(group), flat(shared["groups"][name]), strict=True):
            assert abs(one - other) <= 1e-9 * abs(one) + 1e-12


def test_what_is_wrong_with_a_model_is_told_as_in_one_process(tmp_path: Path) -> None:
    run, store, scored, grid = tmp_path / "run", tmp_path / "store", tmp_path / "scored", Grid(lasts=(2, 3))
    tiny_run(run, steps=3)

    def count(name: str, scorer: Any) -> Evaluation:
        with scored.open("a") as file:
            file.write("x")
        return Evaluation(
            name=name, text_digest="", context_tokens=1, text_bytes=1, nats=(1.0, 2.0), tokens=(1, 2)
        )

    def touches(tensors: Any, like: Path, *, context_tokens: int) -> None:
        os.utime(like / "model.safetensors", (1, 1))

    def refuses(tensors: Any, like: Path, *, context_tokens: int) -> None:
        raise NonfiniteError(f"{like.name} is all wrong")

    measure = Measure(name="count", key="count", run=count, read=Evaluation.from_json, needs=())

    def swept(**how: Any) -> None:
        with sweeping.planned([run], grid, MergeOptions()) as planned, Store(store) as opened:
            sweeping.evaluate(planned, [measure], opened, measuring=nodes, **how)

    with (
        ray.cluster(2, PYTHONPATH=str(ray.SOURCE)) as cluster,
        OnNodes(OnRay(address=cluster.address), threads=1) as nodes,
    ):
        with pytest.raises(NonfiniteError, match=r"^checkpoint-30 is all wrong$"):
            swept(load=refuses)
        assert not scored.exists()
        with pytest.raises(UsageError, match="cannot be sent to another process"):
            swept(load=partial(refuses, threading.Lock()))
        with pytest.raises(MismatchError, match="was changed while it was merged"):
            swept(load=touches)
    assert kept(store) < 3  # those, if any, that were told of before it was seen


def flat(value: Any) -> list[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        return [number for each in value.values() for number in flat(each)]
    if isinstance(value, list):
        return [number for each in value for number in flat(each)]
    return [] if value is None or isinstance(value, str) else [value]
