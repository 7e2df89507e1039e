"""Recipes: round trips, rules, and a sentence for everything that a person may get wrong."""

import copy
import json
import pickle

import pytest
from hostile_json import mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dybit.errors import DyBitError
from dybit.formats import catalogue
from dybit.recipe import LayerRecipe, Recipe, matches

formats = st.one_of(st.none(), st.integers(2, 8), st.sampled_from(["s4r2", "nf4", "int8", "dybit3mid", "u4"]))


@st.composite
def layer_fields(draw):
    values = {"weights": draw(formats), "activations": draw(formats)}
    size = draw(st.one_of(st.none(), st.integers(1, 1000)))
    if size:
        values["group_size"] = size
    elif draw(st.booleans()):
        values["granularity"] = draw(st.sampled_from(["tensor", "channel"]))
    values["scale"] = draw(st.sampled_from([None, "fp32", "bf16", "pow2", "e4m3"]))
    values["variant_granularity"] = draw(st.sampled_from([None, "tensor"]))
    values["variants"] = draw(st.sampled_from([None, "all", "plain", "midrise"]))
    values["method"] = draw(st.sampled_from(["mse", "absmax", "percentile"]))
    values["criterion"] = draw(st.sampled_from(["auto", "weight", "activation"]))
    values["percentile"] = draw(st.floats(0.001, 100))
    values["activation_method"] = draw(st.sampled_from(["mse", "absmax", "percentile"]))
    values["activation_offset"] = draw(st.booleans())
    if draw(st.booleans()):
        values["activation_mode"] = "dynamic"
        values["activation_group_size"] = draw(st.one_of(st.none(), st.integers(1, 512)))
    return values


@st.composite
def recipes(draw):
    rule = st.one_of(
        st.none(), st.fixed_dictionaries({}, optional={"weights": formats, "percentile": st.floats(1, 99)})
    )
    names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: not name.startswith("re:"))
    rules = draw(st.dictionaries(names, rule, max_size=4))
    return Recipe(**draw(layer_fields()), embeddings=draw(formats), rules=rules)


@given(recipes())
@settings(max_examples=50)
def test_json_round_trip(recipe):
    text = recipe.to_json()
    assert Recipe.from_json(text) == recipe
    assert Recipe.from_json(text).to_json() == text
    assert json.loads(text)["version"] == 1


def test_defaults_are_left_out():
    assert Recipe().to_dict() == {"version": 1, "weights": 4}
    assert Recipe.from_json("{}") == Recipe()
    assert Recipe.from_dict({"rules": {}}) == Recipe()


def test_copies_and_pickles():
    recipe = Recipe(weights=3, rules={"a": None, "b": {"weights": 8}})
    assert recipe.weight_family.name == "dybit3spare"
    assert copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(AttributeError):
        recipe.weights = 5


def test_first_rule_wins():
    recipe = Recipe(rules={"a.b": {"weights": 8}, "a.*": None, "*": {"weights": 2}})
    assert recipe.layer("a.b").weights == 8
    assert recipe.layer("a.c") is None
    assert recipe.layer("b").weights == 2
    assert Recipe.from_json(recipe.to_json()).layer("a.b").weights == 8


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "axb", False),
        ("a.*", "a.b.c", True),
        ("*.q", "layers.0.q", True),
        ("layers.?.q", "layers.10.q", False),
        ("layers.[01].q", "layers.1.q", True),
        ("A", "a", False),
        ("re:a.b", "axb", True),
        ("re:a", "ab", False),
        (r"re:layers\.\d+\.q", "layers.10.q", True),
        ("", "", True),
        ("*", "", True),
        ("re:", "", True),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_rules_that_match_nothing_suggest_the_nearest():
    names = ["encoder.query", "encoder.key", "head"]
    Recipe(rules={"*.key": None, "re:head|tail": None}).check_names(names)
    with pytest.raises(DyBitError, match=r"rule 'encoder\.qeury' matches no layer; did you mean 'encoder\.query'\?"):
        Recipe(rules={"encoder.qeury": None}).check_names(names)
    with pytest.raises(DyBitError, match=r"rule 're:haed' matches no layer; did you mean 'head'\?"):
        Recipe(rules={"re:haed": None}).check_names(names)
    with pytest.raises(DyBitError, match=r"rule 'zzzz' matches no layer$"):
        Recipe(rules={"zzzz": None}).check_names(names)


def test_null_keeps_floating_point():
    assert Recipe(weights=None).layer("x") is None
    assert Recipe(weights=None, activations=8).layer("x").weights is None
    assert Recipe(rules={"x": {"weights": None}}).layer("x") is None
    assert Recipe(embeddings=None).layer("x", "embedding") is None
    of_a_table = Recipe(weights=4, activations=8).layer("x", "embedding")
    assert (of_a_table.weights, of_a_table.activations) == (8, None)
    assert Recipe(rules={"x": {"weights": 3}}).layer("x", "embedding").weights == 3


