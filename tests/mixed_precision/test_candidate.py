"""Tests of candidates and of the recipes made of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dybit import Candidate, DyBitError, Recipe
from dybit.mixed_precision.candidate import as_candidates, mixed_recipe

SOME = [Candidate(8, 8), Candidate(4, 8), Candidate(2, 4), Candidate(4), Candidate(None)]


@pytest.mark.parametrize(
    ("word", "candidate", "name"),
    [
        ("4/8", Candidate(4, 8), "W4A8"),
        (" W4a8 ", Candidate(4, 8), "W4A8"),
        ("w3", Candidate(3), "W3"),
        ("3", Candidate(3), "W3"),
        ("nf4/8", Candidate("nf4", 8), "nf4 A8"),
        ("nf4", Candidate("nf4"), "nf4"),
        ("none/8", Candidate(None, 8), "W32A8"),
        ("fp32", Candidate(None), "FP32"),
        ("none", Candidate(None), "FP32"),
    ],
)
def test_words(word, candidate, name):
    assert Candidate.parse(word) == candidate and candidate.name == name
    assert candidate.kept == (name == "FP32")


def test_bits():
    assert Candidate("nf4", "int8").bits == (4, 8) and Candidate(None, 4).bits == (None, 4)


@pytest.mark.parametrize("word", ["4/8/2", "9", "1/8", "q", "", "4/", "w", "mxfp4/mxfp4"])
def test_bad_words(word):
    with pytest.raises(DyBitError, match=r"candidate|format|bits"):
        Candidate.parse(word)


def test_lists():
    assert as_candidates(["4/8", (2, 4), 3, Candidate(None)]) == (*SOME[1:3], Candidate(3), Candidate(None))
    for bad, message in (([], "empty"), ("4/8", "a list"), ([4, "w4"], "W4 twice"), ([None], "not None")):
        with pytest.raises(DyBitError, match=message):
            as_candidates(bad)


layers = st.dictionaries(st.from_regex(r"[a-c]\.[a-d]", fullmatch=True), st.sampled_from(SOME), min_size=1)


@given(layers)
def test_every_layer_gets_its_candidate_and_keeps_the_rest(choices):
    base = Recipe(activation_mode="dynamic", rules={"a.*": {"group_size": 32}, "b.a": {"weights": 8, "scale": "bf16"}})
    made = mixed_recipe(base, choices)
    for name, candidate in choices.items():
        layer = made.layer(name)
        if candidate.kept:
            assert layer is None
            continue
        assert (layer.weights, layer.activations, layer.activation_mode) == (*candidate.__dict__.values(), "dynamic")
        assert layer.group_size == (32 if name.startswith("a.") else None)
        assert layer.scale == ("bf16" if name == "b.a" else None)
    assert Recipe.from_json(made.to_json()) == made


def test_the_commonest_candidate_needs_no_rules():
    made = mixed_recipe(Recipe(), {"a": SOME[1], "b": SOME[1], "c": SOME[0]})
    assert (made.weights, made.activations) == (4, 8) and [pattern for pattern, _ in made.rules] == ["c"]


def test_embeddings():
    made = mixed_recipe(
        Recipe(), {"table": Candidate(4, 8), "other": Candidate(8, 4), "x": SOME[2]}, {"table", "other"}
    )
    assert made.layer("table", "embedding").weights == 4 and made.layer("other", "embedding").weights == 8
    assert made.layer("table", "embedding").activations is None and (made.weights, made.activations) == (2, 4)
    assert mixed_recipe(Recipe(), {"table": Candidate(None, 8)}, {"table"}).layer("table", "embedding") is None
