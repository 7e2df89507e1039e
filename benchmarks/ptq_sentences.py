"""Post-training quantization of the sentence encoder MiniLM-L6: how close similarities and retrieval stay to FP32.

Every evaluated paragraph is cut in two. Spearman is the rank correlation of the similarities of all pairs of first
halves. Retrieval looks up every first half among the second halves: shown are how often it finds the same one as FP32,
and the mean reciprocal rank (MRR) of the right one beside that of FP32. Standard errors are by jackknife over tenths of
the paragraphs. Calibration is on the language reference of CPython, evaluation on the Debian Administrator's Handbook
(see ``texts.py``). Embeddings keep 8 bits. Seconds are of the processor.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from results import Column, Results, parser
from texts import text_file
from torch import Tensor, nn

from dybit import Recipe, quantize_
from dybit.cli import options
from dybit.demo import minilm, minilm_batches, minilm_tokenizer, prose
from dybit.measure.fidelity import pair_spearman, similarities, sqnr

PARTS = 10
COLUMNS = (
    Column("weights", "weights"),
    Column("group", "group size"),
    Column("algorithm", "algorithm"),
    Column("spearman", "Spearman", 4),
    Column("agreement", "retrieved as by FP32", 1, " %"),
    Column("mrr", "MRR", 3),
    Column("mrr_fp32", "MRR of FP32", 3),
    Column("sqnr", "SQNR, dB"),
    Column("seconds", "s", 0),
)


def halves(count: int, paragraphs: list[str]) -> list[str]:
    """The first halves of some of the paragraphs, then their second halves."""
    texts = [text for text in paragraphs if len(text.split()) >= 24]
    step = len(texts) / count
    words = [texts[int(i * step)].split() for i in range(count)]
    return [" ".join(w[: len(w) // 2]) for w in words] + [" ".join(w[len(w) // 2 :]) for w in words]


@torch.no_grad()
def embed(model: nn.Module, texts: list[str]) -> Tensor:
    """(texts, width)."""
    tokenizer, found = minilm_tokenizer(), []
    for start in range(0, len(texts), 16):
        items = tokenizer.encode_batch(texts[start : start + 16])
        fields = {"input_ids": [item.ids for item in items], "attention_mask": [item.attention_mask for item in items]}
        found.append(model(**{name: torch.tensor(rows) for name, rows in fields.items()}))
    return torch.cat(found)


def retrieved(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Of every first half: the second half that is nearest, and the reciprocal rank of the right one."""
    count = len(embeddings) // 2
    scores = similarities(embeddings)[:count, count:]
    rank = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return scores.argmax(1), 1 / rank


def jackknife(measure: Callable[[Tensor], float], count: int) -> tuple[float, float]:
    """A measure of all items, and its standard error from leaving out every tenth in turn."""
    items = torch.arange(count)
    parts = [measure(items[items % PARTS != part]) for part in range(PARTS)]
    mean = sum(parts) / PARTS
    return measure(items), math.sqrt((PARTS - 1) / PARTS * sum((part - mean) ** 2 for part in parts))


def judge(exact: Tensor, found: Tensor) -> dict[str, object]:
    """The cells of a quantized model whose embeddings are ``found``."""
    count = len(exact) // 2
    (same, right), (ours, rank) = retrieved(exact), retrieved(found)
    return {
        "spearman": jackknife(lambda i: pair_spearman(exact[i], found[i]), count),
        "agreement": jackknife(lambda i: 100 * float((same[i] == ours[i]).float().mean()), count),
        "mrr": jackknife(lambda i: float(rank[i].mean()), count),
        "mrr_fp32": float(right.mean()),
        "sqnr": sqnr(exact, found),
    }


def main() -> None:
    reader = parser(__doc__)
    reader.add_argument("--weights", nargs="+", default=["4", "nf4", "int4"], help="widths or names of formats")
    reader.add_argument("--activations", default="8", help="width or format; none: floating point")
    reader.add_argument("--dynamic", action="store_true", help="a scale for every token; default: static")
    reader.add_argument("--group-sizes", nargs="+", type=int, default=[0, 64], help="0: a scale an output channel")
    reader.add_argument("--algorithms", nargs="+", default=["rtn", "auto"], help="chains such as gptq,bias")
    reader.add_argument("--texts", type=int, default=300, help="paragraphs to judge by")
    reader.add_argument("--calibration", type=int, default=128, help="paragraphs")
    reader.add_argument("--packages", type=Path, default=Path("/"), help="root of the text's package")
    given = reader.parse_args()
    warnings.filterwarnings("ignore")
    mode = "dynamic" if given.dynamic else "static"
    recipes = {
        f"{name}, groups of {group}" if group else name: Recipe(
            options.width("weights", name),
            options.width("activations", given.activations),
            activation_mode=mode,
            group_size=group or None,
        )
        for group in given.group_sizes
        for name in given.weights
    }
    with TemporaryDirectory() as folder:
        texts = halves(given.texts, prose(text_file("handbook", given.packages, Path(folder))))
    model = minilm()
    calibration, exact = minilm_batches(batches=given.calibration // 16), embed(model, texts)
    with Results(__file__, __doc__, COLUMNS, given, recipes) as results:
        for group, chain, name in itertools.product(given.group_sizes, given.algorithms, given.weights):
            key = {"weights": name, "group": group or "output channel", "algorithm": chain}
            if not results.has(**key):
                recipe = recipes[f"{name}, groups of {group}" if group else name]
                results.add(**key, **measure(model, recipe, calibration, chain, texts, exact))


def measure(
    model: nn.Module, recipe: Recipe, calibration: list[Any], chain: str, texts: list[str], exact: Tensor
) -> dict[str, object]:
    """The figures of one recipe and chain of algorithms."""
    start = time.process_time()
    algorithm = options.chain(chain, calibrated=True)
    quantized = quantize_(copy.deepcopy(model), recipe, calibration, algorithm=algorithm)
    seconds = time.process_time() - start
    return {**judge(exact, embed(quantized, texts)), "seconds": seconds}


if __name__ == "__main__":
    main()
