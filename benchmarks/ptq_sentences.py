"""Post-training quantization of the sentence encoder MiniLM-L6: how close similarities and retrieval stay to FP32.

    python benchmarks/ptq_sentences.py [--weights 4,int4,nf4] [--activations 8] [--group-sizes 0,64]
                                       [--algorithms rtn,gptq] [--texts 300] [--calibration 128] [--output result.jsonl]

Every evaluated paragraph is cut in two: the rank correlation (Spearman) is that of the similarities of all pairs of
first halves; retrieval looks up every first half among the second halves, and is judged by how often it finds the same
one as FP32 (agreement) and by the mean reciprocal rank (MRR) of the right one, beside that of FP32. Standard errors are
by jackknife over tenths of the paragraphs. Calibration and evaluation are disjoint texts. Group size 0 is one scale an
output channel. Inputs are static unless --dynamic. Embeddings keep 8 bits. What --output holds is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dybit import Recipe, quantize_
from dybit.demo import half, minilm, minilm_batches, minilm_tokenizer, prose
from dybit.measure.fidelity import pair_spearman, similarities, sqnr

PARTS = 10


def halves(count: int) -> list[str]:
    """The first halves of evaluated paragraphs, then their second halves."""
    texts = [text for text in half(prose(), "evaluation") if len(text.split()) >= 24]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="4,nf4,int4", help="widths or names of formats, separated by commas")
    parser.add_argument("--activations", default="8", help="width or format; none: floating point")
    parser.add_argument("--dynamic", action="store_true", help="a scale for every token")
    parser.add_argument("--group-sizes", default="0,64")
    parser.add_argument("--algorithms", default="rtn,gptq", help="chains such as gptq+bias, separated by commas")
    parser.add_argument("--texts", type=int, default=300, help="paragraphs to judge by")
    parser.add_argument("--calibration", type=int, default=128, help="paragraphs")
    parser.add_argument("--output", type=Path, help="lines of JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, texts = minilm(), halves(options.texts)
    calibration = minilm_batches(batches=options.calibration // 16)
    exact = embed(model, texts)
    lines = options.output.read_text().splitlines() if options.output and options.output.exists() else []
    done = {tuple(row["key"]): row for row in map(json.loads, lines)}
    inputs = int(options.activations) if options.activations.isdigit() else options.activations
    print("| weights | inputs | group | algorithm | Spearman | retrieval, % as FP32 | MRR (FP32) | SQNR, dB | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for group in map(int, options.group_sizes.split(",")):
        for chain in options.algorithms.split(","):
            for name in options.weights.split(","):
                key = (name, str(inputs), options.dynamic, group, chain, options.texts, options.calibration)
                row = done.get(key)
                if row is None:
                    recipe = Recipe(
                        weights=int(name) if name.isdigit() else name,
                        activations=None if inputs == "none" else inputs,
                        activation_mode="dynamic" if options.dynamic else "static",
                        group_size=group or None,
                    )
                    start = time.process_time()
                    quantized = quantize_(copy.deepcopy(model), recipe, calibration, algorithm=chain.split("+"))
                    seconds = time.process_time() - start
                    row = {"key": key, **judge(exact, embed(quantized, texts)), "seconds": seconds}
                    if options.output:
                        with options.output.open("a") as stream:
                            stream.write(json.dumps(row) + "\n")
                how = f"{inputs}{' dynamic' if options.dynamic else ''}"
                cells = [f"{row['spearman'][0]:.4f} ± {row['spearman'][1]:.4f}"]
                cells += [f"{row['agreement'][0]:.1f} ± {row['agreement'][1]:.1f}"]
                cells += [f"{row['mrr'][0]:.3f} ({row['mrr_fp32']:.3f})", f"{row['sqnr']:.2f}", f"{row['seconds']:.0f}"]
                print(f"| {name} | {how} | {group or 'channel'} | {chain} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
