"""``dybit chat``: a conversation with a language model in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dybit.cli import sources
from dybit.cli.console import guarded, note
from dybit.errors import DyBitError


@guarded
def chat(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A model with its tokenizer, as save_pretrained writes it.")
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of torch threads. [torch's default]")] = None,
) -> None:
    """Chat with a language model. A line is a message; an empty line or the end of the input ends the conversation.

    A quantized model is fused first: a token is one call of the kernels.

    Example: dybit chat out
    """
    import torch

    from dybit import fuse
    from dybit.layers.quantized import quantized_layers

    if threads is not None:
        torch.set_num_threads(threads)
    model = sources.load_language_model(directory, "DIR")
    tokenizer = _tokenizer(directory)
    if quantized_layers(model):
        model = fuse(model)
    sampling = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})
    turns: list[dict[str, str]] = []
    note("type a message; an empty line ends the conversation")
    while message := _line():
        turns.append({"role": "user", "content": message})
        answer = _answer(model, tokenizer, turns, max_new_tokens=max_tokens, **sampling)
        turns.append({"role": "assistant", "content": answer})


def _tokenizer(directory: str) -> Any:  # noqa: ANN401
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DyBitError(f"the tokenizer of {directory!r} cannot be loaded: {error}") from None
    if not tokenizer.chat_template:
        raise DyBitError(f"the tokenizer of {directory!r} has no chat template")
    return tokenizer


def _line() -> str:
    """Returns a line of the input without blanks around it; empty at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _answer(model: Any, tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> str:  # noqa: ANN401
    """Prints the answer to the last message while it is generated, and returns it."""
    import torch
    from transformers import TextStreamer

    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    given = {"attention_mask": torch.ones_like(inputs.input_ids), "pad_token_id": pad}
    with torch.inference_mode():
        ids = model.generate(inputs.input_ids, streamer=streamer, **given, **options)
    return str(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
