"""`pma demo` and `pma pretrain`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pma.cli import options as flags
from pma.cli.output import command, note, progress, say
from pma.cli.starts import check_flags
from pma.errors import UsageError
from pma.quantities import count_text, parse_tokens

if TYPE_CHECKING:
    from pma.pretraining import Pretraining


def register_demo(app: typer.Typer) -> None:
    """Add `demo`, which the help lists first."""
    app.command("demo", short_help="The whole story in two minutes.")(command(demo))


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command(
        "pretrain", short_help="Pre-train a recipe, anneal a fork of a run, or train on from weights."
    )(command(pretrain))


Output = Annotated[Path, typer.Option("--out", "-o", help="The folder.", show_default=False)]


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder it all goes to.")] = Path("demo"),
    moe: Annotated[
        bool, typer.Option("--moe", help="A mixture of experts instead of a dense model.")
    ] = False,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """The whole story in minutes: pre-train a small model, merge its checkpoints, anneal a fork, evaluate,
    report.

    Needs no data and no network. The same command goes on where it was stopped.

    Example: pma demo -o demo
    """
    from pma.cli.comparison import show_comparison
    from pma.demo import run_demo

    result = run_demo(out, mixture_of_experts=moe, say=note, bar=training_bar)
    if not json_output:
        show_comparison(result["comparison"])
        say()
        say(f"Report: {result['report']}")
    return result


def pretrain(
    out: Output,
    recipe: Annotated[
        str | None, typer.Argument(help="A built-in recipe or a TOML file.", show_default=False)
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="Training text: files or folders, also .xz; a file is a document. Default: embedded.",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", help="Length of the run, of a fork's decay, or of a stage: 250M."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Instead of the recipe's.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Initial weights and order of the data.")] = None,
    fork_from: Annotated[
        Path | None, typer.Option("--fork-from", help="Anneal from this checkpoint.")
    ] = None,
    anneal: Annotated[
        str | None, typer.Option("--anneal", help="cosine, linear or 1-sqrt; with --fork-from.")
    ] = None,
    resume_from: Annotated[
        Path | None,
        typer.Option("--resume-from", help="Go on from this checkpoint in a new run: one of pma init."),
    ] = None,
    skip_steps: Annotated[
        int | None, typer.Option("--skip-steps", min=0, help="With --resume-from: leave their data out.")
    ] = None,
    skip_tokens: Annotated[
        str | None, typer.Option("--skip-tokens", help="The same in tokens: 300K.")
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option("--start-from", help="A later stage from these weights: checkpoint, or merge of a run."),
    ] = None,
    instructions: Annotated[
        list[Path] | None,
        typer.Option("--instructions", help="JSONL rows {prompt, response}, also .xz, to fine-tune on."),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Length of a stage, instead of --tokens.")
    ] = None,
    final_learning_rate: Annotated[
        float | None,
        typer.Option("--final-learning-rate", help="Of a stage, at its end. Default: a tenth of the peak."),
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option("--warmup-steps", min=0, help="Of a stage. Default: as its run had.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="Of a stage: cosine, linear or constant. Default: cosine."),
    ] = None,
    checkpoint_every: Annotated[
        str | None,
        typer.Option("--checkpoint-every", help="Tokens between a stage's checkpoints: 100K."),
    ] = None,
    no_interval_means: Annotated[
        bool,
        typer.Option(
            "--no-interval-means",
            help="Do not store the mean of all steps since the last checkpoint beside each.",
        ),
    ] = False,
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Pre-train a recipe at constant learning rate, anneal a fork of such a run, or train a later stage.

    RECIPE is a TOML file or one of nano-dense, nano-moe, micro-dense, micro-moe, small-dense, small-moe. The
    same command goes on where it was stopped; more --tokens make the run longer.

    Example: pma pretrain nano-dense -o run --text my_texts/

    Example: pma pretrain --fork-from run/checkpoint-1500 --anneal cosine --tokens 300K -o annealed

    Example: pma pretrain --resume-from init --skip-tokens 100K -o again

    Example: pma pretrain --start-from merged --text maths/ --tokens 600K --learning-rate 1e-3 -o new

    Example: pma pretrain --start-from merged --instructions sft.jsonl --epochs 2 --learning-rate 1e-3 -o new
    """
    stage: dict[str, Any] = {
        "instructions": [str(path) for path in instructions or ()] or None,
        "epochs": epochs,
        "final_learning_rate": final_learning_rate,
        "warmup_steps": warmup_steps,
        "schedule": schedule,
        "checkpoint_every": None if checkpoint_every is None else parse_tokens(checkpoint_every),
    }
    starts = {"--start-from": start_from, "--fork-from": fork_from, "--resume-from": resume_from}
    values = {
        "RECIPE": recipe,
        "--text": text or None,
        "--tokens": tokens,
        "--learning-rate": learning_rate,
        "--seed": seed,
        "--anneal": anneal,
        "--skip-steps": skip_steps,
        "--skip-tokens": skip_tokens,
        "--no-interval-means": no_interval_means or None,
        **{f"--{name.replace('_', '-')}": value for name, value in stage.items()},
    }
    check_flags(starts, [flag for flag, value in values.items() if value is not None])
    texts = [str(path) for path in text or ()]
    if start_from is not None:
        means = False if no_interval_means else None
        more = {**stage, "text": texts, "seed": seed, "interval_means": means}
        made = _stage(start_from, out, tokens, learning_rate, more)
    elif resume_from is not None:
        made = _resumed(resume_from, out, tokens, skip_steps, skip_tokens)
    elif fork_from is not None:
        made = _forked(fork_from, out, anneal, tokens, seed)
    else:
        asked = overridden(
            recipe or "",
            tokens=tokens,
            learning_rate=learning_rate,
            seed=seed,
            no_interval_means=no_interval_means,
        )
        from pma.pretraining import pretrain as pretrain_recipe

        with training_bar("pre-training") as bar:
            made = pretrain_recipe(asked, out, text=texts, progress=bar)
    if not json_output:
        added = f"{made.steps_added} steps in {made.seconds:.0f} s" if made.steps_added else "nothing to add"
        say(f"{made.checkpoint}: step {made.step}, {count_text(made.tokens)} tokens; {added}")
        for line in made.notes:
            say(line)
    return {**asdict(made), "run": str(made.run), "checkpoint": str(made.checkpoint)}


