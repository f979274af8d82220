"""The table of results: one row per model, as CSV (exact), Markdown and plain text (rounded)."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from timm_mamba_pkd.files import write_file


@dataclass(frozen=True)
class Row:
    """One model's result.

    Attributes:
        model: its name.
        role: "teacher", "student" or "ensemble".
        k: a student's position 1..N, an ensemble's number of students, None for the teacher.
        top1: accuracy in percent.
        param_count: millions of parameters, as in timm's results tables.
        gmacs: 1e9 multiply-accumulates per image.
        macs_pct: percent of the teacher's multiply-accumulates; None without a teacher.
        ms_per_image: latency at batch size 1, in milliseconds.

    Raises:
        ValueError: a role of another name, a `k` that does not fit the role, or a number that is NaN or infinite.
    """

    model: str
    role: str
    k: int | None
    top1: float
    param_count: float
    gmacs: float
    macs_pct: float | None
    ms_per_image: float

    def __post_init__(self):
        if self.role not in ("teacher", "student", "ensemble"):
            raise ValueError(f"{self.model}: role is {self.role!r}, not 'teacher', 'student' or 'ensemble'")
        if (self.k is None) != (self.role == "teacher") or (self.k is not None and self.k < 1):
            raise ValueError(f"{self.model}: k is {self.k!r}; a {self.role} needs {_K_OF_ROLE[self.role]}")
        for name in _FLOAT_COLUMNS:
            value = getattr(self, name)
            if not (name == "macs_pct" and value is None) and not math.isfinite(value):
                raise ValueError(f"{self.model}: {name} is {value}, not a finite number")


COLUMNS = tuple(field.name for field in fields(Row))
_FLOAT_COLUMNS = COLUMNS[3:]
_K_OF_ROLE = {"teacher": "None", "student": "its position from 1", "ensemble": "its number of students"}


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write `rows` in full precision: `read_csv` gives back equal rows. The file is replaced in one step.

    The columns are `COLUMNS`; None is an empty cell. The folder must exist.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        model, role, k, *numbers = astuple(row)
        writer.writerow([model, role, k, *("" if number is None else repr(float(number)) for number in numbers)])
    write_file(path, text.getvalue().encode())


def read_csv(path: str | Path) -> list[Row]:
    """Read what `write_csv` wrote.

    Raises:
        ValueError: the file has other columns, a line that is no row, or was cut short. The message names the file,
            the columns found, and those expected.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    found: list[str] = []
    line = 1
    try:
        # strict: a quoted cell that never ends is an error
        reader = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
        found = next(reader, [])
        if tuple(found) != COLUMNS:
            raise ValueError("other columns")
        rows = []
        for cells in reader:
            line = reader.line_num
            rows.append(_parse(cells))
        if not content.endswith(b"\n"):
            raise ValueError("the last line has no end: the file was cut short")
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}, line {line}: {error}. Not a table of results: found columns {','.join(found) or 'none'}; "
            f"expected {','.join(COLUMNS)}"
        ) from error
    return rows


def _parse(cells: list[str]) -> Row:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells instead of {len(COLUMNS)}")
    model, role, k, top1, param_count, gmacs, macs_pct, ms_per_image = cells
    return Row(
        model,
        role,
        int(k) if k else None,
        float(top1),
        float(param_count),
        float(gmacs),
        float(macs_pct) if macs_pct else None,
        float(ms_per_image),
    )


_HEADINGS = ("model", "role", "k", "top-1 (%)", "params (M)", "MMACs", "MACs (% of teacher)", "ms/image")


def to_markdown(rows: Sequence[Row]) -> str:
    """Render `rows` as a GitHub table, rounded for reading, ending in a newline."""
    return in_markdown([_HEADINGS, *(_rounded(row) for row in rows)])


def to_text(rows: Sequence[Row]) -> str:
    """Render `rows` in aligned columns for a terminal, rounded for reading, then `weak_ensembles`."""
    table = in_columns([_HEADINGS, *(_rounded(row) for row in rows)])
    return table + "".join(f"note: {line}\n" for line in weak_ensembles(rows))


def weak_ensembles(rows: Sequence[Row]) -> list[str]:
    """One line for each ensemble that is less accurate than a student alone that costs no more."""
    lines = []
    for ensemble in (row for row in rows if row.role == "ensemble"):
        affordable = [row for row in rows if row.role == "student" and row.gmacs <= ensemble.gmacs]
        best = max(affordable, key=lambda row: row.top1, default=ensemble)
        if best.top1 > ensemble.top1:
            weak, strong = (f"({row.top1:.2f} %, {significant(1000 * row.gmacs)} MMACs)" for row in (ensemble, best))
            lines.append(f"{ensemble.model} {weak} is less accurate than {best.model} alone {strong}")
    return lines


def in_markdown(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the headings first, two names on the left and then numbers, as a GitHub table."""
    headings, *body = ([cell.replace("|", "\\|") for cell in cells] for cells in table)
    names_left_numbers_right = ["---", "---", *["---:"] * (len(headings) - 2)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [headings, names_left_numbers_right, *body])


def in_columns(table: Sequence[Sequence[str]]) -> str:
    """Align the cells of rows, two names on the left and then numbers, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        names = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        lines.append("  ".join(names + numbers) + "\n")
    return "".join(lines)


def _rounded(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.role,
        "" if row.k is None else str(row.k),
        f"{row.top1:.2f}",
        significant(row.param_count),
        significant(1000 * row.gmacs),
        "" if row.macs_pct is None else significant(row.macs_pct),
        significant(row.ms_per_image),
    )


def significant(value: float) -> str:
    """Round to three significant digits, never to exponents: 0.0131, 2.5 as 2.50, 556, 1814."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(decimals, 0)}f}"
