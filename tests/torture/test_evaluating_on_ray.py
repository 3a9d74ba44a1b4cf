"""`pma sweep`, `eval` and `diagnose` with `--on ray`: one process's results, kept by the driver."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from pma import engine, sweeping, trajectory, verbs
from pma.cli import app
from pma.cluster import Node
from pma.engine import MergeOptions, NodeProgress, OnRay
from pma.evaluation.making import measured
from pma.evaluation.measures import text_measure
from pma.evaluation.on_ray import OnNodes
from pma.evaluation.tasks import prepared
from pma.evaluation.text import read_documents
from pma.results import Store
from pma.sweeping import Grid, Space
from pma.testing import tiny_llama_run, tiny_run
from pma.verbs import Candidate, Choice, Window

pytest.importorskip("ray")
pytest.importorskip("lm_eval")

# no process of a node opens a store of results, or sees the checkpoints of AWAY where that is set
FORBIDDEN = """
import os, sqlite3, sys
def watch(event, arguments):
    if event == "sqlite3.connect":
        raise RuntimeError("a node opened a store")
    if event == "open" and "AWAY" in os.environ and str(arguments[0]).startswith(os.environ["AWAY"]):
        raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))
sys.addaudithook(watch)
"""


def node(**more: Any) -> dict[str, Any]:
    return {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False, **more}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of every process of a node."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(FORBIDDEN)
    return {"PYTHONPATH": os.pathsep.join((str(site), os.environ.get("PYTHONPATH", "")))}


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[Any]:
    """Two nodes on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=node(env_vars=environment))
        made.add_node(**node(env_vars=environment))
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    tiny_llama_run(folder / "run", steps=7)
    sentences = [f"Sentence {i} says that {i} times {i} is {i * i}." for i in range(24)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(sentences))
    words = [{"context": f"{i} and {i}", "choices": ["one", "three", "or"], "gold": i % 3} for i in range(10)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    return folder / "run"


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take seconds, and are tested elsewhere."""
    monkeypatch.setattr("pma.cli.sweeping._draw", lambda rows, path: [])


def pma(*arguments: object) -> tuple[dict[str, Any], str]:
    """The JSON of a command, and what it said beside."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr[-3000:]
    value: dict[str, Any] = json.loads(done.stdout)
    return value, done.stderr


def last_nodes(stderr: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    nodes: list[dict[str, Any]] = [event["nodes"] for event in events if event["event"] == "nodes"][-1]
    return nodes


def test_results_are_those_of_one_process_and_only_the_driver_keeps_them(
    cluster: Any, run: Path, tmp_path: Path
) -> None:
    """Of a sweep, a search and an evaluation, by the same processes on the nodes."""
    documents = read_documents([run.parent / "text.txt"])
    text = text_measure(documents, cloze=0, context_tokens=None)
    options = MergeOptions(threads=1)

    def swept(store: str, **how: Any) -> tuple[Any, int]:
        grid = Grid(lasts=(2, 3), schemes=("sma", "wma"))
        with sweeping.planned([run], grid, options) as planned, Store(tmp_path / store) as opened:
            results, known = sweeping.evaluate(planned, [text], opened, **how)
            return sweeping.rows(planned, results), known

    def searched(store: str, **how: Any) -> dict[str, Any]:
        space = Space(lasts=(2, 3), best=(2,), schemes=("sma",))
        with sweeping.planner(options) as plans, Store(tmp_path / store) as opened:
            field = sweeping.field(trajectory.resolve([run]), space, plans)
            outcome = sweeping.search(field, plans, documents, None, opened, sweeping.How(**how))
            return sweeping.findings(outcome)

    def evaluated(**how: Any) -> tuple[Any, Any]:
        choice = Choice(paths=(run,), window=Window(last=3))
        candidates = [
            Candidate(name=scheme, choice=choice, options=replace(options, scheme=scheme))
            for scheme in ("sma", "wma")
        ]
        with prepared([str(run.parent / "words.jsonl")]) as (tasks, _):
            losses, scored = verbs.evaluate_with_tasks(candidates, documents, tasks, cloze=0, **how)
        return losses, [[result.parts for result in results] for results in scored]

    shown: list[NodeProgress] = []
    model_bytes = sum(tensor.nbytes for tensor in load_file(run / "checkpoint-70/model.safetensors").values())
    on = OnRay(address=cluster.address)
    with OnNodes(on, threads=1, show=lambda nodes: shown.__setitem__(slice(None), nodes)) as nodes:
        shared = swept("shared", measuring=nodes)
        assert sum(one.parts_done for one in shown) == 5
        # in two batches: the raw one and both merges of two, and merges of three
        assert sum(one.bytes_read for one in shown) == 5 * model_bytes
        found, results = searched("shared", measuring=nodes), evaluated(measuring=nodes)
    assert shared == swept("alone") == (shared[0], 0)
    assert found == searched("alone")
    assert found["tokens_known"] == 0
    assert results == evaluated()
    assert kept(tmp_path / "shared") == kept(tmp_path / "alone")
    with OnNodes(OnRay(address="127.0.0.1:1"), threads=1) as nowhere:  # which nobody asks for what is known
        assert swept("shared", measuring=nowhere) == (shared[0], 5)


GPUS = Node(key="g", name="g", slots=1, cores=9.0, gpus=2.0)
CORES = Node(key="c", name="c", slots=1, cores=9.0)
FEW = Node(key="f", name="f", slots=1, cores=1.0)


@pytest.mark.parametrize(
    ("nodes", "most_per_node", "used", "rooms"),
    [
        ([CORES, FEW], None, [CORES, FEW], [(4, 2.0, 0), (1, 1.0, 0)]),
        ([CORES, FEW], 3, [CORES, FEW], [(3, 2.0, 0), (1, 1.0, 0)]),
        ([CORES, GPUS, FEW], None, [GPUS], [(2, 2.0, 1)]),
        ([replace(GPUS, cores=3.0)], None, [replace(GPUS, cores=3.0)], [(2, 1.0, 1)]),
    ],
)
def test_a_process_for_each_gpu_or_for_so_many_cores(
    nodes: list[Node], most_per_node: int | None, used: list[Node], rooms: list[tuple[int, float, int]]
) -> None:
    made = OnNodes(OnRay(), threads=2, most_per_node=most_per_node)
    assert list(made.used(nodes)) == used
    found = [made.room(node) for node in used]
    assert [(room.workers, room.cores, room.gpus) for room in found] == rooms


def kept(path: Path) -> dict[tuple[str, str], Any]:
    with Store(path) as store:
        return {(row.merge_key, row.evaluation_key): (row.merge, row.result) for row in store.rows()}


@pytest.mark.parametrize("way", [("--last", "2,3"), ("--search", "--last", "2,3", "--scheme", "sma"), ()])
def test_flags_say_where_models_are_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: tuple[str, ...]
) -> None:
    """On nodes that this process stands for."""
    asked: list[tuple[OnRay, dict[str, Any]]] = []

    class Here:
        def __init__(self, on: OnRay, **how: Any) -> None:
            asked.append((on, how))
            self.passes = partial(engine.passes, in_memory=True)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def __call__(self, wanted: Any, told: Any, **how: Any) -> None:
            asked[0][1]["show"]([NodeProgress(name="node7", parts_done=3, seconds=60, bytes_read=5)])
            measured(wanted, told, **how)

    monkeypatch.setattr("pma.evaluation.on_ray.OnNodes", Here)
    arguments = (
        ["sweep", run, *way, "--store", tmp_path / "store"] if way else ["eval", run / "checkpoint-10"]
    )
    ray = ["--on", "ray", "--ray-address", "10.0.0.1:6379", "--per-node", "3", "--threads", "5"]
    text = ["--text", run.parent / "text.txt", "--cloze", "0"]
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *text, *ray)])
    assert done.exit_code == 0, done.stderr
    [(on, how)] = asked
    assert (on.address, how["most_per_node"], how["threads"]) == ("10.0.0.1:6379", 3, 5)
    assert "  node7: 3 models done, 0 running, 3 a minute; read 5B" in done.stderr


