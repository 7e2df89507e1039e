"""``dybit bench --generate``: tokens a second of a language model, beside the least time that its weights take."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dybit.cli import sources
from dybit.cli.console import grid, note, out, progress

if TYPE_CHECKING:
    from torch import Tensor

_PROMPT, _TOKENS, _ROUNDS = 512, 64, 5


@dataclass(frozen=True)
class Rates:
    """Tokens a second.

    Attributes:
        prompt: Of a prompt.
        decode: Of ``generate`` after it, one sequence, greedily.
        floor: Of ``decode``, if memory alone limited it: the bandwidth that was measured over the bytes of weights that
            a token reads. None if the model is not fused as a decoder.
    """

    prompt: float
    decode: float
    floor: float | None


def bench_generation(directory: str, json: Path | None) -> None:
    """Times a model as it is and fused, and prints a table.

    Args:
        directory: A transformers directory of a language model.
        json: The file to write the figures to, or None.
    """
    from dybit import fuse
    from dybit.layers.quantized import is_fused
    from dybit.measure.timing import machine
    from dybit.safe_files import write_json

    model = sources.load_language_model(directory, "--generate")
    found = {}
    with progress("timing", 2) as bar:
        for index, (name, contestant) in enumerate((("as it is", model), ("fused", fuse(model)))):
            bar.update(index, 2, name)
            if name == "fused" and not is_fused(contestant):
                note("the model has nothing to fuse")
                continue
            found[name] = rates(contestant)
    table = grid("model", ">prompt tokens/s", ">decode tokens/s", ">of the floor")
    for name, rate in found.items():
        share = "" if rate.floor is None else f"{rate.decode / rate.floor:.0%}"
        table.add_row(name, f"{rate.prompt:.0f}", f"{rate.decode:.1f}", share)
    out().print(f"{directory} on {machine()}", style="bold", soft_wrap=True)
    out().print(table)
    if json is not None:
        write_json(json, {"machine": asdict(machine()), "rates": {name: asdict(rate) for name, rate in found.items()}})


def rates(model: Any, prompt: int = _PROMPT, tokens: int = _TOKENS, rounds: int = _ROUNDS) -> Rates:  # noqa: ANN401
    """Times a language model of transformers.

    Args:
        model: The model.
        prompt: Tokens of the prompt; fewer if the model has fewer positions.
        tokens: Tokens that are generated.
        rounds: How often; medians count.
    """
    import torch

    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", prompt + tokens)
    prompt, tokens = min(prompt, max(1, longest // 2)), min(tokens, max(2, longest // 4))
    ids = torch.randint(3, config.vocab_size, (1, prompt), dtype=torch.int64, device="cpu")
    short = ids[:, : min(16, prompt)]
    times: dict[str, list[float]] = {"prompt": [], "decode": []}
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first touches fresh memory
            start = time.perf_counter()
            model(ids, logits_to_keep=1)
            middle = time.perf_counter()
            first = _generate(model, short, 1)
            times["prompt"].append(middle - start)
            times["decode"].append((_generate(model, short, tokens) - first) / (tokens - 1))
    prompt_seconds, decode_seconds = (statistics.median(values[1:]) for values in times.values())
    read = getattr(model, "weight_bytes", None)
    floor = None if read is None else bandwidth(read) / read
    return Rates(prompt / prompt_seconds, 1 / max(decode_seconds, 1e-9), floor)


def _generate(model: Any, ids: Tensor, count: int) -> float:  # noqa: ANN401
    """Returns the seconds in which a model generates some tokens."""
    import torch

    start = time.perf_counter()
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0)
    return time.perf_counter() - start


def bandwidth(count: int) -> float:
    """Measures how fast the kernels' threads read memory.

    Args:
        count: Bytes that they read at a time.

    Returns:
        Bytes a second, of the best of five tries.
    """
    import torch

    from dybit.kernels import extension
    from dybit.kernels.arguments import address

    count = max(count, 1 << 26)  # more than the caches hold
    memory = torch.zeros(count, dtype=torch.uint8, device="cpu")
    where, best = address("memory", memory, torch.uint8, (count,)), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        extension.read_all(where, count, torch.get_num_threads())
        best = min(best, time.perf_counter() - start)
    return count / best
