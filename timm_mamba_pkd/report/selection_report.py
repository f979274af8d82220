"""The answer of a selection as JSON, table, plot, and one interactive HTML page that needs nothing else."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from timm_mamba_pkd.files import write_file
from timm_mamba_pkd.report.plots import plot_selection
from timm_mamba_pkd.report.selection import CONFIDENCE, COSTS, RESAMPLES, UNITS, Constraints, Table, Verdict
from timm_mamba_pkd.report.table import in_columns, significant

FILES = ("select.json", "select.html", "select.png")
_HEADINGS = ("model", "kind", "top-1 (%)", f"{100 * CONFIDENCE:g} % interval", "MMACs", "params (M)", "memory (MiB)")
_HEADINGS = (*_HEADINGS, "ms/image")


def describe_selection(
    table: Table, constraints: Constraints, how: Mapping[str, str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The answer as plain data, which is what select.json holds.

    Args:
        table: of all candidates.
        constraints: to keep.
        how: for each candidate by name, the command or the YAML that runs it.
        about: more to record: "samples_of", where the samples are from, and "notes", lines of text, are shown.

    Returns:
        ``candidates``, the cheapest first, each with its measurements, "status" and "reason"; "pareto" and "same_as"
        (positions of the cheaper ones that predict the same) are what other constraints need; "against_best" is the
        interval of its accuracy minus that of ``most_accurate`` on the front. ``front`` are names, the cheapest first,
        ``nearest_miss`` is a name with the constraints it breaks, or None.
    """
    selection = table.select(constraints)
    order = table.by_cost
    position = {i: n for n, i in enumerate(order)}
    best = max(selection.front, key=lambda i: table.accuracies[i], default=None)
    candidates = []
    for i in order:
        candidate, verdict = table.candidates[i], selection.verdicts[i]
        candidates.append(
            {
                "name": candidate.name,
                "kind": candidate.kind,
                "accuracy": table.accuracies[i],
                "interval": list(table.intervals[i]),
                **{cost: getattr(candidate, cost) for cost in COSTS},
                "status": verdict.status,
                "reason": _reason(table, i, verdict),
                "against_best": None if best is None else list(table.difference(i, best)),
                "pareto": table.pareto[i],
                "same_as": [position[j] for j in table.same_as[i]],
                "how": how[candidate.name],
            }
        )
    nearest = selection.nearest
    return {
        **about,
        "samples": len(table.targets),
        "constraints": constraints.given(),
        "min_disagreement": table.min_disagreement,
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": table.seed},
        "units": UNITS,
        "front": [table.candidates[i].name for i in selection.front],
        "most_accurate": None if best is None else table.candidates[best].name,
        "nearest_miss": None
        if nearest is None
        else {
            "name": table.candidates[nearest].name,
            "violations": [vars(violation) for violation in selection.verdicts[nearest].violations],
        },
        "candidates": candidates,
    }


def _reason(table: Table, i: int, verdict: Verdict) -> str:
    if verdict.because is None:
        return "; ".join(map(str, verdict.violations))
    other = table.candidates[verdict.because].name
    if verdict.status == "dominated":
        return f"{other} is as good or better in everything"
    return f"predicts as {other}, which is cheaper, on all but {table.disagreement(i, verdict.because):.3g} %"


def selection_to_text(document: Mapping[str, Any]) -> str:
    """The answer for a terminal: the front, how to run it, and who was dropped and why."""
    candidates = {candidate["name"]: candidate for candidate in document["candidates"]}
    lines = [f"{len(candidates)} candidates on {document['samples']} samples of {document.get('samples_of', 'data')}"]
    lines += document.get("notes", [])
    shown = [candidates[name] for name in document["front"]]
    lines += ["", "To choose from, the cheapest first:"]
    if not shown:
        shown = [candidates[document["nearest_miss"]["name"]]]
        lines[-1] = "Nothing keeps the constraints. The nearest miss:"
    lines += [in_columns([_HEADINGS, *map(_cells, shown)]).rstrip("\n")]
    dropped = [candidate for candidate in candidates.values() if candidate["status"] != "front"]
    if dropped:
        table = in_columns([_HEADINGS, *map(_cells, dropped)]).splitlines()
        reasons = ["why not", *(candidate["reason"] for candidate in dropped)]
        lines += ["", "Dropped:", *(f"{line}  {reason}" for line, reason in zip(table, reasons, strict=True))]
    lines += ["", "To run:" if document["front"] else "To run the nearest miss:"]
    lines += [line for candidate in shown for line in (f"{candidate['name']}:", _indented(candidate["how"]))]
    return "\n".join(lines) + "\n"


def _cells(candidate: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = candidate["interval"]
    return (
        candidate["name"],
        candidate["kind"],
        f"{candidate['accuracy']:.2f}",
        f"{low:.2f} to {high:.2f}",
        *(significant(candidate[cost]) for cost in COSTS),
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def selection_to_html(document: Mapping[str, Any]) -> str:
    """A page with the answer, in which constraints and the axis can be changed. What it holds is text, never markup."""
    data = json.dumps(document)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    template = (files("timm_mamba_pkd.report") / "selection.html").read_text(encoding="utf-8")
    return template.replace("$DATA", data)


def write_selection(document: Mapping[str, Any], folder: Path) -> None:
    """Write `FILES` to a folder that exists; the plot only where matplotlib is installed."""
    plot_selection(document, folder / "select.png")
    write_file(folder / "select.html", selection_to_html(document).encode())
    write_file(folder / "select.json", f"{json.dumps(document, indent=2)}\n".encode())
