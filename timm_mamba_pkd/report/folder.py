"""The report of a run: a folder of tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_mamba_pkd.files import write_file
from timm_mamba_pkd.report.plots import plot_accuracy_against_macs, plot_curves
from timm_mamba_pkd.report.table import Row, to_markdown, weak_ensembles, write_csv


def write_report(
    rows: Sequence[Row],
    metrics: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    device_name: str,
    seed: int,
) -> None:
    """Write results.csv, results.md, accuracy_macs.png and curves.png to `folder`, which is made when missing.

    Args:
        rows: at least one.
        metrics: one mapping per epoch, see `plot_curves`; when empty (nothing was trained) there is no curves.png.
            A ``verdict`` (of the progressive rule, at the end of a stage) becomes a line of results.md, as does each
            of `weak_ensembles`.
        folder: files of these names in it are replaced.
        device_name: where the latencies were measured.
        seed: of the run.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a report needs at least one row of results")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    conventions = (
        "MACs are those of one image, the selective scan included, elementwise work not; 1 MAC = 2 FLOPs. "
        f"Latency is the median at batch size 1 on {device_name}. Seed {seed}."
    )
    remarks = [f"- stage {m['stage']}, {m['student']}: {m['verdict']}" for m in metrics if "verdict" in m]
    remarks += [f"- {line}" for line in weak_ensembles(rows)]
    text = "\n".join([to_markdown(rows), conventions, *(["", *remarks] if remarks else [])])
    write_file(folder / "results.md", f"{text}\n".encode())
    plot_accuracy_against_macs(rows, folder / "accuracy_macs.png")
    if metrics:
        plot_curves(metrics, folder / "curves.png")
    write_csv(rows, folder / "results.csv")  # the last: it says that the rest is there
