"""The house as a whole: what imports what, what `import dybit` loads, and a test file for every module."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dybit

ROOT = Path(dybit.__file__).parent
TESTS = Path(__file__).parent
HEAVY = {"torch", "numpy", "safetensors", "transformers", "rich", "typer", "jinja2", "matplotlib", "scipy", "amaranth"}

# Layers of docs/design.md, from the ground up; a module imports from its own layer and from those below.
LAYERS = [
    {"format", "codec", "packing", "rivals", "recipe", "candidate", "workload", "networks", "errors", "integrity"},
    {"hadamard", "scale", "tensor", "ops", "codes", "extension", "kernels", "_kernels", "linear", "conv", "embedding"}
    | {"experts", "image", "ranking", "ready"},
    {"layers", "attach", "attention", "fold", "calibrate", "plan", "ptq", "qat", "model", "checkpoint", "fidelity"}
    | {"trace", "stream", "fusion", "activation", "feedforward"},
    {"subject", "estimate", "sensitivity", "timing", "cost", "constraint", "knapsack", "problem", "trial", "allocation"}
    | {"replay", "shapes", "rundir", "rivalry"},
    {"demo", "report", "cli", "integrations", "onnx", "interchange", "__main__"},
]
BESIDE = {"accelerator", "rtl"}  # know layer 1 and no torch
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# What nobody but the doors may import, and what a room must not know though it is in its layer.
PRIVATE = {"layers": {"model", "calibrate", "checkpoint"}, "calibrate": {"model", "recipe", "checkpoint"}}
PRIVATE |= {"attention": set(LEVEL) - {"attention"}, "fold": set(LEVEL) - {"fold"}, "errors": set(LEVEL)}
PRIVATE |= {"integrity": set(LEVEL) - {"errors"}}
PRIVATE |= {"codec": {"format", "rivals", "packing"}, "packing": {"format", "codec", "rivals"}, "format": {"rivals"}}
PRIVATE |= {
    "scale": {"tensor"},
    "tensor": {"layers"},
    "model": {"checkpoint"},
    "ops": {"scale", "tensor"},
    "codes": {"ops", "scale", "tensor"},
    "extension": set(LEVEL) - {"errors", "_kernels"},
}


def modules():
    """Path and dotted name of every module."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, name):
    """The dotted names that a module imports, also inside functions; not those for type checkers only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    package = ["dybit", *name.split(".")] if path.name == "__init__.py" and name else ["dybit", *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if source == "dybit":
                yield from (f"dybit.{alias.name}" for alias in node.names)
            else:
                yield source


def rooms(path, name):
    """The rooms of dybit that a module imports from, by their first name."""
    return {target.split(".")[1] for target in imports(path, name) if target.startswith("dybit.")}


MODULES = {name or "__init__": (path, name) for path, name in modules()}
each_module = pytest.mark.parametrize(("path", "name"), MODULES.values(), ids=MODULES)


@each_module
def test_every_module_is_in_a_layer(path, name):
    room = name.split(".")[0]
    assert not room or room in LEVEL or room in BESIDE


@each_module
def test_layer_rule(path, name):
    room = name.split(".")[0]
    used = rooms(path, name) - {room}
    if not room:
        assert not used  # dybit/__init__.py loads names when they are touched
    elif room in BESIDE:
        assert used <= LAYERS[0] | BESIDE
    else:
        doors = room in LAYERS[4]  # they know everything
        too_high = {other for other in used if LEVEL.get(other, LEVEL[room] + 1 - doors) > LEVEL[room]}
        assert not too_high, f"{name} imports {sorted(too_high)}, which are above it"
        assert not used & PRIVATE.get(room, set())


@each_module
def test_what_may_import_torch(path, name):
    room = name.split(".")[0]
    outside = {target.split(".")[0] for target in imports(path, name)}
    if not room or room in LAYERS[0] or room in BESIDE:
        assert not outside & {"torch", "safetensors", "transformers", "scipy"}
    if room in LAYERS[1] or room in LAYERS[2]:
        assert not outside & {"transformers", "rich", "typer", "jinja2", "matplotlib", "plotly"}


def test_the_rule_finds_offenders(tmp_path):
    bad = tmp_path / "scale.py"
    bad.write_text("import torch\ndef f():\n    from dybit.model import quantize_\nfrom dybit import ops, cli\n")
    assert rooms(bad, "scale") == {"model", "ops", "cli"}
    assert set(imports(bad, "scale")) == {"torch", "dybit.model", "dybit.ops", "dybit.cli"}
    relative = tmp_path / "families.py"
    relative.write_text("from .tables import x\nfrom ..model import y\nfrom ... import z\n")
    assert "dybit.model" in set(imports(relative, "rivals.families"))
    typed = tmp_path / "typed.py"
    typed.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dybit.model import x\n")
    assert rooms(typed, "typed") == set()


def loaded(statement):
    """The modules that a new process has after a statement."""
    script = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {module.split(".")[0] for module in json.loads(run.stdout.splitlines()[-1])}


def test_import_is_cheap():
    assert not loaded("import dybit; dir(dybit); dybit.DyBitError; dybit.CheckpointError") & HEAVY
    assert "torch" in loaded("import dybit; dybit.quantize_")  # the test can tell


@pytest.mark.parametrize("name", ["format", "codec", "packing", "rivals", "recipe", "errors"])
def test_the_ground_floor_loads_no_torch(name):
    assert not loaded(f"import dybit.{name}") & (HEAVY - {"numpy"})
    if name == "errors":
        assert "numpy" not in loaded("import dybit.errors")


def test_public_names_of_the_ground_floor_load_no_torch():
    assert "torch" not in loaded(
        "import dybit; dybit.Format(4).values; dybit.Recipe(weights=4).to_json(); dybit.variants"
    )


def test_public_names():
    assert dybit.__all__ == sorted(dybit.__all__)
    for name in dybit.__all__:
        thing = getattr(dybit, name)
        assert thing.__name__ == name and thing.__doc__
        assert thing.__module__.startswith("dybit.")
        assert name in dir(dybit)
    wanted = {"Format", "Recipe", "quantize_", "save", "load"}
    assert wanted <= set(dybit.__all__)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname for node in block.body for alias in node.names}
    assert typed == set(dybit.__all__)
    assert (ROOT / "py.typed").exists()


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'dybit' has no attribute 'quantise_'"):
        _ = dybit.quantise_


@each_module
def test_every_module_has_tests(path, name):
    room, *rest = name.split(".")
    if not room or room == "__main__":
        return
    exact = TESTS / f"test_{'_'.join([room, *rest])}.py"
    assert exact.exists() or (path.parent != ROOT and list(TESTS.glob(f"test_{room}*.py"))), exact.name


@each_module
def test_every_module_says_what_it_is(path, name):
    assert ast.get_docstring(ast.parse(path.read_text()))
