"""The examples run as a user would run them, with small settings."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dybit

EXAMPLES = Path(__file__).parent.parent / "examples"
TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"


def script(name, *arguments, launcher=()):
    """Runs an example in a process of its own and returns what it printed."""
    command = [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_tested():
    tested = {"chat_server.py", "train_distributed.py", "walkthrough.py", "search_on_dask.py"}
    assert {file.name for file in EXAMPLES.glob("*.py")} == tested


def test_walkthrough(tmp_path):
    printed = script("walkthrough.py", tmp_path)
    assert "W3A4 gptq" in printed and "searched:" in printed
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert {"w3a4", "run", "searched.onnx"} <= {file.name for file in tmp_path.iterdir()}


def test_training_on_two_processes(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = script("train_distributed.py", "-o", tmp_path / "out", "--epochs", 3, 1, launcher=launcher)
    assert "trained with 3 bits" in printed and "bytes" in printed
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_search_on_a_cluster_imports():
    # What it does, an executor of Dask under a search, is tested in test_sensitivity.py on a small model.
    spec = importlib.util.spec_from_file_location("search_on_dask", EXAMPLES / "search_on_dask.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("chat_server", EXAMPLES / "chat_server.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["chat_server"] = module  # where pydantic looks up annotations
    spec.loader.exec_module(module)
    words = ["<end>", "<unknown>", "system", "user", "assistant", *(f"w{i}" for i in range(27))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", chat_template=TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=31, pad_token_id=0,
    )  # fmt: skip
    model = dybit.quantize_(LlamaForCausalLM(config).eval(), dybit.Recipe(weights=4, group_size=16))
    yield TestClient(module.create_app(model, tokenizer, "tiny"))
    del sys.modules["chat_server"]


def ask(client, **fields):
    body = {"messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 6} | fields
    return client.post("/v1/chat/completions", json=body)


def test_chat(client):
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["tiny"]
    answer = ask(client, model="tiny").json()
    choice, usage = answer["choices"][0], answer["usage"]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] and choice["finish_reason"] == "length"
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 6, 9)
    assert ask(client).json()["choices"] == answer["choices"]  # nothing is drawn by lot at temperature 0
    assert ask(client, temperature=1.0, top_p=0.9).status_code == 200


def test_chat_streams_the_same_text(client):
    lines = ask(client, stream=True).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == ask(client).json()["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "w1"}]}, 400, "messages.0.role"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"n": 2}, 400, "n: "),
        ({"model": "other"}, 404, "'other'"),
        ({"max_tokens": 64}, 400, "max_tokens=64"),
    ],
)
def test_chat_refuses(client, fields, status, text):
    answer = ask(client, **fields)
    assert answer.status_code == status and text in answer.json()["error"]["message"]


def test_chat_refuses_what_is_no_json(client):
    answer = client.post("/v1/chat/completions", content="{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "error" in answer.json()
