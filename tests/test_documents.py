"""The README and the guides: their Python code runs, with small models, and they keep to their length."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import dybit
import dybit.demo

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *GUIDES]


def code(page):
    """The Python blocks of a page, each with its line breaks and without its indentation."""
    found = re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def words(page):
    """The number of words of a page."""
    return len(page.read_text().split())


class Classifier(nn.Module):
    """A small network whose ends have the names of EfficientNet-Lite0's."""

    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Sequential()
        self._conv_stem.conv = nn.Conv2d(3, 8, 3)
        self._depthwise_conv = nn.Conv2d(8, 8, 3, groups=8)
        self._fc = nn.Linear(8, 10)

    def forward(self, x):
        return self._fc(self._depthwise_conv(self._conv_stem(x).relu()).relu().mean((2, 3)))


def classifier():
    torch.manual_seed(0)
    return Classifier().eval()


def pictures(split):
    generator = torch.Generator().manual_seed(len(split))
    return [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(2)]


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **size))


def names_of(page):
    """What the code of a page expects to be there."""
    batches = [torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    model = layers()
    if page in ("performance", "export"):
        dybit.quantize_(model, dybit.Recipe(weights=4, activations=8), batches)
    if page == "qat":
        model = nn.Sequential()
        model.features = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
        model.head = nn.Linear(32, 8)
    if page == "serving":
        batches = [torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))]
    data = [(x, torch.arange(len(x)) % 8) for x in batches]
    recipe = dybit.Recipe(weights=4, activations=8)
    return {
        "dybit": dybit,
        "torch": torch,
        "model": model,
        "fresh_model": layers(),
        "batches": batches,
        "data": data,
        "args": (batches[0],),
        "recipe": recipe,
    }


@pytest.mark.parametrize(
    "page", [page for page in PAGES if code(page) and page.stem != "extending"], ids=lambda page: page.stem
)
def test_python_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dybit.demo, "efficientnet_lite0", classifier, raising=False)
    monkeypatch.setattr(dybit.demo, "image_batches", pictures, raising=False)
    known = names_of(page.stem)
    if page.stem == "serving":
        llama().save_pretrained("path/or/name")
    for block in code(page):
        exec(compile(block, page.name, "exec"), known)


def test_length():
    assert words(ROOT / "README.md") <= 900
    assert sum(map(words, GUIDES)) <= 15_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_columns(page):
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    long = [line for line in prose.splitlines() if len(line) > 120 and not line.lstrip().startswith("|")]
    assert not long


def test_every_target_of_make_has_a_rule():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    named |= {word for page in PAGES for word in re.findall(r"`make ([a-z]+)`", page.read_text())}
    missing = named - set(re.findall(r"^([a-z]+):(?! [A-Z]+ :=)", makefile, re.MULTILINE))
    assert named > {"demo", "test"} and not missing
