"""JSON documents with one changed value at any place, as a strategy of Hypothesis."""

import copy

from hypothesis import strategies as st

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 9)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["nan", "dybit4", "int8", "weight", "float32", "../x", "0", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def mutated(document):
    """The document with one to three changes: values replaced, members removed, added, or copied elsewhere."""
    return st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from(KINDS), VALUES), min_size=1, max_size=3).map(
        lambda changes: _change(document, changes)
    )


KINDS = ("replace", "replace", "remove", "add", "copy")


def _change(document, changes):
    result = copy.deepcopy(document)
    for number, kind, value in changes:
        places = list(_places(result))
        container, key = places[number % len(places)]
        if container is None:
            result = copy.deepcopy(value) if kind == "replace" else result
        elif kind == "remove":
            del container[key]
        elif kind == "add" and isinstance(container, dict):
            container[f"{key}x"] = copy.deepcopy(value)
        elif kind == "copy":
            other, name = places[number // 7 % len(places)]
            container[key] = copy.deepcopy(other[name]) if other is not None else {}
        else:
            container[key] = copy.deepcopy(value)
    return result


def _places(value, container=None, key=None):
    """All (container, key) in a JSON value, the value itself first."""
    yield container, key
    if isinstance(value, dict | list):
        for name in list(value) if isinstance(value, dict) else range(len(value)):
            yield from _places(value[name], value, name)
