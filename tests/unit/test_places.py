"""Data as it lies on disk: every format, the splits of a folder, and one line for what cannot be read."""

import gzip
import json

import pytest

from fedpeft import Config, UserError
from fedpeft.data import corpus
from fedpeft.tasks.sequence_classification import SequenceClassification

ROWS = [{"text": f"text number {number}", "label": "ab"[number % 2]} for number in range(20)]


def load(name, **data):
    return corpus.load(Config.from_dict({"data": {"name": str(name), **data}}).data, SequenceClassification(), 0)


def as_csv(rows, separator=","):
    return "\n".join([separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]) + "\n"


def parquet(path, rows):
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path)


WRITERS = {
    "data.csv": lambda path: path.write_text(as_csv(ROWS)),
    "DATA.CSV": lambda path: path.write_text(as_csv(ROWS)),
    "data.tsv": lambda path: path.write_text(as_csv(ROWS, "\t")),
    "data.csv.gz": lambda path: path.write_bytes(gzip.compress(as_csv(ROWS).encode())),
    "data.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "data.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "data.json": lambda path: path.write_text(json.dumps(ROWS)),
    "data.parquet": lambda path: parquet(path, ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    found = load(tmp_path / name)
    assert sorted([*found.train.columns["text"], *found.test.columns["text"]]) == sorted(row["text"] for row in ROWS)
    assert found.train.label_names == ("a", "b")


def test_a_cell_is_a_text_whatever_it_looks_like(tmp_path):
    rows = [{"text": text, "label": label} for text, label in [("NA", "007"), ("1.50", "7"), ("true", "007"), ("null", "7")] * 3]
    (tmp_path / "data.csv").write_text(as_csv(rows))
    found = load(tmp_path / "data.csv")
    assert set(found.train.columns["text"]) <= {"NA", "1.50", "true", "null"}
    assert found.train.label_names == ("007", "7")


def test_whole_numbers_are_ordered_as_numbers(tmp_path):
    (tmp_path / "data.csv").write_text(as_csv([{"text": "x", "label": number % 12} for number in range(36)]))
    assert load(tmp_path / "data.csv").train.label_names == tuple(map(str, range(12)))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.csv", "test.csv"),
        ("train-00000-of-00001.csv", "test-00000-of-00001.csv"),
        ("train_1.csv", "test.csv"),
        ("mine.csv", "test.csv"),
    ],
)
def test_test_files_of_a_folder_never_train(train, test, tmp_path):
    (tmp_path / train).write_text(as_csv(ROWS))
    (tmp_path / test).write_text(as_csv([{"text": "held out", "label": "a"}]))
    for name in ("validation", "val", "development-2", "evaluation"):
        (tmp_path / f"{name}.csv").write_text(as_csv([{"text": "also held out", "label": "a"}]))
    found = load(tmp_path)
    assert found.test.columns["text"] == ["held out"]
    assert len(found.train) == 20


def test_a_named_test_file_inside_the_folder_does_not_train(tmp_path):
    (tmp_path / "one.csv").write_text(as_csv(ROWS))
    (tmp_path / "two.csv").write_text(as_csv([{"text": "held out", "label": "a"}]))
    found = load(tmp_path, test="two.csv")
    assert found.test.columns["text"] == ["held out"]
    assert "held out" not in found.train.columns["text"]


