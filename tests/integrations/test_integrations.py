"""Making dybit known to transformers, whenever that is imported."""

import importlib
import importlib.util
import logging
import sys
from types import ModuleType

import pytest

from dybit import integrations


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A module in the place of transformers' registries, not imported yet."""
    (tmp_path / "registries_of_a_test.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(integrations, "_REGISTRIES", "registries_of_a_test")
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, integrations._AfterImport)])
    calls = []
    monkeypatch.setattr(integrations, "import_module", lambda name: calls.append(name))
    yield calls
    sys.modules.pop("registries_of_a_test", None)


def test_registration_waits_for_the_import(fake):
    integrations.watch()
    assert importlib.util.find_spec("registries_of_a_test") is not None and fake == []  # looking is not importing
    module = importlib.import_module("registries_of_a_test")
    assert module.loaded and fake == ["dybit.integrations.transformers"]
    assert not any(isinstance(finder, integrations._AfterImport) for finder in sys.meta_path)
    assert module.__spec__.loader is module.__loader__ and module.__loader__.get_source(module.__name__)


def test_registration_after_the_import(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "registries_of_a_test", ModuleType("registries_of_a_test"))
    integrations.watch()
    assert fake == ["dybit.integrations.transformers"]


def test_transformers_works_without_dybit(fake, monkeypatch, caplog):
    def fail(name):
        raise RuntimeError("changed")

    monkeypatch.setattr(integrations, "import_module", fail)
    integrations.watch()
    with caplog.at_level(logging.WARNING, "dybit"):
        assert importlib.import_module("registries_of_a_test").loaded
    assert "transformers cannot load checkpoints of dybit: changed" in caplog.text