def test_what_is_left_open_is_resolved():
    assert Recipe().scale_granularity == "channel"
    assert Recipe(group_size=128).scale_granularity == "group"
    assert Recipe().scale_type == Recipe(group_size=64, scale="fp32").scale_type == "fp32"
    assert Recipe(group_size=64).scale_type == "bf16"
    assert LayerRecipe(weights="mxfp4", group_size=32).scale_type == "pow2"
    names = {bits: Recipe(weights=bits).weight_family.name for bits in range(2, 9)}
    assert names[2] == "dybit2" and names[5] == "dybit5spare" and names[6] == "dybit6plain" and names[8] == "int8"
    assert Recipe(weights=8, variants="plain").weight_family.name == "dybit8plain"
    assert Recipe(weights=4, variants="all").weight_family == catalogue.dybit(4)
    assert Recipe(weights="s4r3").weight_family.books == catalogue.family("s4").books
    assert Recipe().activation_families is None
    assert [f and f.name for f in Recipe(activations=8).activation_families] == ["int8", "uint8"]
    assert [f and f.name for f in Recipe(activations=7).activation_families] == ["dybit7plain", "udybit7"]
    assert [f and f.name for f in Recipe(activations="dybit8plain").activation_families] == [
        "dybit8plain",
        "udybit8plain",
    ]
    assert [f and f.name for f in Recipe(activations="s4r2").activation_families] == ["s4r2", "u4r2"]
    assert [f and f.name for f in Recipe(activations="int8").activation_families] == ["int8", "uint8"]
    assert [f and f.name for f in Recipe(activations="nf4").activation_families] == ["nf4", None]
    # A format without negative values serves inputs with a sign by an offset.
    assert [f and f.name for f in Recipe(activations="uint8").activation_families] == ["uint8", "uint8"]


def test_the_kind_of_a_layer_decides_the_mode_of_its_inputs():
    def mode(recipe, kind):
        layer = recipe.layer("x", kind)
        return layer.activation_mode, layer.activation_group_size

    assert mode(Recipe(activations=8), "linear") == ("dynamic", 128)
    assert mode(Recipe(activations=8), "convolution") == ("static", None)
    assert mode(Recipe(activations=4, activation_group_size=32), "linear") == ("dynamic", 32)
    assert mode(Recipe(activations=4, activation_group_size=32), "convolution") == ("static", None)
    assert mode(Recipe(activations=8, activation_mode="dynamic"), "linear") == ("dynamic", None)
    assert mode(Recipe(activations=8, activation_mode="dynamic"), "convolution") == ("dynamic", None)
    assert mode(Recipe(activations=8, activation_mode="static"), "linear") == ("static", None)
    ruled = Recipe(activations=8, rules={"x": {"activation_mode": "static"}})
    assert mode(ruled, "linear") == ("static", None) and ruled.layer("x").has_static_inputs
    assert not Recipe(activation_mode="static").has_static_inputs and not Recipe(activations=8).has_static_inputs