def complaint(name, **data):
    with pytest.raises(UserError) as caught:
        load(name, **data)
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "text,label\nonly one cell\n", "line 2 has not as many cells"),
        ("a.csv", "text,label\none,two,three\n", "line 2 has not as many cells"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.jsonl", '{"text": "x", "label": "a"}\n{"text": ', "cannot be read"),
        ("a.jsonl", "[1, 2]", "entry 1 is no object"),
        ("a.jsonl", '{"text": "x", "label": "a"}\n{"label": "b"}', "row 2 of the train rows of"),
        (
            "a.jsonl",
            '{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n{"text": "z", "label": null}',
            "row 3 of the train rows has no label",
        ),
        ("a.csv", "text,label\nx,a\ny,b\nz,\n", "row 3 of the train rows has no label"),
        ("a.csv", "text,label\nx,a\ny,a\n", "holds 1 class(es)"),
        ("a.parquet", "this is no parquet", "cannot be read"),
        ("a.csv.gz", "this is no gzip", "cannot be read"),
        ("a.xlsx", "x", "is of no kind that can be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    assert says in complaint(tmp_path / name)


def test_the_training_file_is_no_test_file(tmp_path):
    (tmp_path / "a.csv").write_text(as_csv(ROWS))
    assert "is the training file too" in complaint(tmp_path / "a.csv", test=str(tmp_path / "a.csv"))


def test_a_missing_test_file_is_named_as_such(tmp_path):
    (tmp_path / "a.csv").write_text(as_csv(ROWS))
    assert complaint(tmp_path / "a.csv", test="gone.csv").startswith("data.test: there is no file gone.csv")


def test_a_fraction_that_leaves_nothing_to_train_on_is_named(tmp_path):
    (tmp_path / "a.csv").write_text(as_csv(ROWS))
    assert "data.test_fraction" in complaint(tmp_path / "a.csv", test_fraction=0.99)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return []", "gives no rows"),
        ("return None", "gives no rows"),
        ("return {'test': [{'text': 'x', 'label': 'a'}]}", "gives no rows"),
        ("return [1, 2]", "gives no rows"),
        ("raise KeyError('lost')", "raised KeyError: 'lost'"),
        ("return [{'text': 'x'}]", 'no column "label"'),
    ],
)
def test_ones_own_function_is_judged_like_a_file(body, says, tmp_path):
    (tmp_path / "mine.py").write_text(f"def rows(*, n=3):\n    {body}\n")
    assert says in complaint(f"{tmp_path / 'mine.py'}:rows")


@pytest.mark.parametrize(
    ("code", "says"), [("def rows(:", "SyntaxError"), ("rows = 3", 'no function or class "rows"'), ("import no_such", "no_such")]
)
def test_a_file_that_does_not_run_is_one_line(code, says, tmp_path):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(UserError, match=says) as caught:
        Config.from_dict({"data": {"name": f"{tmp_path / 'broken.py'}:rows"}})
    assert len(caught.value.problems) == 1


def test_ones_own_function_brings_rows(tmp_path):
    (tmp_path / "good.py").write_text("def rows(*, n=10):\n    return [{'text': f'text {i}', 'label': i % 2} for i in range(n)]\n")
    found = load(f"{tmp_path / 'good.py'}:rows", n=30)
    assert len(found.train) + len(found.test) == 30


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_a_text_may_hold_any_separator_of_lines_but_the_files_own(character, tmp_path):
    rows = [{**row, "text": row["text"] + character + "on"} for row in ROWS]
    (tmp_path / "data.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert len(load(tmp_path / "data.jsonl").train) == 16


def test_a_cell_of_a_table_may_be_long(tmp_path):
    (tmp_path / "data.csv").write_text(as_csv([{**row, "text": "word " * 40_000} for row in ROWS]))
    assert len(load(tmp_path / "data.csv").train.columns["text"][0]) == 200_000


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def test_a_row_without_a_column_that_others_have_is_named(tmp_path):
    rows = [{**row, "client": "x"} for row in ROWS]
    del rows[6]["client"]
    jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserError, match=r'row 7 of the train rows of .* has no "client"'):
        load(tmp_path / "data.jsonl")


def test_a_label_that_is_no_number_is_no_class(tmp_path):
    rows = [{"text": row["text"], "label": number % 2} for number, row in enumerate(ROWS)]
    rows[4]["label"] = float("nan")
    jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(UserError, match=r"row 5 of the train rows has the label 'nan'; allowed: 0, 1"):
        load(tmp_path / "data.jsonl")


def test_a_class_of_rows_that_hold_nothing_is_none(tmp_path):
    jsonl(tmp_path / "data.jsonl", [*ROWS, {"text": "", "label": "z"}])
    assert load(tmp_path / "data.jsonl").train.label_names == ("a", "b")


def test_classes_are_those_of_all_rows_whichever_are_kept(tmp_path):
    for name, count in (("data.jsonl", 200), ("test.jsonl", 40)):
        jsonl(tmp_path / name, [{"text": f"text {number}", "label": f"l{number % 20}"} for number in range(count)])
    found = load(tmp_path / "data.jsonl", test=str(tmp_path / "test.jsonl"), max_examples=25)
    assert (len(found.train), len(found.train.label_names)) == (25, 20)


def test_a_class_of_a_parquet_file_may_be_missing(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    columns = {"text": [row["text"] for row in ROWS], "label": [0, 1, None, 1] * 5}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(UserError, match="row 3 of the train rows has"):
        load(tmp_path / "data.parquet")


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("text,label,text\n" + "a,1,b\n" * 9)
    with pytest.raises(UserError, match='the header names "text" twice'):
        load(tmp_path / "data.csv")
