import pytest

from dybit.demo.text import half, prose, spread
from dybit.errors import DyBitError

SENTENCE = "This is a sentence of English that has quite a lot of words in it for the test number {}."


def test_prose_is_plenty_clean_and_the_same_every_time():
    paragraphs = prose()
    assert paragraphs == prose()
    assert sum(map(len, paragraphs)) > 150_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(" ".join(paragraph.split()) == paragraph for paragraph in paragraphs)
    assert not any(">>>" in paragraph or "::=" in paragraph for paragraph in paragraphs)


def test_prose_of_a_file(tmp_path):
    one, two = SENTENCE.format("one"), SENTENCE.format("two")
    blocks = ["A Heading", one.replace(" ", "\n  "), "* " + two, one, ">>> is the " + one, "x = f(y)\n" * 40]
    (tmp_path / "book.txt").write_text("\n\n".join(blocks), encoding="utf-8")
    assert prose(tmp_path / "book.txt") == [one, two]


def test_prose_of_a_bad_file(tmp_path):
    with pytest.raises(DyBitError, match=r"source=.*absent.txt"):
        prose(tmp_path / "absent.txt")
    (tmp_path / "code.txt").write_text("x = 1\n")
    with pytest.raises(DyBitError, match=r"source=.*code.txt.* no paragraph"):
        prose(str(tmp_path / "code.txt"))


def test_halves_are_disjoint_and_complete():
    paragraphs = prose()
    first, second = half(paragraphs, "calibration"), half(paragraphs, "evaluation")
    assert first + second == paragraphs
    assert not set(first) & set(second)


def test_half_rejects_an_unknown_split():
    with pytest.raises(DyBitError, match="split='test'"):
        half([1, 2], "test")


def test_spread_covers_the_range():
    assert spread(100, batches=2, batch_size=2, what="things") == [[0, 25], [50, 75]]
    assert spread(3, batches=3, batch_size=1, what="things") == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("batches", "batch_size", "message"),
    [
        (0, 1, "batches=0"),
        (1, -1, "batch_size=-1"),
        (2, 3, "batches=2 of batch_size=3 need 6 things, but the split has 5"),
    ],
)
def test_spread_rejects(batches, batch_size, message):
    with pytest.raises(DyBitError, match=message):
        spread(5, batches, batch_size, "things")
