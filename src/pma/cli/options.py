"""Flags that several commands share, and how they become values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pma.cli.output import note
from pma.engine import SNAPSHOTS, MergeOptions
from pma.engine.memory_budget import DEFAULT_MEMORY_BYTES
from pma.errors import UsageError
from pma.quantities import parse_bytes, parse_distance
from pma.remote import location
from pma.trajectory import Window
from pma.types import DType
from pma.verbs import Choice

if TYPE_CHECKING:
    from pma.evaluation.tasks import Task

Sources = Annotated[
    list[Path],
    typer.Argument(
        parser=location,
        metavar="RUN… | CHECKPOINT…",
        help="Runs, or checkpoints one by one; also URLs.",
        show_default=False,
    ),
]
Last = Annotated[int | None, typer.Option("--last", metavar="N", help="Average the newest N checkpoints.")]
Every = Annotated[
    str | None,
    typer.Option("--every", metavar="V", help="Distance between them: 8B (tokens) or 400 (steps)."),
]
At = Annotated[int | None, typer.Option("--at", metavar="STEP", help="End the window at this step.")]
UsePreset = Annotated[bool, typer.Option("--preset", help="The paper's window for a model of this size.")]
SchemeName = Annotated[
    str,
    typer.Option(
        "--scheme",
        help="sma, wma, ema:A, ema-normalized:A, or a decay: linear, cosine, 1-sqrt, each also :FLOOR.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="W,W,…", help="Given weights, oldest first, instead of a scheme."),
]
OutputDType = Annotated[
    str | None, typer.Option("--dtype", help="Type of averaged tensors: bfloat16, float16, float32, float64.")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Leave out tensors, e.g. '*.bias'.")
]
Copy = Annotated[
    list[str] | None,
    typer.Option("--copy", metavar="PATTERN", help="Take tensors from the newest checkpoint instead."),
]
WithOptimizer = Annotated[
    bool, typer.Option("--with-optimizer", help="Carry training state of the newest, average fp32 masters.")
]
Pattern = Annotated[
    str | None,
    typer.Option("--pattern", metavar="REGEX", help=r"Names of checkpoints, such as 'ckpt_(?P<step>\d+)'."),
]
To = Annotated[
    str | None,
    typer.Option("--to", metavar="FORMAT", help="The output's format, such as hf, if another."),
]
Like = Annotated[
    Path | None,
    typer.Option(
        "--like", parser=location, metavar="FOLDER", help="Become the Hugging Face model that lies there."
    ),
]
MapName = Annotated[
    str | None, typer.Option("--map", metavar="MAP", help="How: a built-in map, or a file of your own.")
]
Use = Annotated[
    str,
    typer.Option(
        "--use",
        metavar="WHAT",
        help="Average the checkpoints (snapshots), or the interval-means stored beside them.",
    ),
]
AsGiven = Annotated[
    bool, typer.Option("--as-given", help="Checkpoints are named oldest first; do not order by step.")
]
MixedPhases = Annotated[
    bool, typer.Option("--allow-mixed-phases", help="Average across warmup, stable and decay.")
]
Nonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Go on where a source holds NaN or infinity.")
]
Staging = Annotated[
    Path | None,
    typer.Option(
        "--staging",
        metavar="DIR",
        help="Where an output for a store is built; the temporary folder by default.",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on with an attempt.")]
BreakLock = Annotated[
    bool, typer.Option("--break-lock", help="Take over from a process on another host that is gone for good.")
]
MeasureRoofline = Annotated[
    bool, typer.Option("--measure-roofline", help="First time plain reads and writes of a sample.")
]
Nodes = Annotated[
    int | None, typer.Option("--nodes", metavar="N", min=1, help="Predict the time on N nodes.")
]
ReadRate = Annotated[
    str, typer.Option("--read", metavar="RATE", help="With --nodes: what each node reads, such as 5GB/s.")
]
WriteRate = Annotated[
    str, typer.Option("--write", metavar="RATE", help="With --nodes: what each node writes.")
]
Threads = Annotated[int, typer.Option("--threads", help="Workers that read and average.")]
Memory = Annotated[str, typer.Option("--memory", help="Budget for buffers, such as 256MiB.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks", metavar="TASK,…", help="Tasks of lm-evaluation-harness, .jsonl files, or folders of them."
    ),
]
Cloze = Annotated[int, typer.Option("--cloze", min=0, help="Number of cloze items; 0 for none.")]
Context = Annotated[
    int | None, typer.Option("--context", min=2, help="Tokens the model looks at; its own by default.")
]
TaskLimit = Annotated[
    int | None, typer.Option("--limit", min=2, help="With --tasks: at most so many items of each.")
]
TaskWeights = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="TASK=W,…", help="With --tasks: weights of the mean; equal by default."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

DEFAULT_MEMORY = f"{DEFAULT_MEMORY_BYTES // 2**20}MiB"
_DTYPES = {"float16": DType.F16, "bfloat16": DType.BF16, "float32": DType.F32, "float64": DType.F64}
_DTYPES |= {"fp16": DType.F16, "bf16": DType.BF16, "fp32": DType.F32, "fp64": DType.F64}


def dtype_name(dtype: DType) -> str:
    """What `--dtype` calls it."""
    return next(name for name, known in _DTYPES.items() if known is dtype)


def choice(
    sources: list[Path],
    *,
    last: int | None,
    every: str | None,
    at: int | None,
    preset: bool,
    as_given: bool = False,
    pattern: str | None = None,
    allow_mixed_phases: bool = False,
) -> Choice:
    """The checkpoints that the flags name. Raises UsageError for flags that do not go together."""
    distance = parse_distance(every) if every is not None else None
    if last is None and every is not None:
        raise UsageError("--every needs --last: how many checkpoints, so far apart?")
    if last is not None and preset:
        raise UsageError("--preset chooses --last and --every itself; give one or the other")
    window = Window(last=last, every=distance, at=at) if last is not None else None
    return Choice(
        paths=tuple(sources),
        window=window,
        preset=preset,
        at=at if window is None else None,
        as_given=as_given,
        pattern=pattern,
        allow_mixed_phases=allow_mixed_phases,
    )


@contextmanager
def prepared_tasks(
    specs: list[str] | None, limit: int | None, weights: str | None
) -> Iterator[tuple[list[Task], dict[str, float]]]:
    """The tasks that the flags name, for the block, and their weights. Says which files were left out."""
    if not specs:
        yield [], {}
        return
    from pma.evaluation.tasks import prepared, task_weights

    split = [part for spec in specs for part in ([spec] if Path(spec).exists() else spec.split(","))]
    with prepared(split, limit) as (tasks, left_out):
        for path, reason in left_out:
            note(f"left out: {path}: {reason}")
        yield tasks, task_weights([task.name for task in tasks], weights)


def merge_options(
    scheme: str,
    weights: str | None = None,
    dtype: str | None = None,
    exclude: list[str] | None = None,
    copy: list[str] | None = None,
    *,
    with_optimizer: bool = False,
    to: str | None = None,
    like: Path | None = None,
    map_name: str | None = None,
    use: str = SNAPSHOTS,
    allow_nonfinite: bool = False,
    threads: int = 2,
    memory: str = DEFAULT_MEMORY,
) -> MergeOptions:
    """The flags as `MergeOptions`."""
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known; there are bfloat16, float16, float32, float64")
    try:
        values = tuple(float(part) for part in weights.split(",")) if weights is not None else None
    except ValueError:
        raise UsageError(
            f"--weights {weights!r}: expected numbers separated by commas, such as 0.2,0.3,0.5"
        ) from None
    return MergeOptions(
        scheme=scheme,
        weights=values,
        dtype=_DTYPES[dtype] if dtype else None,
        exclude=tuple(exclude or ()),
        copy=tuple(copy or ()),
        with_optimizer=with_optimizer,
        to=to,
        like=like,
        map=map_name,
        use=use,
        allow_nonfinite=allow_nonfinite,
        threads=threads,
        memory_bytes=parse_bytes(memory),
    )
