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
from pma.errors import UsageError
from pma.quantities import count_text, parse_tokens

if TYPE_CHECKING:
    from pma.pretraining import Pretraining


def register_demo(app: typer.Typer) -> None:
    """Add `demo`, which the help lists first."""
    app.command("demo", short_help="The whole story in two minutes.")(command(demo))


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command("pretrain", short_help="Pre-train a recipe, or anneal a fork of a run.")(command(pretrain))


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
        str | None, typer.Option("--tokens", help="Length of the run, or of a fork's decay: 250M.")
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
    json_output: flags.Json = False,
) -> dict[str, Any]:
    """Pre-train a recipe at constant learning rate, or anneal a fork of such a run.

    RECIPE is a TOML file or one of nano-dense, nano-moe, micro-dense, micro-moe, small-dense, small-moe. The
    same command goes on where it was stopped; more --tokens make the run longer.

    Example: pma pretrain nano-dense -o run --text my_texts/

    Example: pma pretrain --fork-from run/checkpoint-1500 --anneal cosine --tokens 300K -o annealed

    Example: pma pretrain --resume-from init --skip-tokens 100K -o again
    """
    if resume_from is not None:
        if recipe is not None or text or learning_rate is not None or seed is not None:
            raise UsageError("a run that goes on keeps recipe, text, rate and seed; leave those out")
        if fork_from is not None or anneal is not None:
            raise UsageError("--resume-from goes on as the run did; --fork-from anneals: say one of them")
        made = _resumed(resume_from, out, tokens, skip_steps, skip_tokens)
    elif skip_steps is not None or skip_tokens is not None:
        raise UsageError("--skip-steps and --skip-tokens go with --resume-from; a run skips nothing itself")
    elif fork_from is not None:
        if recipe is not None or text or learning_rate is not None:
            raise UsageError(
                "a fork keeps the recipe, text and peak rate of its run; leave RECIPE and those flags out"
            )
        made = _forked(fork_from, out, anneal, tokens, seed)
    else:
        if recipe is None:
            raise UsageError("which recipe? Such as: pma pretrain nano-dense -o run")
        if anneal is not None:
            raise UsageError("--anneal goes with --fork-from: a run itself stays at constant learning rate")
        from pma.pretraining import pretrain as pretrain_recipe

        asked = overridden(recipe, tokens=tokens, learning_rate=learning_rate, seed=seed)
        with training_bar("pre-training") as bar:
            made = pretrain_recipe(asked, out, text=[str(path) for path in text or ()], progress=bar)
    if not json_output:
        added = f"{made.steps_added} steps in {made.seconds:.0f} s" if made.steps_added else "nothing to add"
        say(f"{made.checkpoint}: step {made.step}, {count_text(made.tokens)} tokens; {added}")
    return {**asdict(made), "run": str(made.run), "checkpoint": str(made.checkpoint)}


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


def overridden(name: str, *, tokens: str | None, learning_rate: float | None, seed: int | None) -> Any:
    """The recipe `name` with what the flags change."""
    from pma.pretraining import load_recipe

    recipe = load_recipe(name)
    if tokens is not None:
        recipe = replace(recipe, run=replace(recipe.run, tokens=parse_tokens(tokens)))
    if seed is not None:
        recipe = replace(recipe, run=replace(recipe.run, seed=seed))
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
