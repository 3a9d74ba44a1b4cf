"""A converted model is the source's: its logits in transformers equal a forward pass of the trainer's own."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pma import formats
from pma.conversion import convert, read_template

from .models import FAMILIES, TOKENS, assert_same_logits, converted_logits, hf_config, source, template
from .trainers import (
    apart,
    megatron_logits,
    megatron_shapes,
    random_weights,
    stacked,
    titan_logits,
    titan_shapes,
)


@pytest.mark.parametrize("weights", [True, False], ids=["with weights", "config only"])
@pytest.mark.parametrize("generation", ["0.3", "0.2"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3", "qwen3_moe"])
def test_torchtitan(tmp_path: Path, family: str, generation: str, weights: bool) -> None:
    sizes = FAMILIES[family]
    mine = random_weights(titan_shapes(sizes, generation=generation))
    checkpoint = source(tmp_path / "titan", mine)
    like = template(tmp_path / "like", family, sizes, weights=weights)
    found = converted_logits(checkpoint, like, tmp_path / "out")
    assert_same_logits(found, titan_logits(mine, sizes, TOKENS, generation=generation))


@pytest.mark.parametrize("layout", ["stacked", "one by one", "apart"])
@pytest.mark.parametrize("family", FAMILIES)
def test_megatron(tmp_path: Path, family: str, layout: str) -> None:
    sizes = FAMILIES[family]
    mine = random_weights(megatron_shapes(sizes))
    written = {"stacked": stacked(mine, sizes), "one by one": mine, "apart": apart(mine)}[layout]
    checkpoint = source(tmp_path / "megatron", written)
    like = template(tmp_path / "like", family, sizes, weights=layout == "stacked")
    found = converted_logits(checkpoint, like, tmp_path / "out")
    assert_same_logits(found, megatron_logits(mine, sizes, TOKENS))


@pytest.mark.parametrize("weights", [True, False], ids=["with weights", "config only"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "stored twice"])
@pytest.mark.parametrize("trainer", ["torchtitan", "megatron"])
def test_tied_embeddings(tmp_path: Path, trainer: str, twice: bool, weights: bool) -> None:
    sizes = replace(FAMILIES["llama"], tied=True)
    if trainer == "torchtitan":
        mine = random_weights(titan_shapes(sizes))
        expected, embedding, head = (
            titan_logits(mine, sizes, TOKENS),
            "tok_embeddings.weight",
            "lm_head.weight",
        )
    else:
        mine = random_weights(megatron_shapes(sizes))
        expected, embedding = megatron_logits(mine, sizes, TOKENS), "embedding.word_embeddings.weight"
        head = "output_layer.weight"
    if twice:
        mine[head] = mine[embedding].clone()
    checkpoint = source(tmp_path / "source", mine)
    like = template(tmp_path / "like", "llama", sizes, weights=weights)
    assert_same_logits(converted_logits(checkpoint, like, tmp_path / "out"), expected)


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod."])
def test_a_wrappers_prefix(tmp_path: Path, prefix: str) -> None:
    sizes = replace(FAMILIES["llama"], tied=True)  # every name begins with model. then, wrapped or not
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(hf_config("llama", sizes)).eval()
    mine = {k: v * 3 for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.load_state_dict(mine, strict=False)
    like = template(tmp_path / "like", "llama", sizes, weights=True)
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    for number, names in enumerate(("", prefix)):
        checkpoint = source(tmp_path / f"source-{number}", {names + k: v for k, v in mine.items()})
        found = converted_logits(checkpoint, like, tmp_path / f"out-{number}")
        torch.testing.assert_close(found, expected)


def test_rotary_order_matters(tmp_path: Path) -> None:
    """The same shapes, another model: without the reordering of wq and wk the logits are others."""
    sizes = FAMILIES["llama"]
    mine = random_weights(titan_shapes(sizes))
    like = template(tmp_path / "like", "llama", sizes, weights=True)
    found = converted_logits(source(tmp_path / "titan", mine), like, tmp_path / "out")
    turned = {
        name: value.reshape(-1, sizes.head_dim // 2, 2, sizes.hidden).transpose(1, 2).reshape(value.shape)
        if name.endswith(("wq.weight", "wk.weight"))
        else value
        for name, value in mine.items()
    }
    wrong = converted_logits(source(tmp_path / "turned", turned), like, tmp_path / "wrong")
    assert (found - wrong).abs().max() > 0.1


def test_the_configuration_names_the_type_of_the_weights(tmp_path: Path) -> None:
    sizes = FAMILIES["llama"]
    mine = {name: value.bfloat16() for name, value in random_weights(titan_shapes(sizes)).items()}
    like = template(tmp_path / "like", "llama", sizes, weights=True)
    shutil.copy(like / "config.json", tmp_path / "as-it-was.json")
    with closing(
        convert(formats.open_checkpoint(source(tmp_path / "s", mine)), read_template(like))
    ) as reader:
        config = json.loads(reader.side_files()["config.json"])
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert (like / "config.json").read_bytes() == (tmp_path / "as-it-was.json").read_bytes()
