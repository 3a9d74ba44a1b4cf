"""A merge of one trainer's checkpoints, written as another's: planned, written, resumed and verified."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pma import engine
from pma.cli import app
from pma.engine import MergeOptions
from pma.errors import UsageError
from pma.testing.distributed import in_ranks

from .models import FAMILIES, TOKENS, assert_same_logits, source, template
from .trainers import (
    megatron_logits,
    megatron_shapes,
    random_weights,
    stacked,
    titan_logits,
    titan_shapes,
)

SOURCES = 3
FIXTURES = Path(__file__).parent / "fixtures"


def pma(*arguments: object, status: int = 0) -> Any:
    found = CliRunner().invoke(app, [str(a) for a in arguments])
    assert found.exit_code == status, found.output
    return found


def mean(models: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}


def titan_run(folder: Path, family: str = "llama") -> tuple[list[Path], dict[str, Tensor]]:
    shapes = titan_shapes(FAMILIES[family])
    models = [random_weights(shapes, seed=seed) for seed in range(SOURCES)]
    paths = [source(folder / f"model-{i}", model) for i, model in enumerate(models)]
    return paths, mean(models)


def logits_of(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(TOKENS[None]).logits[0]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_merge_of_torchtitan_checkpoints_is_a_model_of_transformers(tmp_path: Path, family: str) -> None:
    paths, merged = titan_run(tmp_path, family)
    like = template(tmp_path / "like", family, FAMILIES[family], weights=family == "llama")
    arguments = (*paths, "--as-given", "--to", "hf", "--like", like)
    described = json.loads(pma("plan", *arguments, "--json").stdout)
    assert described["conversion"]["map"] == ("torchtitan-llama" if family == "llama" else "torchtitan-qwen3")
    assert described["conversion"]["like"] == str(like)
    assert "becomes     the model of" in pma("plan", *arguments).stdout
    pma("merge", *arguments, "--out", tmp_path / "merged")
    assert_same_logits(logits_of(tmp_path / "merged"), titan_logits(merged, FAMILIES[family], TOKENS))
    checked = json.loads(pma("verify", tmp_path / "merged", "--full", "--json").stdout)
    assert checked["blocks_derived"] == checked["blocks_total"] > 0
    assert not checked["findings"]
    assert not checked["sources_changed"]


def test_a_merge_of_megatron_checkpoints_is_a_model_of_transformers(tmp_path: Path) -> None:
    sizes = FAMILIES["mixtral"]
    models = [random_weights(megatron_shapes(sizes), seed=seed) for seed in range(SOURCES)]
    paths = [source(tmp_path / f"model-{i}", stacked(model, sizes)) for i, model in enumerate(models)]
    like = template(tmp_path / "like", "mixtral", sizes, weights=True)
    pma("merge", *paths, "--as-given", "--like", like, "--out", tmp_path / "merged")
    assert_same_logits(logits_of(tmp_path / "merged"), megatron_logits(mean(models), sizes, TOKENS))


def test_a_run_of_sharded_checkpoints(tmp_path: Path) -> None:
    """torchtitan's DCP, saved by torch with its optimizer on two ranks, then on three."""
    sizes = FAMILIES["qwen3_moe"]
    models = [random_weights(titan_shapes(sizes), seed=seed) for seed in range(3)]
    folder = tmp_path / "dump" / "checkpoint"
    for step, ranks, model in zip((10, 20, 30), (2, 2, 3), models, strict=True):
        tensors = source(tmp_path / f"plain-{step}", model) / "model.safetensors"
        in_ranks(FIXTURES / "save_sharded.py", ranks, tensors, folder / f"step-{step}", step)
    like = template(tmp_path / "like", "qwen3_moe", sizes, weights=False)
    pma("merge", folder, "--last", 3, "--like", like, "--out", tmp_path / "merged")
    assert_same_logits(logits_of(tmp_path / "merged"), titan_logits(mean(models), sizes, TOKENS))
    found = engine.verify(tmp_path / "merged", samples=None)
    assert (found.findings, found.sources_changed) == ((), ())
    assert found.blocks_derived == found.blocks_total


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # saving from one process
@pytest.mark.parametrize("interleaved", [False, True])
def test_megatrons_arguments_are_heeded(tmp_path: Path, interleaved: bool) -> None:
    """Its tensors do not tell in which order the rotary embedding takes rows; the run's arguments do."""
    sizes = FAMILIES["llama"]
    weights = random_weights(megatron_shapes(sizes))
    folder = tmp_path / "run" / "iter_0000010"
    dcp.save({**stacked(weights, sizes), "optimizer.state.x": torch.zeros(3)}, checkpoint_id=folder)
    arguments = Namespace(rotary_interleaved=interleaved, consumed_train_samples=40, seq_length=16)
    torch.save({"args": arguments, "iteration": 10}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    like = template(tmp_path / "like", "llama", sizes, weights=False)
    merge = ("merge", folder, "--as-given", "--like", like, "--out", tmp_path / "merged")
    if interleaved:
        assert "was trained with --rotary-interleaved" in pma(*merge, status=3).stderr
    else:
        pma(*merge)
        assert_same_logits(logits_of(tmp_path / "merged"), megatron_logits(weights, sizes, TOKENS))


def test_the_order_of_merging_and_converting_does_not_matter(tmp_path: Path) -> None:
    """To the bit: the merge converted is what the merge in the trainer's own names holds."""
    paths, _ = titan_run(tmp_path)
    like = template(tmp_path / "like", "llama", FAMILIES["llama"], weights=True)
    weights = ("--weights", "0.2,0.5,0.3", "--dtype", "bfloat16")
    pma("merge", *paths, "--as-given", *weights, "--like", like, "--out", tmp_path / "at-once")
    pma("merge", *paths, "--as-given", *weights, "--out", tmp_path / "before")
    pma("merge", tmp_path / "before", "--as-given", "--like", like, "--out", tmp_path / "after")
    at_once, after = (load_file(tmp_path / name / "model.safetensors") for name in ("at-once", "after"))
    assert at_once.keys() == after.keys()
    for name, value in at_once.items():
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, after[name]), name
    config = json.loads((tmp_path / "at-once" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_verify_tells_a_template_or_map_that_changed(tmp_path: Path) -> None:
    paths, _ = titan_run(tmp_path)
    like = template(tmp_path / "like", "llama", FAMILIES["llama"], weights=False)
    built_in = Path(engine.__file__).parents[1] / "conversion" / "built_in" / "torchtitan-llama.toml"
    mine = tmp_path / "mine.toml"
    mine.write_bytes(built_in.read_bytes())
    out = tmp_path / "merged"
    pma("merge", *paths, "--as-given", "--like", like, "--map", mine, "--out", out)
    assert engine.verify(out).sources_changed == ()
    mine.write_bytes(built_in.read_bytes() + b"# another\n")
    (like / "config.json").write_text((like / "config.json").read_text() + "\n")
    changed = engine.verify(out).sources_changed
    assert [change.split(", ")[0] for change in changed] == [str(like), f"the map {mine} has changed since"]
    mine.unlink()
    assert "neither a file nor" in engine.verify(out).sources_changed[-1]


def test_exclude_names_tensors_of_the_sources(tmp_path: Path) -> None:
    sizes = FAMILIES["llama"]
    extra = {"layers.0.moe.expert_bias_E": torch.ones(4)}
    paths = [source(tmp_path / str(i), random_weights(titan_shapes(sizes), i) | extra) for i in range(2)]
    like = template(tmp_path / "like", "llama", sizes, weights=True)
    arguments = (*paths, "--as-given", "--like", like)
    refused = pma("plan", *arguments, status=3)
    assert "layers.0.moe.expert_bias_E" in refused.stderr
    described = json.loads(pma("plan", *arguments, "--exclude", "*.expert_bias_E", "--json").stdout)
    assert described["excluded"] == ["layers.0.moe.expert_bias_E"]
    assert "matches no tensor" in pma("plan", *arguments, "--exclude", "nothing*", status=2).stderr


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    paths, _ = titan_run(tmp_path)
    assert "--map mine needs --like" in pma("plan", *paths, "--as-given", "--map", "mine", status=2).stderr
    refused = pma("plan", *paths, "--as-given", "--to", "onnx", status=2).stderr
    assert "--to onnx: there are" in refused
    assert "hf" in refused
    with pytest.raises(UsageError, match="leaves it behind"):
        MergeOptions(like=tmp_path, with_optimizer=True)


def test_one_source_without_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    paths, _ = titan_run(tmp_path)
    weights = load_file(paths[0] / "model.safetensors")
    del weights["norm.weight"]
    paths[0] = source(tmp_path / "lacking", weights)
    like = template(tmp_path / "like", "llama", FAMILIES["llama"], weights=True)
    refused = pma("plan", *paths, "--as-given", "--like", like, status=3).stderr
    assert "model.norm.weight (from norm.weight)" in refused
