"""The text of a config: what is refused before it is loaded, and where everything stands."""

import re
from pathlib import Path

import pytest

from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.source import Source


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes) -> Source:
        path = tmp_path / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Source.read(path)

    return read


def lines_of(error: pytest.ExceptionInfo[ConfigError], path: Path) -> list[str]:
    return [line.removeprefix(f"config {path}, ") for line in str(error.value).splitlines()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("models:\n\tkey: x\n", "line 2: not valid YAML: a tab where YAML wants spaces"),
        ("models:\n  a: 1\n\tkey: x\n", "line 3: not valid YAML: a tab where YAML wants spaces"),
        ("a:\tb\n", "line 1: not valid YAML: a tab where YAML wants spaces"),
        ("a: 1\nb: [1, 2\n", "line 3: not valid YAML: expected ',' or ']', but got '<stream end>' "
         "(while parsing a flow sequence)"),
        ("a: 1\nb: *x\n", "line 2: not valid YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML: but found another document "
         "(expected a single document in the stream)"),
        ("- 1\n- 2\n", "line 1: must be a mapping with datasets, models, train and test, not a list"),
        ("", "line 1: must be a mapping with datasets, models, train and test, not an empty file"),
        ("just text\n", "line 1: must be a mapping with datasets, models, train and test, not 'just text'"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4: duplicate key 'c': it is already on line 3"),
        ("a: {c: 1, c: 2}\n", "line 1: duplicate key 'c': it is already on line 1"),
        ("a:\n  lr: 1e-4\n", "line 2: YAML takes 1e-4 for text; write the number with a dot and a signed exponent, "
         "as in 1.0e-4"),
        ("a: [-1E5]\n", "line 1: YAML takes -1E5 for text; "),
        ("a: 1.5e3\n", "line 1: YAML takes 1.5e3 for text; "),
        ("a: &lr 1e-4\n", "line 1: YAML takes 1e-4 for text; "),
    ],
)  # fmt: skip
def test_one_line_with_its_number(content, message, read, tmp_path):
    with pytest.raises(ConfigError) as error:
        read(content)
    (line,) = lines_of(error, tmp_path / "config.yaml")
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: \xff\xfe", "is not text in UTF-8"), ("a: \x07", "is not valid YAML: unacceptable character")],
)
def test_unreadable_text(content, message, read):
    with pytest.raises(ConfigError, match=rf"config .*config\.yaml {message}"):
        read(content)


def test_all_that_is_wrong_at_once(read, tmp_path):
    with pytest.raises(ConfigError) as error:
        read("b: &b {c: 1}\na: 1e4\nb: *b\nc: [*b, 2e4]\n")
    starts = [re.sub(r":.*", "", line) for line in lines_of(error, tmp_path / "config.yaml")]
    assert starts == ["line 2", "line 3", "line 4"]


@pytest.mark.parametrize("text", ["1.0e-4", "'1e-4'", '"1e-4"', "!!str 1e-4", "&x !!str 1e-4", "0x1e4", "12e", "v1e4"])
def test_other_numbers_and_texts_are_left_alone(text, read):
    read(f"a: {text}\n")


def test_merged_keys_are_no_duplicates(read):
    source = read("a: &a {x: 1, y: 2}\nb: {z: 0}\nc:\n  <<: *a\n  x: 3\nd:\n  <<: [*a, {w: 4}]\n")
    assert source.line(("c", "x")) == 5
    assert source.line(("c", "y")) == 1
    assert source.line(("d", "w")) == 7
    assert source.line(("d", "nothing")) == 6


def test_lines_of_a_schedule_and_of_stages(read):
    plain = read("train:\n  optimizer: {lr: 1}\n  criterion:\n    key: x\n")
    assert plain.line(("train", "stage1", "criterion", "key")) == 4
    assert plain.line(("nothing",)) is None
    stages = read("train:\n  stage1:\n    lr: 1\n  stage2:\n    lr: 1\n")
    assert [stages.line(("train", f"stage{k}", "lr")) for k in (1, 2, 3)] == [3, 5, 1]
    schedule = read("train: !import_call\n  key: k\n  init:\n    kwargs:\n      student:\n        hook: ['stages.7']\n")
    assert schedule.line(("train", "stage2", "student", "forward_hook")) == 5
    assert schedule.line(("train", "stage2"), "'stages.7' is no module") == 6


def test_a_list_that_contains_itself(read):
    assert read("a: &a [*a]\nb: 1\n").line(("b",)) == 2


def test_a_mapping_merged_into_itself(read):
    assert read("a: &a\n  x: 1\n  <<: *a\n").line(("a", "y")) == 1


def test_what_shows_only_when_it_is_loaded(read):
    with pytest.raises(
        ConfigError, match=r"line 2: not valid YAML: expected a mapping or list of mappings for merging"
    ):
        read("a:\n  <<: 3\n").load()
    with pytest.raises(
        ConfigError, match=r"line 1: not valid YAML: could not determine a constructor for the tag '!x'"
    ):
        read("a: !x 1\n").load()


def test_errors_are_located_once(read, tmp_path):
    source = read("a: 1\nb: 2\n")
    with pytest.raises(ConfigError) as error, source.locating(), source.locating():
        raise ConfigError("is wrong", at=("b",))
    assert lines_of(error, tmp_path / "config.yaml") == ["line 2: is wrong"]
