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

# The folders of docs/design.md, from the ground up. A folder imports from itself and from those above it in this table.
# The second column lists the libraries that it may import beside Python's own.
FOLDERS = {
    "errors": "",
    "safe_files": "",
    "formats": "numpy ml_dtypes",
    "recipe": "",
    "workloads": "numpy",
    "accelerator": "numpy rich",
    "rtl": "numpy amaranth",
    "kernels": "numpy torch",
    "tensors": "numpy torch scipy",
    "operators": "numpy torch",
    "layers": "numpy torch",
    "models": "numpy torch safetensors",
    "runtime": "numpy torch",
    "ptq": "numpy torch safetensors scipy",
    "qat": "numpy torch",
    "measure": "numpy torch",
    "mixed_precision": "numpy torch scipy safetensors",
    "interchange": "numpy torch safetensors gguf",
    "onnx": "numpy torch ml_dtypes onnx onnx_ir onnxruntime onnxscript",
    "integrations": "torch transformers safetensors",
    "report": "numpy jinja2 plotly matplotlib",
    "demo": None,
    "cli": None,
    "__main__": "",
}
ORDER = list(FOLDERS)
# The accelerator and its hardware know no torch, and only the command line knows them.
BESIDE = {"accelerator", "rtl"}
ABOVE_ALL = {"cli", "__main__"}


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


def test_the_table_names_every_folder():
    assert {name.split(".")[0] for _, name in modules()} - {""} == set(FOLDERS)
    assert len([path for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 20


@each_module
def test_a_folder_imports_from_those_above_it_in_the_table(path, name):
    folder = name.split(".")[0]
    used = rooms(path, name) - {folder}
    if not folder:
        assert not used - {"integrations"}  # names are loaded when they are first used
        return
    after = set(dybit.__all__) | set(ORDER[ORDER.index(folder) :])
    if folder not in ABOVE_ALL:
        assert not used & after, f"{name} imports {sorted(used & after)}, which come after it in the table"
    if folder not in BESIDE | ABOVE_ALL:
        assert not used & BESIDE


@each_module
def test_libraries_of_a_folder(path, name):
    allowed = FOLDERS.get(name.split(".")[0], "")
    if allowed is not None:
        outside = {target.split(".")[0] for target in imports(path, name)} - set(sys.stdlib_module_names) - {"dybit"}
        assert outside <= set(allowed.split())


def test_the_rule_finds_offenders(tmp_path):
    bad = tmp_path / "scale_search.py"
    bad.write_text(
        "import torch\ndef f():\n    from dybit.ptq.quantize import quantize_\nfrom dybit import kernels, cli\n"
    )
    assert rooms(bad, "tensors.scale_search") == {"ptq", "kernels", "cli"}
    assert set(imports(bad, "tensors.scale_search")) == {"torch", "dybit.ptq.quantize", "dybit.kernels", "dybit.cli"}
    relative = tmp_path / "catalogue.py"
    relative.write_text("from .tables import x\nfrom ..models import y\nfrom ... import z\n")
    assert "dybit.models" in set(imports(relative, "formats.catalogue"))
    typed = tmp_path / "typed.py"
    typed.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dybit.ptq.quantize import x\n")
    assert rooms(typed, "typed") == set()


def loaded(statement):
    """The modules that a new process has after a statement."""
    script = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {module.split(".")[0] for module in json.loads(run.stdout.splitlines()[-1])}


def test_import_is_cheap():
    assert not loaded("import dybit; dir(dybit); dybit.DyBitError; dybit.CheckpointError") & HEAVY
    assert "torch" in loaded("import dybit; dybit.quantize_")  # the test can tell


@pytest.mark.parametrize(
    "name", ["formats.format", "formats.codebook", "formats.packing", "formats.catalogue", "recipe", "errors"]
)
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
    *folders, last = name.split(".")
    if path.name in ("__init__.py", "__main__.py"):
        return
    exact = TESTS.joinpath(*folders, f"test_{last}.py")
    assert exact.exists(), exact


@each_module
def test_every_module_says_what_it_is(path, name):
    assert ast.get_docstring(ast.parse(path.read_text()))
