"""Every command: what it prints, its JSON, and one clear paragraph with the right exit status for bad
input.
"""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pma.cli import app
from pma.testing import random_raw, store_mean, tiny_run
from pma.testing.builders import write_safetensors, write_trainer_state
from pma.testing.reference import read_all
from pma.types import DType

ROOT = Path(__file__).parents[2]


def pma(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def error_of(result: Result) -> str:
    """The one paragraph on stderr of a command that failed as it should."""
    assert result.exit_code in (1, 2, 3, 4)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("pma: ")
    return last_line


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_run(tmp_path / "run", steps=10)
    return tmp_path / "run"


# ---- what commands print ----


def test_inspect_a_run(run: Path) -> None:
    shown = pma("inspect", run)
    assert shown.exit_code == 0
    assert "checkpoint-100" in shown.stdout
    assert "stable" in shown.stdout
    value = json.loads(pma("inspect", run, "--json").stdout)
    assert [c["step"] for c in value["checkpoints"]] == list(range(10, 101, 10))


def test_inspect_a_checkpoint(run: Path) -> None:
    shown = pma("inspect", run / "checkpoint-30", "--tensors")
    assert "layer.0.weight" in shown.stdout
    assert "4 BF16" in shown.stdout
    value = json.loads(pma("inspect", run / "checkpoint-30", "--json").stdout)
    assert (value["step"], value["tokens"], value["complete"], value["parameters"]) == (30, 3000, True, 1297)


def test_inspect_shows_quantised_types(tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / "q", [random_raw("w", DType.F8_E4M3, (4,)), random_raw("s", DType.F8_E8M0, (1,))]
    )
    assert json.loads(pma("inspect", tmp_path / "q", "--json").stdout)["dtypes"] == {
        "F8_E4M3": 1,
        "F8_E8M0": 1,
    }


def test_plan_writes_nothing_and_says_everything(run: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    shown = pma("plan", run, "--last", 3, "--scheme", "wma")
    for expected in ("0.1667", "0.5000", "4 average", "BF16", "reads", "memory", "paper suggests"):
        assert expected in shown.stdout, expected
    assert sorted(tmp_path.rglob("*")) == before
    value = json.loads(pma("plan", run, "--last", 3, "--json").stdout)
    assert value["bytes_to_read"] == 3 * 1297 * 2
    assert [s["step"] for s in value["sources"]] == [80, 90, 100]


def test_plan_suggests_and_uses_the_preset(run: Path) -> None:
    value = json.loads(pma("plan", run, "--json").stdout)
    assert len(value["sources"]) == 6
    assert "capped by the stable tokens" in value["suggestion"]
    assert "extrapolated" in value["suggestion"]


def test_merge_then_verify_then_inspect(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    value = json.loads(pma("merge", run, "--last", 4, "-o", out, "--json").stdout)
    assert value["checkpoints"] == 4
    assert "every file is as it was written, and what its sources give" in pma("verify", out).stdout
    assert json.loads(pma("verify", out, "--json").stdout)["findings"] == []
    assert "sma of 4 checkpoints, steps 70 to 100" in pma("inspect", out).stdout


def test_merge_checkpoints_named_one_by_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pma("merge", run / "checkpoint-30", run / "checkpoint-10", "-o", out).exit_code == 0
    assert [s["step"] for s in json.loads((out / "pma.json").read_text())["sources"]] == [10, 30]


def test_given_weights(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pma("merge", run, "--last", 2, "--weights", "0.25,0.75", "-o", out).exit_code == 0
    assert [s["weight"] for s in json.loads((out / "pma.json").read_text())["sources"]] == [0.25, 0.75]


def test_verify_finds_damage_and_exits_1(run: Path, tmp_path: Path) -> None:
    pma("merge", run, "--last", 4, "-o", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01"[:1])
    result = pma("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert "wrong:" in result.stdout


def test_unknown_steps_need_as_given_for_unequal_weights(tmp_path: Path) -> None:
    for number in (1, 2):
        write_safetensors(tmp_path / f"model{number}", [random_raw("w", DType.BF16, (4,), seed=number)])
    models = [tmp_path / "model1", tmp_path / "model2"]
    assert pma("merge", *models, "-o", tmp_path / "sma").exit_code == 0
    refused = pma("merge", *models, "--scheme", "wma", "-o", tmp_path / "wma")
    assert refused.exit_code == 2
    assert "--as-given" in error_of(refused)
    assert pma("merge", *models, "--scheme", "wma", "--as-given", "-o", tmp_path / "wma").exit_code == 0


def test_report_of_a_run(run: Path, tmp_path: Path) -> None:
    value = json.loads(pma("report", run, "-o", tmp_path / "report", "--json").stdout)
    assert "checkpoint-100" in Path(value["report"]).read_text()
    assert all(Path(p).stat().st_size > 1000 for p in value["pictures"])


def test_plan_for_several_nodes(run: Path) -> None:
    """Tiny tensors are one block: one node does all of it, at its rate."""
    asked = ("plan", run, "--last", 3, "--nodes", 4, "--read", "1KB/s", "--write", "2GB/s")
    value = json.loads(pma(*asked, "--json").stdout)
    scaling = value["scaling"]
    streaming = scaling["seconds"] - scaling["planning_seconds"] - scaling["starting_seconds"]
    assert streaming == pytest.approx(value["bytes_to_read"] / 1000, abs=0.002)
    assert (scaling["bytes_to_read_per_node"], scaling["nodes_idle"]) == (value["bytes_to_read"], 3)
    shown = pma(*asked).stdout
    assert "4 nodes " in shown
    assert "3 nodes have nothing to do" in shown
    assert "rate 'fast'" in error_of(pma("plan", run, "--last", 3, "--nodes", 4, "--read", "fast"))
    assert "scaling" not in json.loads(pma("plan", run, "--last", 3, "--json").stdout)
    on_ray = json.loads(pma(*asked, "--on", "ray", "--json").stdout)["scaling"]
    assert on_ray["starting_seconds"] > scaling["starting_seconds"] + on_ray["planning_seconds"]
    assert "needs --nodes" in error_of(pma("plan", run, "--last", 3, "--on", "ray"))


def test_a_roofline_is_of_one_process(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    merge = ("merge", run, "--last", 3, "-o", tmp_path / "out")
    assert "--measure-roofline measures one process" in error_of(pma(*merge, "--measure-roofline"))
    monkeypatch.setenv("RANK", "2")
    assert "rank 2 of 2 processes" in error_of(pma(*merge))
    assert "rank 2 of 2" in error_of(pma("eval", run))
    monkeypatch.setenv("RANK", "1")
    assert "pma eval works in one process, and this one was started as rank 1 of 2" in error_of(
        pma("eval", run)
    )
    assert pma("plan", run, "--last", 3).exit_code == 0


# ---- bad input: a clear paragraph, the right status, nothing lost, nothing that looks complete ----


def empty_folder(tmp_path: Path) -> list[object]:
    (tmp_path / "empty").mkdir()
    return [tmp_path / "empty"]


def wrong_folder(tmp_path: Path) -> list[object]:
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "photo.jpg").write_text("x")
    return [tmp_path / "wrong"]


def file_for_folder(tmp_path: Path) -> list[object]:
    (tmp_path / "file").write_text("x")
    return [tmp_path / "file"]


def missing_tensor(tmp_path: Path) -> list[object]:
    path = tmp_path / "run" / "checkpoint-90"
    write_safetensors(path, [random_raw("embed.weight", DType.BF16, (32, 16))])
    return [tmp_path / "run"]


def other_shape(tmp_path: Path) -> list[object]:
    shapes = {"embed.weight": (16, 32), "layer.0.weight": (16, 48), "layer.0.bias": (16,), "scale": ()}
    write_safetensors(
        tmp_path / "run" / "checkpoint-90", [random_raw(n, DType.BF16, s) for n, s in shapes.items()]
    )
    return [tmp_path / "run"]


def other_dtype(tmp_path: Path) -> list[object]:
    shapes = {"embed.weight": (32, 16), "layer.0.weight": (16, 48), "layer.0.bias": (16,), "scale": ()}
    write_safetensors(
        tmp_path / "run" / "checkpoint-90", [random_raw(n, DType.F32, s) for n, s in shapes.items()]
    )
    return [tmp_path / "run"]


def truncated_shard(tmp_path: Path) -> list[object]:
    os.truncate(tmp_path / "run" / "checkpoint-90" / "model.safetensors", 1500)
    return [tmp_path / "run"]


def nan_in_a_source(tmp_path: Path) -> list[object]:
    path = tmp_path / "run" / "checkpoint-90" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")
    return [tmp_path / "run"]


def being_written(tmp_path: Path) -> list[object]:
    (tmp_path / "run" / "checkpoint-90" / "trainer_state.json").unlink()
    return [tmp_path / "run" / "checkpoint-80", tmp_path / "run" / "checkpoint-90"]


BAD_SOURCES = [
    (empty_folder, 3, "holds no checkpoint"),
    (wrong_folder, 3, "holds no checkpoint"),
    (file_for_folder, 3, "is a file"),
    (lambda tmp: [tmp / "nowhere"], 3, "does not exist"),
    (missing_tensor, 3, "missing in"),
    (other_shape, 3, r"shape (16, 32), expected (32, 16)"),
    (other_dtype, 3, "dtype F32, expected BF16"),
    (truncated_shard, 3, "cut short"),
    (nan_in_a_source, 3, "nan; every value must be finite"),
    (being_written, 3, "not complete"),
]


@pytest.mark.parametrize(("spoil", "status", "message"), BAD_SOURCES)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_sources(
    run: Path, tmp_path: Path, spoil: Callable[[Path], list[object]], status: int, message: str, as_json: bool
) -> None:
    sources = spoil(tmp_path)
    window = [] if len(sources) > 1 else ["--last", 3]
    before = snapshot(tmp_path)
    result = pma("merge", *sources, *window, "-o", tmp_path / "out", *(["--json"] if as_json else []))
    assert message in error_of(result)
    assert result.exit_code == status
    if as_json:
        assert message in json.loads(result.stdout)["error"]["message"]
    else:
        assert result.stdout == ""
    assert snapshot(tmp_path) == before  # nothing made, nothing changed


def snapshot(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")} | {str(p): 0 for p in folder.glob(".*")}


BAD_REQUESTS = [
    (["--last", "3", "--scheme", "magic"], "scheme 'magic' is not known"),
    (["--last", "3", "--scheme", "ema"], "is not known"),
    (["--last", "3", "--every", "8Q"], "'8Q' is not understood"),
    (["--every", "8B"], "--every needs --last"),
    (["--last", "3", "--memory", "lots"], "'lots' is not understood"),
    (["--last", "3", "--dtype", "int8"], "--dtype 'int8' is not known"),
    (["--last", "3", "--weights", "a,b,c"], "expected numbers"),
    (["--last", "3", "--weights", "0.5,0.5"], "2 numbers for 3"),
    (["--last", "3", "--preset"], "one or the other"),
    (["--last", "0"], "at least one"),
    (["--last", "30"], "only 10 complete checkpoints"),
    (["--last", "3", "--at", "55"], "no checkpoint of that step"),
    ([], "which checkpoints of the run?"),
    (["--last", "3", "--every", "9" * 5000], "is not understood"),
    (["--last", "3", "--memory", "9" * 400], "is not understood"),
    (["--last", "3", "--weights", "inf,-inf,1"], "finite"),
    (["--last", "3", "--threads", "0"], "at least one"),
    (["--last", "3", "--as-given"], "one by one"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_REQUESTS)
def test_bad_requests(run: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    result = pma("merge", run, *flags, "-o", tmp_path / "out")
    assert message in error_of(result)
    assert result.exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_an_output_that_exists_or_is_inside_the_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in error_of(pma("merge", run, "--last", 3, "-o", tmp_path / "out"))
    assert "inside the run" in error_of(pma("merge", run, "--last", 3, "-o", run / "merged"))
    (tmp_path / "file").write_text("x")
    assert "is a file" in error_of(pma("merge", run, "--last", 3, "-o", tmp_path / "file" / "out"))


def test_a_run_that_crosses_phases(run: Path, tmp_path: Path) -> None:
    for path in run.iterdir():
        step = int(path.name.split("-")[1])
        write_trainer_state(path, step, rates={90: 5e-4, 100: 1e-4})
    assert "crosses phases" in error_of(pma("merge", run, "--last", 5, "-o", tmp_path / "out"))


def test_flags_for_runs_do_not_go_with_checkpoints(run: Path, tmp_path: Path) -> None:
    result = pma("merge", run / "checkpoint-10", run / "checkpoint-20", "--last", 2, "-o", tmp_path / "out")
    assert "named one by one" in error_of(result)


def test_other_commands_with_bad_input(run: Path, tmp_path: Path) -> None:
    for arguments, status, message in (
        (("inspect", tmp_path / "nowhere"), 3, "does not exist"),
        (("verify", run), 3, "holds no pma.json"),
        (("report", tmp_path / "nowhere"), 3, "does not exist"),
        (("pretrain", "nano-dens", "-o", tmp_path / "x"), 2, "there are micro-dense"),
        (("pretrain", "-o", tmp_path / "x"), 2, "which recipe"),
        (
            ("pretrain", "nano-dense", "-o", tmp_path / "x", "--anneal", "cosine"),
            2,
            "it goes with --fork-from",
        ),
        (("pretrain", "--fork-from", run / "checkpoint-10", "-o", tmp_path / "x"), 2, "--tokens"),
        (("pretrain", "nano-dense", "-o", tmp_path / "x", "--tokens", "8Q"), 2, "'8Q'"),
        (
            ("pretrain", "nano-dense", "-o", tmp_path / "x", "--epochs", "2"),
            2,
            "it goes with --start-from",
        ),
        (("pretrain", "--start-from", run, "nano-dense", "-o", tmp_path / "x"), 2, "RECIPE does not go with"),
        (("pretrain", "--start-from", run, "-o", tmp_path / "x"), 2, "needs --learning-rate"),
        (
            ("pretrain", "--start-from", run, "-o", tmp_path / "x", "--learning-rate", "1e-3"),
            2,
            "give one of them",
        ),
        (
            ("pretrain", "nano-dense", "-o", tmp_path / "x", "--text", tmp_path / "nowhere"),
            3,
            "does not exist",
        ),
        (("eval", run, "--last", 3), 2, "go with --merge"),
        (("eval", run), 3, "--text"),
        (("eval", run, "--text", tmp_path / "nowhere"), 3, "does not exist"),
        (("demo", "-o", run), 2, "is not a demo"),
    ):
        result = pma(*arguments)
        assert message in error_of(result), arguments
        assert result.exit_code == status, arguments


def test_a_checkpoint_that_transformers_does_not_know(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(5):
        (tmp_path / "text" / f"{i}.txt").write_text("some words to read " * 40)
    assert "cannot be evaluated" in error_of(pma("eval", run, "--text", tmp_path / "text"))


# ---- the shape of the command line ----

FLAGS = {
    "demo": "--json --moe --out",
    "inspect": "--json --pattern --tensors",
    "plan": "--allow-mixed-phases --allow-nonfinite --as-given --at --copy --dtype --every --exclude --json "
    "--last --like --map --memory --nodes --on --pattern --preset --read --scheme --threads --to --use "
    "--weights --with-optimizer --write",
    "merge": "--allow-mixed-phases --allow-nonfinite --as-given --at --break-lock --copy --dtype --every "
    "--exclude --fresh --hash-sources --inside-run --json --last --like --map --measure-roofline --memory "
    "--on --out --pattern --per-node --preset --ray-address --scheme --sha256 --staging --threads --to --use "
    "--weights --with-optimizer",
    "sweep": "--allow-mixed-phases --allow-nonfinite --at --best --break-lock --budget --cloze --context "
    "--copy --dtype --every --exclude --fresh --json --last --limit --memory --on --per-node --ray-address "
    "--scheme --search --staging --store --tasks --text --threads --use --weights --write",
    "verify": "--full --json --samples",
    "eval": "--annealed --at --cloze --context --every --json --last --limit --merge --on --per-node "
    "--preset --ray-address --scheme --tasks --text --threads --use --weights",
    "report": "--json --out",
    "spikes": "--grad-norm-name --json --last --log --loss-name --pattern --step-name",
    "diagnose": "--as-given --at --every --exclude --json --last --log --memory --on --pattern --per-node "
    "--preset --ray-address --store --text --threads",
    "forecast": "--anneal --annealed --batch --calibration --context --curve --floor --from --json --law "
    "--out --probe --schedule --seed --steps --store --target --text --tokens --warmup",
    "pretrain": "--anneal --checkpoint-every --epochs --final-learning-rate --fork-from --instructions "
    "--json --learning-rate --no-interval-means --out --resume-from --schedule --seed --skip-steps "
    "--skip-tokens --start-from --text --tokens --warmup-steps",
    "init": "--allow-mixed-phases --allow-nonfinite --as-given --at --before-step --break-lock --every --for "
    "--fresh --inside-run --json --last --memory --optimizer --out --pattern --preset --scheme --staging "
    "--threads --weights",
    "watch": "--allow-mixed-phases --cloze --context --every --every-checkpoint --json --keep-window --last "
    "--limit --memory --once --out --pattern --poll --port --scheme --store --tasks --text --threads --wandb "
    "--weights",
    "study": "--data --home --jobs --json --minutes --out --preset --redraw --seeds",
}


def test_the_list_of_commands_and_flags_is_pinned() -> None:
    import typer.main

    group = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        options = [option for p in command.params for option in p.opts if option.startswith("--")]
        found[name] = " ".join(sorted(set(options) - {"--help"}))
    assert found == FLAGS


@pytest.mark.parametrize("name", FLAGS)
def test_help_has_an_example(name: str) -> None:
    shown = pma(name, "--help")
    assert shown.exit_code == 0
    assert f"Example: pma {name}" in " ".join(shown.stdout.split())


def test_help_and_plan_import_neither_torch_nor_transformers(run: Path) -> None:
    for arguments in (["--help"], ["plan", str(run), "--last", "3"], ["inspect", str(run)]):
        script = (
            f"import sys; sys.argv = ['pma', *{arguments!r}]\n"
            "from pma.cli import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'transformers', 'altair', 'scipy', 'ray'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_root_offers_the_verbs_and_nothing_else() -> None:
    import pma as package

    assert package.__all__ == [
        "Choice", "MergeOptions", "Steps", "Tokens", "Window", "__version__", "average", "discover",
        "evaluate", "fork", "init", "inspect", "location", "merge", "plan", "pretrain", "spikes",
        "verify",
    ]  # fmt: skip
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError):
        _ = package.nothing


def test_the_version_is_the_distributions() -> None:
    import pma as package

    assert pma("--version").stdout == f"pma-llm {package.__version__}\n"
    assert package.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "RUN", "--context", "0"],
        ["eval", "RUN", "--cloze", "-1"],
        ["verify", "RUN", "--samples", "-5"],
        ["pretrain", "nano-dense", "-o", "OUT", "--seed", "-1"],
        ["pretrain", "nano-dense", "-o", "OUT", "--learning-rate", "nan"],
        ["pretrain", "nano-dense", "-o", "OUT", "--learning-rate", "0"],
    ],
)
def test_numbers_out_of_range_are_wrong_use_and_write_nothing(
    run: Path, tmp_path: Path, arguments: list[str]
) -> None:
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    result = pma(*(places.get(a, a) for a in arguments))
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_transformers_cannot_build_writes_nothing(tmp_path: Path) -> None:
    text = (ROOT / "src/pma/pretraining/recipes/nano-dense.toml").read_text()
    for change, message in (
        (('"llama"', '"nope"'), "cannot build"),
        (("hidden_size = 96", 'hidden_size = "wide"'), "cannot build"),
        (("num_attention_heads = 4", "num_attention_heads = 0"), "cannot build"),
        (("vocabulary_tokens = 512", "vocabulary_tokens = 10"), "at least 257"),
        (("batch_sequences = 16", "batch_sequences = 0"), "at least 1"),
    ):
        (tmp_path / "recipe.toml").write_text(text.replace(*change))
        assert message in error_of(pma("pretrain", tmp_path / "recipe.toml", "-o", tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_names_that_are_not_valid_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"run\xff")
    tiny_run(tmp_path / name, steps=2)
    command = [sys.executable, "-m", "pma", "inspect", str(tmp_path / name)]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, check=False, capture_output=True, env=strict)
    assert done.returncode == 0, done.stderr
    assert b"checkpoint-20" in done.stdout


def test_inspect_of_a_run_survives_a_damaged_newest_checkpoint(run: Path) -> None:
    os.truncate(run / "checkpoint-100" / "model.safetensors", 100)
    shown = pma("inspect", run)
    assert shown.exit_code == 0
    assert "No window is suggested" in shown.stdout


# ---- interval means ----


@pytest.fixture
def run_with_means(run: Path) -> Path:
    tensors = {name: np.ones(raw["shape"]) for name, raw in read_all(run / "checkpoint-10").items()}
    for step in range(30, 101, 10):
        store_mean(run / f"checkpoint-{step}", tensors, averaged="masters")
    return run


def test_plan_and_inspect_say_where_means_are(run_with_means: Path) -> None:
    told = "interval means are stored beside 8 of 10 checkpoints: --use interval-means"
    assert told in pma("inspect", run_with_means).stderr
    assert json.loads(pma("inspect", run_with_means, "--json").stdout)["interval_means_beside"] == 8
    assert told in pma("plan", run_with_means, "--last", 10).stderr
    one = pma("inspect", run_with_means / "checkpoint-30").stdout
    assert "interval mean of the fp32 masters: 10 updates of steps 21 to 30" in one
    assert "interval mean" not in pma("inspect", run_with_means / "checkpoint-20").stdout


def test_a_merge_of_means_says_what_it_averages(run_with_means: Path, tmp_path: Path) -> None:
    use = ("--use", "interval-means")
    shown = pma("plan", run_with_means, "--last", 5, *use)
    assert "5 interval means of the fp32 masters: 50 updates of steps 51 to 100, without gaps" in shown.stdout
    assert shown.stderr == ""
    sparse = pma("merge", run_with_means, "--last", 3, "--every", 20, *use, "-o", tmp_path / "out")
    assert sparse.stderr.startswith("steps 61–70, 81–90 are in no mean\n")
    assert "sma of 3 interval means" in sparse.stdout
    assert "sma of 3 interval means, steps 60 to 100" in pma("inspect", tmp_path / "out").stdout
    assert pma("verify", tmp_path / "out", "--full").exit_code == 0


def test_what_cannot_be_meant_of_means(run_with_means: Path, tmp_path: Path) -> None:
    wrong = pma("merge", run_with_means, "--last", 9, "--use", "interval-means", "-o", tmp_path / "out")
    assert "no mean is stored beside 1 of the window's 9 checkpoints" in error_of(wrong)
    assert wrong.exit_code == 2
    unknown = pma("plan", run_with_means, "--last", 3, "--use", "ema")
    assert "there are snapshots, interval-means" in error_of(unknown)
    alone = pma("eval", run_with_means, "--use", "interval-means")
    assert "--use interval-means goes with --merge" in error_of(alone)
    mean = run_with_means / "checkpoint-30" / "pma_interval_mean.safetensors"
    assert "name the checkpoint, or the run, and say --use" in error_of(pma("inspect", mean))
