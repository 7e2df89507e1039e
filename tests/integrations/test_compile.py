"""torch.compile and torch.export of whole quantized models: one graph, any batch size, the same results."""

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

import dybit
from dybit.kernels import extension
from dybit.layers.quantized import quantized_layers

FIELDS = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0}
MODELS = {
    "llama": ("Llama", {**FIELDS, "num_hidden_layers": 1, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "bert": ("Bert", {**FIELDS, "num_hidden_layers": 1}),
}
RECIPES = {
    "weights": {"weights": 4, "group_size": 16},
    "dynamic": {"weights": 4, "activations": "int8", "activation_mode": "dynamic"},
    "static": {"weights": 3, "activations": 8},
}


def tokens(batch, length=6):
    return torch.randint(0, 53, (batch, length))


def build(name, recipe):
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**fields, use_cache=False, attn_implementation="sdpa")
    model = getattr(transformers, "LlamaForCausalLM" if kind == "Llama" else "BertModel")(config).eval()
    return dybit.quantize_(model, dybit.Recipe(**RECIPES[recipe]), calibration=[{"input_ids": tokens(2)}])


class Only(torch.nn.Module):
    """The first output of a model as a function of tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_any_batch(name, recipe):
    model = Only(build(name, recipe))
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 5):
            ids = tokens(batch)
            torch.testing.assert_close(compiled(ids), model(ids))
    assert counter.frame_count == 1  # no graph break, no second compilation


def test_gradients_through_a_compiled_model():
    model = build("llama", "weights").requires_grad_(False)
    x = torch.randn(2, 3, 32, requires_grad=True)
    compiled = torch.compile(
        lambda x: model(inputs_embeds=x).logits.square().mean(), fullgraph=True, backend="aot_eager"
    )
    (found,) = torch.autograd.grad(compiled(x), x)
    (wanted,) = torch.autograd.grad(model(inputs_embeds=x).logits.square().mean(), x)
    torch.testing.assert_close(found, wanted)


def test_export_holds_the_codes():
    model = Only(build("llama", "weights"))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (tokens(2),), dynamic_shapes={"ids": {0: batch}})
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    layers = quantized_layers(model)
    assert targets.count("dybit.linear.default") == len(layers) - 1  # the embedding is looked up
    sizes = {name: buffer.dtype for name, buffer in program.named_buffers()}
    assert sizes["model.model.layers.0.mlp.up_proj.weight"] == torch.uint8
    with torch.no_grad():
        for size in (1, 4):
            ids = tokens(size)
            torch.testing.assert_close(program.module()(ids), model(ids))


def test_exported_programs_are_saved(tmp_path):
    model = Only(build("bert", "dynamic"))
    program = torch.export.export(model, (tokens(2),))
    torch.export.save(program, tmp_path / "model.pt2")
    ids = tokens(2)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(ids), model(ids))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.skipif(extension.isa() == extension.FALLBACK, reason="needs a compiler")
def test_inductor_and_its_packages(tmp_path):
    model = Only(build("bert", "weights"))
    program = torch.export.export(
        model, (tokens(2),), dynamic_shapes={"ids": {0: torch.export.Dim("batch", min=1, max=64)}}
    )
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for size in (2, 5):
            ids = tokens(size)
            torch.testing.assert_close(package(ids), model(ids), rtol=1e-4, atol=1e-5)
