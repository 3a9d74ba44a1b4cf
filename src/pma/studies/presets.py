"""How large the studies are: models, lengths, windows and texts, for two cores, for one GPU, and for
tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pma.errors import UsageError
from pma.pretraining import Recipe
from pma.pretraining.recipe import OptimizerRecipe, RunRecipe, TextRecipe

DENSE, MIXTURE = "dense", "mixture"


@dataclass(frozen=True, kw_only=True)
class Size:
    """One model of the studies. `rates`: the learning rates it is tuned over, in rising order."""

    name: str
    family: str
    recipe: Recipe
    rates: tuple[float, ...]

    def at(self, rate: float, seed: int) -> Recipe:
        """The recipe with this learning rate and seed."""
        return replace(
            self.recipe,
            optimizer=replace(self.recipe.optimizer, learning_rate=rate),
            run=replace(self.recipe.run, seed=seed),
        )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Steps are optimizer steps. Each size is trained for `steps` at a constant rate with a checkpoint each
    `every_steps`; forks at `fork_steps` decay for `anneal_steps`, the last of them to the end of the run.
    `last` checkpoints, `every_steps` apart, are the usual window. `middle`: the size, of each family, of the
    studies of one size. `stage_steps`: length of continued training and fine-tuning.
    """

    name: str
    sizes: tuple[Size, ...]
    middle: tuple[str, ...]
    steps: int
    every_steps: int
    fork_steps: tuple[int, ...]
    anneal_steps: int
    last: int
    stages: tuple[int, int, int]
    stage_steps: int
    extra_rates: tuple[float, ...]
    characters_a_document: int
    corpus: str
    tasks: tuple[str, ...]
    task_items: int

    def size(self, name: str) -> Size:
        """The size of that name."""
        return next(size for size in self.sizes if size.name == name)

    def of(self, family: str) -> tuple[Size, ...]:
        """The sizes of a family, smallest first."""
        return tuple(size for size in self.sizes if size.family == family)


