"""Reports: what a model costs, tables of results, and plots."""

from timm_mamba_pkd.report.calibration_report import calibration_to_markdown, calibration_to_text, plot_calibration
from timm_mamba_pkd.report.cost import count_params, measure_latency, measure_peak_memory, median_time
from timm_mamba_pkd.report.folder import write_report
from timm_mamba_pkd.report.metrics import read_metrics
from timm_mamba_pkd.report.plots import plot_accuracy_against_macs, plot_curves, plot_selection
from timm_mamba_pkd.report.selection import Candidate, Constraints, Selection, Table, Verdict, Violation
from timm_mamba_pkd.report.selection_report import (
    describe_selection,
    selection_to_html,
    selection_to_text,
    write_selection,
)
from timm_mamba_pkd.report.table import COLUMNS, Row, read_csv, to_markdown, to_text, write_csv

__all__ = [
    "COLUMNS",
    "Candidate",
    "Constraints",
    "Row",
    "Selection",
    "Table",
    "Verdict",
    "Violation",
    "calibration_to_markdown",
    "calibration_to_text",
    "count_params",
    "describe_selection",
    "measure_latency",
    "measure_peak_memory",
    "median_time",
    "plot_accuracy_against_macs",
    "plot_calibration",
    "plot_curves",
    "plot_selection",
    "read_csv",
    "read_metrics",
    "selection_to_html",
    "selection_to_text",
    "to_markdown",
    "to_text",
    "write_csv",
    "write_report",
    "write_selection",
]