def test_rules_change_what_belongs_together():
    recipe = Recipe(
        group_size=64, rules={"a": {"granularity": "channel"}, "b": {"group_size": 32}, "c": {"weights": 8}}
    )
    assert (recipe.layer("a").group_size, recipe.layer("a").scale_granularity) == (None, "channel")
    assert (recipe.layer("b").group_size, recipe.layer("b").scale_granularity) == (32, "group")
    assert (recipe.layer("c").group_size, recipe.layer("c").weights) == (64, 8)
    recipe = Recipe(granularity="tensor", rules={"b": {"group_size": 32}, "d": {"granularity": None}})
    assert recipe.layer("b").scale_granularity == "group"
    assert recipe.layer("d").scale_granularity == "channel"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": 1}, "weights must be 2 to 8 bits, the name of a format, or None, not 1"),
        ({"weights": 9}, "not 9"),
        ({"weights": 4.0}, "not 4.0"),
        ({"weights": True}, "not True"),
        ({"weights": [4]}, "not [4]"),
        ({"weights": "dybit44"}, "there is no format 'dybit44'; the nearest known ones are dybit4"),
        ({"weights": ""}, "there is no format ''"),
        ({"embeddings": 16}, "16"),
        ({"activations": 0}, "activations must be 2 to 8 bits, the name of a format, or None, not 0"),
        ({"activations": "int9"}, "there is no format 'int9'"),
        ({"activations": "mxfp4"}, "activations='mxfp4' prescribes its scales"),
        (
            {"granularity": "chanel"},
            "granularity must be one of null, tensor, channel, group, not 'chanel'; did you mean 'channel'?",
        ),
        ({"granularity": []}, "not []"),
        ({"granularity": "group"}, "group_size=None does not fit granularity='group'"),
        ({"granularity": "channel", "group_size": 8}, "group_size=8 does not fit granularity='channel'"),
        ({"group_size": 0}, "group_size must be a positive integer or None, not 0"),
        ({"group_size": -3}, "not -3"),
        ({"group_size": True}, "not True"),
        ({"group_size": 64.0}, "not 64.0"),
        ({"group_size": "64"}, "not '64'"),
        ({"scale": "fp16"}, "scale must be one of null, fp32, bf16, pow2, e4m3, not 'fp16'"),
        ({"variants": "spares"}, "did you mean 'spare'?"),
        ({"variant_granularity": "group"}, "variant_granularity='group' is finer than the scales' 'channel'"),
        ({"method": "msr"}, "method must be one of mse, absmax, percentile, not 'msr'; did you mean 'mse'?"),
        ({"method": None}, "not None"),
        ({"criterion": "hessian"}, "criterion must be one of auto, weight, activation, not 'hessian'"),
        ({"percentile": 0}, "percentile must be above 0 and at most 100, not 0"),
        ({"percentile": float("nan")}, "not nan"),
        ({"percentile": "99"}, "not '99'"),
        ({"percentile": True}, "not True"),
        ({"activation_mode": "Static"}, "did you mean 'static'?"),
        ({"activation_offset": 1}, "activation_offset must be true or false, not 1"),
        (
            {"activation_group_size": 64, "activation_mode": "static"},
            "activation_group_size=64 needs activation_mode='dynamic', not 'static'",
        ),
        ({"weights": "mxfp4"}, "weights='mxfp4' needs group_size=32, not None"),
        ({"weights": "mxfp4", "group_size": 32, "scale": "fp32"}, "weights='mxfp4' needs scale='pow2', not 'fp32'"),
        ({"rules": 5}, "rules must map patterns to fields or None, not 5"),
        ({"rules": None}, "rules must map"),
        ({"rules": "abc"}, "rules must map"),
        ({"rules": {3: None}}, "rules must map"),
        ({"rules": {"a": 8}}, "rules must map"),
        ({"rules": {"a": "weights"}}, "rules must map"),
        ({"rules": [("a", None), ("a", {"weights": 8})]}, "rules have the pattern 'a' twice"),
        ({"rules": {"a": {"wieghts": 8}}}, "rule 'a' has no field 'wieghts'; did you mean 'weights'?"),
        ({"rules": {"a": {"embeddings": 8}}}, "rule 'a' has no field 'embeddings'"),
        ({"rules": {"a": {"weights": 12}}}, "not 12"),
        ({"rules": {"re:(": None}}, "rule 're:(' is not a regular expression"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(DyBitError) as error:
        Recipe(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is not valid JSON"),
        ("{", "the recipe is not valid JSON"),
        ("[]", "a recipe must be a JSON object, not []"),
        ("null", "not None"),
        ("[" * 100_000, "the recipe is not valid JSON"),
        ('{"weights": ' + "1" * 5000 + "}", "the recipe is not valid JSON"),
        ('{"weights": NaN}', "not nan"),
        ('{"weights": 1e400}', "not inf"),
        ('{"version": 2}', "recipe version 2 is not supported, only 1"),
        ('{"version": null}', "recipe version None"),
        ('{"wieghts": 4}', "recipe has no field 'wieghts'; did you mean 'weights'?"),
        ('{"weights": 4, "weights": 8}', "the recipe names 'weights' twice"),
        ('{"rules": {"a": null, "a": {"weights": 8}}}', "the recipe names 'a' twice"),
        ('{"rules": [1, 2]}', "rules must map"),
        ('{"_defaults": 4}', "recipe has no field '_defaults'"),
        ('{"layer": 4}', "recipe has no field 'layer'"),
        (None, "the recipe is not valid JSON"),
        (b"\xff\xfe", "the recipe is not valid JSON"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(DyBitError) as error:
        Recipe.from_json(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("re:" + "(" * 3000 + ")" * 3000, "nests too deep"),
        ("re:a{99999999999999999999}", "is not a regular expression"),
        ("re:(?P<a>x)(?P<a>y)", "is not a regular expression"),
        ("re:" + "a?" * 9000, "at most 10000 characters"),
        ("x" * 20000, "at most 10000 characters"),
    ],
)
def test_hostile_patterns(pattern, message):
    with pytest.raises(DyBitError, match=message) as error:
        Recipe(rules={pattern: None})
    assert len(str(error.value)) < 500


def test_malformed_recipes_are_one_sentence():
    rules = {"0": {"weights": "nf4"}, "re:a.*": None, "b*": {"weights": 8, "activations": "int8"}}
    good = Recipe(weights=4, activations=4, group_size=8, activation_mode="dynamic", rules=rules).to_dict()
    refused = []

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=mutated(good))
    def check(data):
        try:
            recipe = Recipe.from_json(json.dumps(data))
        except DyBitError as error:
            refused.append(str(error))
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:
            recipe.layer("0"), recipe.layer("a.b", True), recipe.keeps("b1")
            assert Recipe.from_json(recipe.to_json()) == recipe

    check()
    assert len(set(refused)) > 50


@settings(max_examples=400, deadline=None)
@given(pattern=st.text(st.sampled_from("re:ab.*+?()[]{}|^$\\12,-!"), max_size=16))
def test_any_pattern_is_refused_or_used(pattern):
    try:
        recipe = Recipe(rules={pattern: None})
    except DyBitError as error:
        assert "\n" not in str(error)
    else:
        recipe.layer("a.b1")