def test_a_diagnosis_is_that_of_one_process(cluster: Any, tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=4, shapes={"a.mlp": (5_000_000,), "b.norm": (3_000_001,)})
    diagnose = ("diagnose", tmp_path / "run", "--threads", 1)
    alone, _ = pma(*diagnose)
    shared, said = pma(*diagnose, "--on", "ray", "--ray-address", cluster.address)
    assert alone.pop("bytes_read") == shared.pop("bytes_read") == 4 * 16_000_002
    assert sum(one["parts_done"] for one in last_nodes(said)) == 4  # there are so many blocks
    one, other = flat(alone), flat(shared)
    assert one.keys() == other.keys()
    for where, value in one.items():
        near = isinstance(value, float)
        assert other[where] == (pytest.approx(value, rel=1e-9, abs=1e-12) if near else value), where


def test_merges_of_a_sweep_are_written_by_all_nodes(cluster: Any, tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=3, shapes={"a": (3_000_001,)})
    sweep = ("sweep", tmp_path / "run", "--last", "2,3", "--threads", 1, "--write")
    alone, _ = pma(*sweep, tmp_path / "alone")
    shared, said = pma(*sweep, tmp_path / "shared", "--on", "ray", "--ray-address", cluster.address)
    assert (alone["writing_passes"], shared["writing_passes"]) == (1, 2)
    assert sum(one["parts_done"] for one in last_nodes(said)) == 2  # blocks of the last merge
    for one, other in zip(alone["written"], shared["written"], strict=True):
        files = [Path(each["path"]) / "model.safetensors" for each in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes()
    again, _ = pma(*sweep, tmp_path / "shared", "--on", "ray", "--ray-address", "127.0.0.1:1")
    assert again["writing_passes"] == 0


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Every number and word of a JSON value, by where it is."""
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in flat(each, f"{where}/{key}").items()}
    if isinstance(value, list):
        return {k: v for n, each in enumerate(value) for k, v in flat(each, f"{where}/{n}").items()}
    return {where: value}


def test_a_node_that_does_not_see_the_run_is_named_before_anything_is_measured(
    cluster: Any, run: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    blind = cluster.add_node(**node(env_vars={**environment, "AWAY": str(run)}))
    arguments = [run, "--last", 2, "--text", run.parent / "text.txt", "--cloze", 0, "--store", tmp_path / "s"]
    ray = ["--on", "ray", "--ray-address", cluster.address]
    done = CliRunner().invoke(app, ["sweep", *map(str, arguments), *ray])
    cluster.remove_node(blind)
    assert done.exit_code == 3
    assert f"{os.uname().nodename}/{blind.node_id[:8]}" in done.stderr
    assert "Traceback" not in done.stderr
    with Store(tmp_path / "s") as store:
        assert store.rows() == []


@pytest.mark.parametrize("command", ["sweep", "eval", "diagnose"])
def test_a_cluster_is_asked_for_in_one_way(run: Path, command: str) -> None:
    arguments = [] if command == "diagnose" else ["--text", str(run.parent / "text.txt")]
    arguments += ["--last", "2", "--store", str(run.parent / "none")] if command == "sweep" else []
    for flags, message in (
        (("--ray-address", "10.0.0.1:6379"), "need --on ray"),
        (("--on", "spark"), "--on spark is not known"),
        (("--on", "ray", "--ray-address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
    ):
        done = CliRunner().invoke(app, [command, str(run), *arguments, *flags])
        assert done.exit_code in (2, 3)
        assert message in " ".join(done.stderr.split())


def test_without_an_engine_ray_is_not_imported(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=3)
    code = (
        "import sys, pma.evaluation.on_ray\nfrom pma.cli import app\n"
        f"app(['diagnose', {str(tmp_path / 'run')!r}, '--json'], standalone_mode=False)\n"
        f"app(['sweep', {str(tmp_path / 'run')!r}, '--last', '2', '--write', {str(tmp_path / 'out')!r}], "
        "standalone_mode=False)\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
