"""A look around a merge in words, for people on a terminal and for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pma.errors import FormatError, printable
from pma.quantities import count_text

Plain = Mapping[str, Any]


def look_words(look: Plain) -> list[str]:
    """All of it, a paragraph a part. `look`: as `Look.to_json` tells it."""
    said = [text_words(look), *line_words(look)]
    if look["bending"] is not None:
        said.append(bending_words(look))
    if look["contours"] is not None:
        said.append(plane_words(look))
    if look["experts"] is not None:
        said.append(experts_words(look))
    return [*said, *missing_words(look)]


@contextmanager
def reading(store: Path) -> Iterator[None]:
    """What goes wrong with a look that was kept, as FormatError: a store is a file like any other."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FormatError(
            f"{store} holds a look that cannot be read ({printable(repr(error))}); remove the file, and pma "
            "diagnose --text makes it again"
        ) from error


def line_table(look: Plain) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each place on the line, on the half that is reported on."""
    rows = [
        [f"{place['t']:g}", shown(place["loss"], ""), "" if place["gain"] is None else shown(place["gain"])]
        for place in look["line"]["places"]
    ]
    return ["t", "loss (nats a token)", "below last by"], rows


def text_words(look: Plain) -> str:
    """The window and the text."""
    text, steps = look["text"], look["steps"]
    where = "" if None in (steps[0], steps[-1]) else f", steps {steps[0]:,} to {steps[-1]:,}"
    cut = text["cut_characters"]
    read = f"{text['documents']} of {text['given']} documents" + (
        "" if cut is None else f", the first {cut:,} characters of each"
    )
    others = text["documents"] - text["choosing_documents"]
    return (
        f"Merge of {len(steps)} checkpoints{where}. Text: {read}; {count_text(text['tokens'])} tokens, in "
        f"windows of {text['context_tokens']:,}. {text['choosing_documents']} documents are to choose by; "
        f"losses and gains are of the other {others}, in nats a token."
    )


def line_words(look: Plain) -> list[str]:
    """What the line tells: the merge's gain, and whether a step beyond (or short of) it is advised."""
    line, best = look["line"], look["best"]
    (merge,) = [place for place in line["places"] if place["t"] == 1]
    said = [f"The merge's loss is {merge['loss']['value']:.4f}: {_below(merge['gain'], 'last')}"]
    if not best["is_last"] and best["step"] is not None:
        whose = f"that of the best single checkpoint (step {best['step']:,})"
        said[0] += f", {_below(best['merge_below'], whose)}"
    said[0] += "."
    if line["t"] != 1:
        said.append(
            f"Advised: {_place(line['t'])}, chosen by the other half. Its loss is "
            f"{line['loss']['value']:.4f}: {_below(line['gain_over_merge'], 'the merge')}"
        )
        said[-1] += "." if line["t"] == 0 else f", {_below(line['gain'], 'last')}."
        over = {"the merge": line["gain_over_merge"]} | ({} if line["t"] == 0 else {"last": line["gain"]})
        unsure = [whose for whose, gain in over.items() if gain["low"] <= 0]
        if unsure:
            said[-1] += f" That it is better than {' and '.join(unsure)} is not confirmed."
    elif line["ahead"] is None:
        said.append("Advised: the merge. By the half to choose by, no other place on the line is better.")
    else:
        said.append(
            f"Advised: the merge. By the half to choose by the loss is lowest at {_place(line['lowest_t'])}, "
            "but not by more than chance can do among so many places."
        )
    if line["at_the_edge"]:
        said.append("That is the end of what was evaluated; of what lies beyond, nothing is told.")
    return said


def bending_words(look: Plain) -> str:
    """Whether slope and curvature explain the gain."""
    bending, best = look["bending"], look["bending"]["best_t"]
    where = "Along the line the loss does not curve upwards at the merge."
    if best is not None:
        where = f"Their parabola is lowest at t = {best:.2f}."
    return (
        f"By slope and curvature at the merge its loss is {_below(bending['predicted'], 'last')}; measured "
        f"on the same {count_text(bending['tokens'])} tokens, {_below(bending['measured'], 'last')}. {where}"
    )


def plane_words(look: Plain) -> str:
    """What the plane goes through, and where it is lowest."""
    plane = look["contours"]
    lowest = "Its lowest point is not on the part that was evaluated."
    if plane["lowest"] is not None:
        away, last = _length(plane["lowest"]), plane["checkpoints"][-1]["x"]
        lowest = f"Its lowest point is {away:.3g} from the merge, and last is {last:.3g}."
    return (
        f"The plane goes through the merge, last and {plane['third']}; {count_text(plane['tokens'])} tokens. "
        f"{lowest}"
    )


def experts_words(look: Plain) -> str:
    """Whether the merge sends tokens where last does."""
    experts = look["experts"]
    merge, neighbour, more = experts["merge"]["mean"], experts["neighbour"]["mean"], experts["more"]
    return (
        f"Last and merge send a token to the same experts in {merge['value']:.1%} of its choices, last and "
        f"its neighbour in the window in {neighbour['value']:.1%}: {100 * more['value']:+.1f} ± "
        f"{100 * more['standard_error']:.1f} points; chance is {experts['top'] / experts['experts']:.0%}."
    )


def missing_words(look: Plain) -> list[str]:
    """What is not there, and why."""
    names = {"bending": "Slopes and curvatures", "contours": "The plane", "experts": "Routing"}
    return [f"{names[name]} left out: {why}." for name, why in look["left_out"].items()]


def shown(estimate: Plain, sign: str = "+") -> str:
    """With its standard error."""
    return f"{estimate['value']:{sign}.4f} ± {estimate['standard_error']:.4f}"


def _place(t: float) -> str:
    return "last itself" if t == 0 else f"t = {t:g} on the line from last (0) through the merge (1)"


def _below(estimate: Plain, whose: str) -> str:
    value, error = estimate["value"], estimate["standard_error"]
    return f"{abs(value):.4f} ± {error:.4f} {'below' if value >= 0 else 'above'} {whose}"


def _length(at: Sequence[float]) -> float:
    return float((at[0] ** 2 + at[1] ** 2) ** 0.5)
