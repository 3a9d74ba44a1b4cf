"""What does not fit is an error that lists it; map files are read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pma.conversion import Conversion, fit, load_map, read_template
from pma.conversion.maps import built_in, parse_map
from pma.errors import FormatError, MismatchError, UsageError
from pma.types import DType, Role, TensorSpec

from .trainers import Sizes, megatron_shapes, titan_shapes

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 44,
    "vocab_size": 61,
    "tie_word_embeddings": False,
}


def specs(shapes: Mapping[str, tuple[int, ...]], **roles: Role) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(name=name, dtype=DType.BF16, shape=shape, role=roles.get(name, Role.PARAMETER))
        for name, shape in shapes.items()
    }


def fitted(
    tmp_path: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] = LLAMA
) -> Conversion:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return fit(specs(shapes), read_template(tmp_path))


def test_built_in_maps_are_chosen_by_what_fits(tmp_path: Path) -> None:
    assert fitted(tmp_path, titan_shapes(Sizes())).map.name == "torchtitan-llama"
    assert fitted(tmp_path, megatron_shapes(Sizes())).map.name == "megatron-gpt"
    names = ["megatron-gpt", "same-names", "torchtitan-llama", "torchtitan-qwen3"]
    assert [found.name for found in built_in()] == names
    assert load_map("megatron-gpt").name == "megatron-gpt"


def test_what_does_not_map_is_listed(tmp_path: Path) -> None:
    shapes = titan_shapes(Sizes())
    del shapes["norm.weight"], shapes["layers.1.feed_forward.w2.weight"]
    shapes |= {"layers.0.adapter\x1b[2J.weight": (3, 3), "tok_embeddings.weight": (64, 32)}
    with pytest.raises(MismatchError) as caught:
        fitted(tmp_path, shapes)
    text = str(caught.value)
    assert "by map torchtitan-llama" in text
    assert "no place in the model (1):\n  layers.0.adapter\\x1b[2J.weight" in text
    assert "model.norm.weight (from norm.weight)" in text
    assert "model.layers.1.mlp.down_proj.weight (from layers.1.feed_forward.w2.weight)" in text
    assert "the checkpoint does not have (2)" in text
    assert "tok_embeddings.weight: axis 0 of shape (64, 32) is 64, expected vocab with vocab 61" in text


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    shapes = titan_shapes(Sizes()) | {f"extra.{i}": (1,) for i in range(100)}
    with pytest.raises(MismatchError, match=r"\(100\):(\n  extra.\d+){40}\n  and 60 more"):
        fitted(tmp_path, shapes)


@pytest.mark.parametrize(
    "wrong", [{"num_attention_heads": 8}, {"num_key_value_heads": 4}, {"num_hidden_layers": 3}]
)
@pytest.mark.parametrize("trainer", [titan_shapes, megatron_shapes])
def test_a_template_of_another_model_is_refused(tmp_path: Path, trainer: Any, wrong: dict[str, int]) -> None:
    with pytest.raises(MismatchError):
        fitted(tmp_path, trainer(Sizes()), {**LLAMA, "head_dim": 8, **wrong})


def test_training_state_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    extra = {"optimizer.state.norm.weight.exp_avg": (32,), "x._extra_state": (17,)}
    everything = specs(
        titan_shapes(Sizes()) | extra,
        **{"optimizer.state.norm.weight.exp_avg": Role.MOMENT, "x._extra_state": Role.OPAQUE},
    )
    assert fit(everything, read_template(tmp_path)).left_out == tuple(extra)


def test_excluded_tensors_need_no_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shapes = specs(titan_shapes(Sizes()) | {"layers.0.moe.expert_bias_E": (4,)})
    found = fit(shapes, read_template(tmp_path), exclude=["*.expert_bias_E"])
    assert found.unused == ("layers.0.moe.expert_bias_E",)


def test_embeddings_that_the_template_ties_and_the_model_does_not(tmp_path: Path) -> None:
    found = fitted(tmp_path, titan_shapes(Sizes()), {**LLAMA, "tie_word_embeddings": True})
    assert found.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in found.tensors
    with pytest.raises(MismatchError, match=r"lm_head.weight \(from lm_head.weight\)"):
        fitted(tmp_path, titan_shapes(Sizes(tied=True)))


def test_names_alone_need_a_template_with_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "unheard_of"}))
    with pytest.raises(MismatchError, match="no built-in map is for models of type unheard_of"):
        fit(specs({"a": (1,)}), read_template(tmp_path))
    with pytest.raises(UsageError, match="holds no weights, so it tells no names"):
        fit(specs({"a": (1,)}), read_template(tmp_path), load_map("same-names"))


def test_a_configuration_that_asks_for_too_much_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="2147483647 layers; that is not believable"):
        fitted(tmp_path, titan_shapes(Sizes()), {**LLAMA, "num_hidden_layers": 2**31 - 1})
    with pytest.raises(FormatError, match="vocab_size is 'many', expected a positive number"):
        fitted(tmp_path, titan_shapes(Sizes()), {**LLAMA, "vocab_size": "many"})
    without = {key: value for key, value in LLAMA.items() if key != "num_hidden_layers"}
    with pytest.raises(MismatchError, match="does not say how many layers"):
        fitted(tmp_path, titan_shapes(Sizes()), without)


def test_parts_that_overlap_or_leave_a_hole_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    halves = [{"target": "t", "source": f"s{i}", "view": f"columns -> two[{i}] columns"} for i in (0, 1)]
    like, given = read_template(tmp_path), specs({"s0": (4,), "s1": (4,)})

    def with_rules(rules: list[dict[str, str]]) -> Conversion:
        return fit(given, like, parse_map(json.dumps({"rule": rules}).encode(), Path("m.json")))

    assert with_rules(halves).tensors["t"].shape == (2, 4)
    for wrong in (halves[:1], [halves[0], {**halves[1], "view": halves[0]["view"]}]):
        with pytest.raises(MismatchError, match="without a source, or give one two"):
            with_rules(wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected \[\[rule\]\] tables"),
        ("rule = 3", r"expected \[\[rule\]\] tables"),
        ("[[rule]]\ntarget = 't'", "rule 1: expected target and source"),
        ("[[rule]]\ntarget = 't'\nsource = 's'\nviev = 'a'", "rule 1: 'viev' is not known"),
        ("[[rule]]\ntarget = 't'\nsource = 's'\nview = 'a('", "rule 1: 'a\\('"),
        ("[[rule]]\ntarget = 't'\nsource = ['s', 3]", "source is a list of texts"),
        ("[[rule]]\ntarget = 't'\nsource = '[a][b][c][d][e]'", "more than 4 optional parts"),
        ("[[rule]]\ntarget = 't'\nsource = 's'\noptional = 1", "optional is true or false"),
        ("models = 'llama'\nidentity = true", "models is a list of texts"),
        ("identity = true\n[facts]\nrows = 3", "facts gives each name a key"),
        ("identity = true\nidentity = true", "is not valid TOML"),
    ],
)
def test_maps_that_are_not_understood_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(FormatError, match=message):
        load_map(str(tmp_path / "mine.toml"))


def test_a_map_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a file nor one of megatron-gpt, same-names, "):
        load_map(str(tmp_path / "none.toml"))


def test_a_folder_without_a_configuration_is_no_template(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        read_template(tmp_path)