def _stage(
    checkpoint: Path, out: Path, tokens: str | None, learning_rate: float | None, how: dict[str, Any]
) -> Pretraining:
    from pma.pretraining import further

    if learning_rate is None:
        raise UsageError("--start-from also needs --learning-rate, the highest of the stage")
    how = {name: value for name, value in how.items() if value is not None}
    length = None if tokens is None else parse_tokens(tokens)
    with training_bar("training") as bar:
        return further(checkpoint, out, tokens=length, learning_rate=learning_rate, progress=bar, **how)


def _forked(
    checkpoint: Path, out: Path, anneal: str | None, tokens: str | None, seed: int | None
) -> Pretraining:
    from pma.pretraining import fork

    missing = [flag for flag, value in (("--anneal", anneal), ("--tokens", tokens)) if value is None]
    if anneal is None or tokens is None:
        raise UsageError(
            f"--fork-from also needs {' and '.join(missing)}, such as --anneal cosine --tokens 300K: the "
            "shape and the length of the decay"
        )
    with training_bar("annealing") as bar:
        return fork(checkpoint, out, anneal=anneal, tokens=parse_tokens(tokens), seed=seed, progress=bar)


def _resumed(
    checkpoint: Path, out: Path, tokens: str | None, skip_steps: int | None, skip_tokens: str | None
) -> Pretraining:
    from pma.pretraining import resume

    skipped = _steps_to_skip(checkpoint, skip_steps, skip_tokens)
    length = None if tokens is None else parse_tokens(tokens)
    with training_bar("pre-training") as bar:
        return resume(checkpoint, out, tokens=length, skip_steps=skipped, progress=bar)


def _steps_to_skip(checkpoint: Path, steps: int | None, tokens: str | None) -> int:
    """As steps of the run that `checkpoint` comes from; tokens are rounded up to whole ones."""
    if tokens is None:
        return steps or 0
    if steps is not None:
        raise UsageError("--skip-steps and --skip-tokens say the same; give one of them")
    from pma.pretraining.run_folder import read_record, run_of

    return int(read_record(run_of(checkpoint)).recipe.steps_for(parse_tokens(tokens)))


def overridden(
    name: str,
    *,
    tokens: str | None,
    learning_rate: float | None,
    seed: int | None,
    no_interval_means: bool = False,
) -> Any:
    """The recipe `name` with what the flags change."""
    from pma.pretraining import load_recipe

    recipe = load_recipe(name)
    if tokens is not None:
        recipe = replace(recipe, run=replace(recipe.run, tokens=parse_tokens(tokens)))
    if seed is not None:
        recipe = replace(recipe, run=replace(recipe.run, seed=seed))
    if no_interval_means:
        recipe = replace(recipe, run=replace(recipe.run, interval_means=False))
    if learning_rate is not None:
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=learning_rate))
    return recipe


@contextmanager
def training_bar(title: str) -> Iterator[Callable[[int, int, float | None], None]]:
    """A bar for training: called with the step, the last step and the newest loss."""
    with progress(title, 1) as show:

        def report(step: int, last_step: int, loss: float | None) -> None:
            words = f"step {step} of {last_step}" + (f", loss {loss:.3f}" if loss is not None else "")
            show(step / last_step, words)

        yield report
