"""The package as a whole: what importing it loads, who may import whom, and that every module has its tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dybit

SOURCE = Path(dybit.__file__).parent
TESTS = Path(__file__).parent
HEAVY = ("torch", "numpy", "scipy", "transformers", "matplotlib", "safetensors", "typer", "rich", "amaranth")

# The layers of docs/design.md. A module imports from its own layer and from those before it.
LAYERS = (
    {"errors", "codec", "format", "rivals", "packing", "recipe", "workload", "networks"},
    {"ops", "scale", "tensor"},
    {"attention", "layers", "fold", "calibrate", "model", "checkpoint", "fidelity", "trace"},
    {"demo", "report", "cli", "__main__"},
)
BESIDE = {"accelerator", "rtl"}  # from layer 1 only; imported by the doors


def modules():
    """(name of the room, file) of every module."""
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], file


def imported(file):
    """The rooms of dybit that a module imports, and the other packages, anywhere in it."""
    rooms, packages = set(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            whole = node.module == "dybit"
            names = [f"dybit.{alias.name}" for alias in node.names] if whole else [node.module]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "dybit":
                rooms.add(rest.partition(".")[0])
            else:
                packages.add(package)
    return {dybit._HOMES.get(room, room) for room in rooms}, packages


def allowed(room):
    if room in BESIDE:
        return LAYERS[0] | BESIDE
    level = next(i for i, layer in enumerate(LAYERS) if room in layer)
    below = set().union(*LAYERS[: level + 1])
    return below | BESIDE if level == len(LAYERS) - 1 else below


@pytest.mark.parametrize(("room", "file"), list(modules()), ids=lambda x: x.stem if isinstance(x, Path) else x)
def test_modules_import_only_from_their_layer_or_the_layers_before(room, file):
    rooms, packages = imported(file)
    assert rooms - {"", room} <= allowed(room), f"{file} may not import {rooms - allowed(room)}"
    if room in LAYERS[0] | BESIDE:
        assert "torch" not in packages
    if room in LAYERS[0]:
        assert not packages - set(sys.stdlib_module_names) - {"numpy"}


def test_every_room_has_a_layer():
    rooms = {room for room, _ in modules()}
    assert rooms <= set().union(*LAYERS) | BESIDE


def test_every_module_has_a_test_file_of_its_name():
    tested = {file.stem.removeprefix("test_") for file in TESTS.glob("test_*.py")}
    for room in {room for room, _ in modules()} - {"__main__"}:
        assert any(name == room or name.startswith(f"{room}_") for name in tested), f"there is no tests/test_{room}.py"


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return result.stdout.split()


def loaded(statement):
    heavy = run(f"import sys; {statement}; print(*[n for n in {HEAVY} if n in sys.modules])")
    return set(heavy)


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import dybit") == set()
    assert loaded("import dybit; dybit.DyBitError") == set()


@pytest.mark.parametrize(
    "room", ["format", "rivals", "recipe", "packing", "workload", "networks", "accelerator", "demo", "cli"]
)
def test_rooms_without_torch_do_not_load_it(room):
    assert "torch" not in loaded(f"import dybit.{room}")


def test_the_check_of_what_is_loaded_works():
    assert "torch" in loaded("import dybit; dybit.quantize_")


def test_every_public_name_is_there():
    for name in dybit.__all__:
        assert getattr(dybit, name).__doc__
    assert set(dybit.__all__) <= set(dir(dybit))
    with pytest.raises(AttributeError, match="module 'dybit' has no attribute 'quantise_'"):
        dybit.quantise_
