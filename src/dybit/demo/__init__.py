"""Real pretrained models and real data that work offline, each callable without arguments.

Importing it loads neither torch nor transformers.

The command line addresses the names below as ``dybit.demo:minilm``. Models come out in FP32 and eval mode;
``*_batches`` give lists to calibrate on (``split="calibration"``) or to judge by (``split="evaluation"``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dybit.demo.language import smollm2, smollm2_batches, smollm2_chat_template, smollm2_tokenizer
    from dybit.demo.sentences import minilm, minilm_batches, minilm_tokenizer
    from dybit.demo.text import half, prose
    from dybit.demo.toy import digits, mnist1d
    from dybit.demo.vision import efficientnet_lite0, image_batches, imagenet_batches, picture

__all__ = [
    "digits",
    "efficientnet_lite0",
    "half",
    "image_batches",
    "imagenet_batches",
    "minilm",
    "minilm_batches",
    "minilm_tokenizer",
    "mnist1d",
    "picture",
    "prose",
    "smollm2",
    "smollm2_batches",
    "smollm2_chat_template",
    "smollm2_tokenizer",
]

# No module is named like a function: importing it would put the module in the function's place.
_MODULES = {
    "digits": "toy",
    "efficientnet_lite0": "vision",
    "half": "text",
    "image_batches": "vision",
    "imagenet_batches": "vision",
    "minilm": "sentences",
    "minilm_batches": "sentences",
    "minilm_tokenizer": "sentences",
    "mnist1d": "toy",
    "picture": "vision",
    "prose": "text",
    "smollm2": "language",
    "smollm2_batches": "language",
    "smollm2_chat_template": "language",
    "smollm2_tokenizer": "language",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the module protocol
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