def preset(name: str) -> Preset:
    """`cpu`, `gpu` or `toy`. Raises UsageError for another."""
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _size(
    name: str,
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    experts: int = 0,
    rates: tuple[float, ...],
    vocabulary_tokens: int,
    context_tokens: int,
    run: RunRecipe,
    warmup_steps: int,
) -> Size:
    """A Llama, or with `experts` an OLMoE of which an eighth, at least two, are active, each of them
    `inner` / active wide: the active parameters are about the dense model's.
    """
    model: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": True,
    }
    if experts:
        active = max(2, experts // 8)
        model |= {
            "model_type": "olmoe",
            "intermediate_size": inner // active,
            "num_experts": experts,
            "num_experts_per_tok": active,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.01,
        }
    recipe = Recipe(
        name=name,
        model=model,
        text=TextRecipe(vocabulary_tokens=vocabulary_tokens, context_tokens=context_tokens),
        optimizer=OptimizerRecipe(learning_rate=rates[0], warmup_steps=warmup_steps),
        run=run,
    )
    return Size(name=name, family=MIXTURE if experts else DENSE, recipe=recipe, rates=rates)


def _cpu() -> Preset:
    a_step, steps, every_steps = 8 * 128, 3_000, 25
    run = RunRecipe(
        tokens=steps * a_step,
        checkpoint_every_tokens=every_steps * a_step,
        batch_sequences=8,
        log_every_steps=25,
        interval_means=False,
    )
    with_means = replace(run, interval_means=True)  # the middle sizes, of which most is asked
    shapes = {"0.2M": (64, 176, run), "0.4M": (96, 256, with_means), "0.9M": (144, 384, run)}
    rates = {"0.2M": (1e-3, 2e-3, 4e-3), "0.4M": (1e-3, 2e-3, 4e-3, 8e-3), "0.9M": (5e-4, 1e-3, 2e-3)}
    sizes = tuple(
        _size(
            f"{family}-{label}",
            hidden=hidden,
            inner=inner,
            layers=3,
            heads=4,
            experts=8 if family == MIXTURE else 0,
            rates=rates[label],
            vocabulary_tokens=1024,
            context_tokens=128,
            run=how,
            warmup_steps=100,
        )
        for family in (DENSE, MIXTURE)
        for label, (hidden, inner, how) in shapes.items()
    )
    return Preset(
        name="cpu",
        sizes=sizes,
        middle=("dense-0.4M", "mixture-0.4M"),
        steps=steps,
        every_steps=every_steps,
        fork_steps=(1_000, 1_750, 2_500),
        anneal_steps=500,
        last=10,
        stages=(1_000, 2_000, 3_000),
        stage_steps=600,
        extra_rates=(1.6e-2,),
        characters_a_document=4_000,
        corpus="corpus_small.txt.xz",
        tasks=("blimp",),
        task_items=2_010,
    )


def _gpu() -> Preset:
    a_step, steps, every_steps = 64 * 1_024, 1_200, 20
    run = RunRecipe(
        tokens=steps * a_step,
        checkpoint_every_tokens=every_steps * a_step,
        batch_sequences=64,
        micro_batch_sequences=32,
        log_every_steps=10,
        interval_means=False,
        precision="bfloat16",
        compiled=True,
    )
    with_means = replace(run, interval_means=True)
    shapes = {
        "10M": (256, 688, 6, 4, run),
        "35M": (512, 1_376, 8, 8, with_means),
        "120M": (832, 2_240, 12, 13, run),
    }
    sizes = tuple(
        _size(
            f"{family}-{label}",
            hidden=hidden,
            inner=inner,
            layers=layers,
            heads=heads,
            experts=16 if family == MIXTURE else 0,
            rates=(1e-3, 2e-3, 4e-3),
            vocabulary_tokens=16_384,
            context_tokens=1_024,
            run=how,
            warmup_steps=100,
        )
        for family in (DENSE, MIXTURE)
        for label, (hidden, inner, layers, heads, how) in shapes.items()
    )
    return Preset(
        name="gpu",
        sizes=sizes,
        middle=("dense-35M", "mixture-35M"),
        steps=steps,
        every_steps=every_steps,
        fork_steps=(400, 700, 1_000),
        anneal_steps=200,
        last=10,
        stages=(400, 800, 1_200),
        stage_steps=300,
        extra_rates=(5e-4, 8e-3),
        characters_a_document=20_000,
        corpus="corpus_large.txt.xz",
        tasks=("blimp", "lambada_test", "hellaswag_val_1k", "arc_easy_val"),
        task_items=2_010,
    )


def _toy() -> Preset:
    a_step, steps, every_steps = 4 * 64, 24, 2
    run = RunRecipe(
        tokens=steps * a_step,
        checkpoint_every_tokens=every_steps * a_step,
        batch_sequences=4,
        log_every_steps=1,
    )
    sizes = tuple(
        _size(
            f"{family}-{label}",
            hidden=hidden,
            inner=32,
            layers=1,
            heads=2,
            experts=4 if family == MIXTURE else 0,
            rates=(1e-3, 4e-3),
            vocabulary_tokens=300,
            context_tokens=64,
            run=run,
            warmup_steps=2,
        )
        for family in (DENSE, MIXTURE)
        for label, hidden in (("a", 8), ("b", 16), ("c", 24))
    )
    return Preset(
        name="toy",
        sizes=sizes,
        middle=("dense-b", "mixture-b"),
        steps=steps,
        every_steps=every_steps,
        fork_steps=(8, 14, 20),
        anneal_steps=4,
        last=3,
        stages=(8, 16, 24),
        stage_steps=6,
        extra_rates=(1.6e-2,),
        characters_a_document=640,
        corpus="corpus_small.txt.xz",
        tasks=("blimp",),
        task_items=8,
    )


PRESETS = {"cpu": _cpu(), "gpu": _gpu(), "toy": _toy()}
