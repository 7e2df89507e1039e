"""The house as a whole: what imports what, what `import dybit` loads, and a test file for every module."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

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
    "onnx": "numpy torch ml_dtypes nncf onnx onnx_ir onnxruntime onnxscript openvino",
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


def lengths(source):
    """The lines of a module, and of each of its functions without the docstring."""
    yield "module", len(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0
            yield node.name, node.end_lineno - node.lineno + 1 - doc


@each_module
def test_modules_and_functions_are_short(path, name):
    long = [(what, lines) for what, lines in lengths(path.read_text()) if lines > (450 if what == "module" else 60)]
    assert not long


def test_lengths_leave_out_docstrings_only():
    source = (
        'def f(x,\n      y):\n    """One.\n\n    Two.\n    """\n    # why\n    return x\n\nasync def g():\n    pass'
    )
    assert [*lengths(source)] == [("module", 11), ("f", 4), ("g", 2)]


def private(name):
    return name.startswith("_") and not name.startswith("__")


def private_definitions(tree):
    """The private names that a module defines: at its top, in its classes, and as attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and private(node.name):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name) and private(part.id):
                        yield part.id
                    elif isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self" and private(part.attr):
                        yield part.attr


def reaches(path, tree, elsewhere):
    """Where a module takes a private name of another module of dybit."""
    own = set(private_definitions(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dybit"):
            yield from (f"line {node.lineno}: {alias.name}" for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr in elsewhere - own:
            whole = ast.unparse(node)
            if not whole.startswith(("self._", "cls._")):
                yield f"line {node.lineno}: {whole}"


TREES = {name: ast.parse(path.read_text()) for name, (path, _) in MODULES.items()}
TORCH = {*dir(torch), *dir(torch.Tensor), *dir(nn.Module()), "_C"}  # private names of torch's that dybit needs
PRIVATE = {name: set(private_definitions(tree)) for name, tree in TREES.items()}


@each_module
def test_no_module_uses_private_names_of_another(path, name):
    elsewhere = set().union(*(names for other, names in PRIVATE.items() if other != (name or "__init__")))
    found = [*reaches(path, TREES[name or "__init__"], elsewhere - TORCH)]
    assert not [place for place in found if not place.endswith(": _kernels")]  # the compiled extension


def test_the_rule_on_private_names_finds_offenders(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from dybit.operators.linear import linear, _matrix\n_own = 1\n"
        "def f(quantizer, x):\n    self._own, quantizer._plan(), x._version, linear._cache, self._plan\n"
    )
    found = [*reaches(bad, ast.parse(bad.read_text()), {"_plan", "_cache", "_matrix", "_own"})]
    assert sorted(found) == ["line 1: _matrix", "line 4: linear._cache", "line 4: quantizer._plan"]


FACTORIES = {function.__name__ for function in _device_constructors()}  # torch's own list of what a device changes
LAYERS = {
    name for name, made in vars(nn).items() if inspect.isclass(made) and "device" in inspect.signature(made).parameters
}
# Floating-point networks of the demonstration, which follow the defaults as every model does.
MODELS = {"demo/classifiers.py", "demo/vision.py"}


def undecided(source):
    """The calls that make a tensor or a layer without naming its type and its device."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (f"line {node.lineno}: {alias.name}" for alias in node.names if alias.name in FACTORIES)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        if (owner == "torch" and name in FACTORIES) or (owner in ("nn", "torch.nn") and name in LAYERS):
            if {"dtype", "device"} - {keyword.arg for keyword in node.keywords}:
                yield f"line {node.lineno}: {owner}.{name}"
        elif owner == "torch" and name in ("Tensor", "FloatTensor", "set_default_dtype", "get_default_dtype"):
            yield f"line {node.lineno}: {owner}.{name}"


def test_every_tensor_has_a_dtype_and_a_device_of_its_own():
    found = {
        name: calls
        for path in sorted(ROOT.rglob("*.py"))
        if (name := path.relative_to(ROOT).as_posix()) not in MODELS and (calls := list(undecided(path.read_text())))
    }
    assert not found


def test_the_extension_is_given_checked_addresses_only():
    """Modules that call the extension take addresses from ``arguments.address``, which checks what is there."""
    for path in [*ROOT.glob("kernels/*.py"), *ROOT.glob("operators/*.py")]:
        if path.name not in ("arguments.py", "packed_cache.py"):  # where an address is an identity only
            attributes = {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
            assert not attributes & {"data_ptr", "ctypes"}, path
    above = [path for name, (path, _) in MODULES.items() if not name.startswith(("kernels", "operators"))]
    assert not [path for path in above if "_kernels" in path.read_text() or "extension.load()." in path.read_text()]


def test_the_rule_on_defaults_finds_offenders():
    source = """
from torch import zeros, Tensor
def f(x):
    torch.empty(3), torch.tensor([1.0], dtype=torch.float32), torch.full((1,), 2.0, device="cpu"), torch.arange(3)
    nn.Linear(3, 4), torch.nn.Linear(3, 4, device="meta"), torch.Tensor(3), nn.ReLU()
    torch.empty(3, dtype=torch.uint8, device="cpu"), x.new_empty(3), torch.empty_like(x)
"""
    assert [found.split(": ")[1] for found in undecided(source)] == [
        *("zeros", "torch.empty", "torch.tensor", "torch.full", "torch.arange"),
        *("nn.Linear", "torch.nn.Linear", "torch.Tensor"),
    ]
