import subprocess
import sys
from pathlib import Path

import pytest

import dybit.demo


def test_import_loads_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "tokenizers", "numpy"}
    script = f"import sys, dybit.demo; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", dybit.demo.__all__)
def test_every_name_is_a_function_of_its_module(name):
    assert getattr(dybit.demo, name).__name__ == name
    assert name in dir(dybit.demo)


def test_no_module_hides_a_function():
    modules = {path.stem for path in Path(dybit.demo.__file__).parent.glob("*.py")}
    assert not modules & set(dybit.demo.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = dybit.demo.nonsense
