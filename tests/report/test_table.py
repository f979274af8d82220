import dataclasses
import math

import pytest

from timm_mamba_pkd.report import COLUMNS, Row, read_csv, to_markdown, to_text, write_csv, write_report

TEACHER = Row("resnet18", "teacher", None, 99.41, 11.173962, 0.556651520, 100.0, 3.25)
STUDENT = Row("mamba_pkd_s1", "student", 1, 97.1, 0.0131234, 0.0025, 0.1 + 0.2, 1 / 3)
ENSEMBLE = Row("mamba_pkd_ensemble", "ensemble", 2, 98.123456789, 1e-17, 1814.073344, 1e-5, 0.0)
ALONE = dataclasses.replace(STUDENT, model='a, "b"|c\nd', macs_pct=None)


@pytest.mark.parametrize("rows", [[], [TEACHER], [STUDENT], [ALONE], [TEACHER, STUDENT, ENSEMBLE, ALONE]])
def test_csv_round_trips_exactly(rows, tmp_path):
    write_csv(rows, tmp_path / "results.csv")
    assert read_csv(tmp_path / "results.csv") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_csv_is_what_it_says(tmp_path):
    path = tmp_path / "results.csv"
    write_csv([TEACHER, STUDENT], path)
    assert path.read_bytes().decode() == (
        "model,role,k,top1,param_count,gmacs,macs_pct,ms_per_image\n"
        "resnet18,teacher,,99.41,11.173962,0.55665152,100.0,3.25\n"
        "mamba_pkd_s1,student,1,97.1,0.0131234,0.0025,0.30000000000000004,0.3333333333333333\n"
    )


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    write_csv([TEACHER], path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_csv([STUDENT], path)
    assert read_csv(path) == [TEACHER]
    assert list(tmp_path.iterdir()) == [path]


def test_no_file_cut_short_reads_as_whole(tmp_path):
    rows = [TEACHER, STUDENT, ALONE]
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    write_csv(rows, whole)
    content = whole.read_bytes()
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        if content[:length].endswith(b"\n") and b'"' not in content[:length]:
            assert read_csv(cut) == rows[: content[:length].count(b"\n") - 1]  # whole rows only: nothing tells
        else:
            with pytest.raises(ValueError, match=r"cut\.csv"):
                read_csv(cut)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "none"),
        (b"\n", "none"),
        (b"epoch,loss\n0,1.5\n", "epoch,loss"),
        (b"\x89PNG\r\n\x1a\n", "none"),
        (",".join(COLUMNS).encode() + b"\nx,student,1,2,3,4,5\n", ",".join(COLUMNS)),
        (",".join(COLUMNS).encode() + b"\nx,student,one,2,3,4,5,6\n", ",".join(COLUMNS)),
        (",".join(COLUMNS).encode() + b"\nx,student,1,nan,3,4,5,6\n", ",".join(COLUMNS)),
        (",".join(COLUMNS).encode() + b"\n\n", ",".join(COLUMNS)),
    ],
)
def test_foreign_file_is_named_with_its_columns(content, found, tmp_path):
    path = tmp_path / "foreign.csv"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"foreign\.csv, line .* found columns {found}; expected {','.join(COLUMNS)}$"
    ):
        read_csv(path)


@pytest.mark.parametrize("column", ["top1", "param_count", "gmacs", "macs_pct", "ms_per_image"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_row_holds_nan(column, value):
    with pytest.raises(ValueError, match=f"mamba_pkd_s1: {column} is {value}"):
        dataclasses.replace(STUDENT, **{column: value})


@pytest.mark.parametrize(("role", "k"), [("teacher", 1), ("student", None), ("ensemble", None), ("student", 0)])
def test_k_fits_the_role(role, k):
    with pytest.raises(ValueError, match=f"a {role} needs"):
        dataclasses.replace(STUDENT, role=role, k=k)


def test_unknown_role():
    with pytest.raises(ValueError, match="'pupil'"):
        dataclasses.replace(STUDENT, role="pupil")


def test_markdown_rounds_for_reading():
    assert to_markdown([TEACHER, STUDENT, dataclasses.replace(ENSEMBLE, model="a|b", macs_pct=None)]) == (
        "| model | role | k | top-1 (%) | params (M) | MMACs | MACs (% of teacher) | ms/image |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| resnet18 | teacher |  | 99.41 | 11.2 | 557 | 100 | 3.25 |\n"
        "| mamba_pkd_s1 | student | 1 | 97.10 | 0.0131 | 2.50 | 0.300 | 0.333 |\n"
        "| a\\|b | ensemble | 2 | 98.12 | 0.0000000000000000100 | 1814073 |  | 0 |\n"
    )


def test_text_aligns_its_columns():
    assert to_text([TEACHER, STUDENT]) == (
        "model         role     k  top-1 (%)  params (M)  MMACs  MACs (% of teacher)  ms/image\n"
        "resnet18      teacher         99.41        11.2    557                  100      3.25\n"
        "mamba_pkd_s1  student  1      97.10      0.0131   2.50                0.300     0.333\n"
    )


def test_an_ensemble_below_an_affordable_student_is_named(tmp_path):
    def row(model: str, role: str, k: int, top1: float, gmacs: float) -> Row:
        return Row(model, role, k, top1, 0.1, gmacs, None, 1.0)

    rows = [
        TEACHER,
        row("s1", "student", 1, 90.0, 0.001),
        row("s2", "student", 2, 95.0, 0.003),
        row("s3", "student", 3, 99.0, 0.010),
        row("ensemble_1", "ensemble", 1, 90.0, 0.001),
        row("ensemble_2", "ensemble", 2, 94.0, 0.004),
        row("ensemble_3", "ensemble", 3, 99.0, 0.014),
    ]
    line = "ensemble_2 (94.00 %, 4.00 MMACs) is less accurate than s2 alone (95.00 %, 3.00 MMACs)"
    assert to_text(rows).splitlines()[8:] == [f"note: {line}"]
    assert to_text(rows[:2]).splitlines()[3:] == []
    write_report(rows, [], tmp_path, device_name="a device", seed=0)
    assert (tmp_path / "results.md").read_text().endswith(f"Seed 0.\n\n- {line}\n")
