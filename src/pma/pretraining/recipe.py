"""A recipe: everything that decides a pre-training run, as frozen dataclasses and as TOML."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from pma.errors import UsageError
from pma.quantities import parse_tokens

ANNEALS = ("cosine", "linear", "1-sqrt")
CONSTANT = "constant"
SCHEDULES = ("cosine", "linear", CONSTANT)  # of a later stage, after its warmup

Part = TypeVar("Part", "TextRecipe", "OptimizerRecipe", "RunRecipe")


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """Tokenizer and packing. `context_tokens`: length of a training sequence."""

    vocabulary_tokens: int
    context_tokens: int


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW and the warmup; after it the rate is constant."""

    learning_rate: float
    warmup_steps: int
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    gradient_clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """How long, how often a checkpoint is written, how much a step takes in.

    `interval_means`: store the mean of the weights over all steps since the last checkpoint beside each.
    `compiled`: by torch.compile.
    """

    tokens: int
    checkpoint_every_tokens: int
    batch_sequences: int
    micro_batch_sequences: int | None = None
    log_every_steps: int = 5
    seed: int = 0
    precision: str = "float32"
    interval_means: bool = True
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pre-training run. `model` is a transformers configuration, passed on as it is."""

    name: str
    model: Mapping[str, Any]
    text: TextRecipe
    optimizer: OptimizerRecipe
    run: RunRecipe

    PRECISIONS: ClassVar = ("float32", "bfloat16")

    def __post_init__(self) -> None:
        run, optimizer = self.run, self.optimizer
        for what, ok in (
            ("batch_sequences must be at least 1", run.batch_sequences >= 1),
            ("micro_batch_sequences must be at least 1", (run.micro_batch_sequences or 1) >= 1),
            ("log_every_steps must be at least 1", run.log_every_steps >= 1),
            ("context_tokens must be at least 2", self.text.context_tokens >= 2),
            (
                "vocabulary_tokens must be at least 257: every byte and the end of text",
                self.text.vocabulary_tokens > 256,
            ),
            ("learning_rate must be above 0 and finite", 0 < optimizer.learning_rate < math.inf),
            ("warmup_steps must not be negative", optimizer.warmup_steps >= 0),
            ("seed must lie between 0 and 2**32 - 1", 0 <= run.seed < 2**32),
        ):
            if not ok:
                raise UsageError(f"recipe {self.name}: {what}")
        if "model_type" not in self.model:
            raise UsageError(f'recipe {self.name}: [model] needs model_type, such as "llama"')
        if run.precision not in self.PRECISIONS:
            raise UsageError(
                f"recipe {self.name}: precision {run.precision!r}, expected one of {self.PRECISIONS}"
            )
        if run.batch_sequences % (run.micro_batch_sequences or run.batch_sequences):
            raise UsageError(
                f"recipe {self.name}: batch_sequences is not a multiple of micro_batch_sequences"
            )
        for what, value in (("tokens", run.tokens), ("checkpoint_every_tokens", run.checkpoint_every_tokens)):
            if value < self.tokens_a_step:
                raise UsageError(
                    f"recipe {self.name}: {what} {value} is less than one step's {self.tokens_a_step}"
                )

    @property
    def tokens_a_step(self) -> int:
        return self.run.batch_sequences * self.text.context_tokens

    def steps_for(self, tokens: int) -> int:
        """Steps that see at least `tokens`."""
        return -(-tokens // self.tokens_a_step)

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_tables` reads it back."""
        return asdict(self)


def load_recipe(name_or_path: str) -> Recipe:
    """A built-in recipe by name, or a TOML file. Raises UsageError for anything else in it or for none
    such.
    """
    path = Path(name_or_path)
    built_in = {
        item.name.removesuffix(".toml"): item for item in resources.files("pma.pretraining.recipes").iterdir()
    }
    if name_or_path in built_in and not path.is_file():
        text = built_in[name_or_path].read_text()
    elif path.is_file():
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    else:
        names = ", ".join(sorted(name for name in built_in if not name.startswith("_")))
        raise UsageError(f"recipe {name_or_path!r} is neither a file nor built in; there are {names}")
    try:
        return from_tables(tomllib.loads(text), name_or_path)
    except ValueError as error:
        raise UsageError(f"recipe {name_or_path} is not valid TOML: {error}") from error


def from_tables(tables: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from TOML's tables. Raises UsageError naming an unknown, missing or mistyped entry."""
    expected = {"name", "model", "text", "optimizer", "run"}
    for name in set(tables) ^ expected:
        raise UsageError(f"recipe {where}: {name} is {'unknown' if name in tables else 'missing'}")
    for name in sorted(expected - {"name"}):
        if not isinstance(tables[name], Mapping):
            raise UsageError(f"recipe {where}: {name} is {tables[name]!r}, expected a table [{name}]")
    return Recipe(
        name=str(tables["name"]),
        model=dict(tables["model"]),
        text=_filled(TextRecipe, tables["text"], f"{where} [text]"),
        optimizer=_filled(OptimizerRecipe, tables["optimizer"], f"{where} [optimizer]"),
        run=_filled(RunRecipe, tables["run"], f"{where} [run]"),
    )


def _filled(kind: type[Part], table: Mapping[str, Any], where: str) -> Part:
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in hints:
            raise UsageError(f"recipe {where}: {name} is unknown; there are {', '.join(hints)}")
        if isinstance(value, str) and hints[name] is int:
            value = parse_tokens(value)
        wanted = (int, float) if hints[name] is float else hints[name]
        if isinstance(value, bool) != (wanted is bool) or not isinstance(value, wanted):
            raise UsageError(
                f"recipe {where}: {name} is {value!r}, expected "
                f"{getattr(hints[name], '__name__', hints[name])}"
            )
        values[name] = value
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]
    if missing:
        raise UsageError(f"recipe {where}: {missing[0]} is missing")
    return kind(**values)
