# %% [markdown]
# # dybit from the format to a file that another runtime runs
#
#     pip install "dybit[demo,search,report,onnx]"
#     python examples/walkthrough.py [DIRECTORY]
#
# A network for MNIST-1D is trained in FP32, quantized to 3-bit weights, first to the nearest codes and then by GPTQ;
# a search then gives every layer its own width for a budget of bytes. Cells are marked for editors that run them one
# by one. Takes about a minute on one core; everything is written to DIRECTORY, by default a temporary one.

# %%
import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional

import dybit
from dybit.demo import mnist1d
from dybit.demo.classifiers import SignalCNN
from dybit.measure.fidelity import compare_models
from dybit.mixed_precision.run_directory import write_run
from dybit.onnx import export

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="dybit-"))
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The format
# A code is a sign and a magnitude whose exponent is a run of leading ones: small numbers are evenly spaced, large ones
# ever wider apart. `max_run` says how soon, and so trades precision for range within the same bits.

# %%
for name in ("s4r1", "s4r2", "s4", "s4r2mid"):
    values = sorted({abs(value) for value in dybit.Format.parse(name).values})
    print(f"{name:8s} ±", *(f"{value:g}" for value in values))

# %% [markdown]
# ## A model, trained as usual


# %%
def train(model: torch.nn.Module, epochs: int) -> None:
    """Adam with a falling rate."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 40)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(4000).split(100):
            optimizer.zero_grad()
            functional.cross_entropy(model(train_x[part]), train_y[part]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    """Percent of the test set."""
    return 100 * float((model(test_x).argmax(1) == test_y).float().mean())


train_x, train_y, test_x, test_y = mnist1d()
exact = SignalCNN()
train(exact, epochs=20)
calibration, held_out = list(train_x[:1000].split(100)), [test_x]
print(f"FP32: {accuracy(exact):.1f} % right")

# %% [markdown]
# ## Quantize it, two ways
# The recipe is the one document that everything exchanges. The first and the last layer keep 8 bits.

# %%
ends = {"weights": 8, "activations": 8}
recipe = dybit.Recipe(weights=3, activations=4, rules={"features.0": ends, "head": ends})
models = {}
for algorithm in ("rtn", "gptq"):
    models[algorithm] = dybit.quantize_(copy.deepcopy(exact), recipe, calibration, algorithm=algorithm)
    found = compare_models(exact, models[algorithm], held_out)
    print(f"W3A4 {algorithm}: {accuracy(models[algorithm]):.1f} % right, {found.sqnr:.1f} dB from FP32")

# %% [markdown]
# ## Save it, load it
# Codes, scales and the recipe, as safetensors and JSON; the loaded model computes the same, bit for bit.

# %%
dybit.save(models["gptq"], folder / "w3a4")
again = dybit.load(folder / "w3a4", SignalCNN())
assert torch.equal(again(test_x), models["gptq"](test_x))
size = (folder / "w3a4" / "model.safetensors").stat().st_size
print(f"checkpoint: {size} bytes, {4 * sum(p.numel() for p in exact.parameters())} in FP32")

# %% [markdown]
# ## Let a search choose the widths
# Every layer's sensitivity is measured, a mixed-integer program spends the bytes where they matter, and the answer is
# verified on the quantized model. The report is one HTML page.

# %%
budget = sum(parameter.numel() for parameter in exact.parameters()) // 2  # bytes: 4 bits a weight, with scales
result = dybit.search(
    exact,
    calibration,
    constraint=dybit.MaxSize(budget),
    candidates=["8/8", "6/8", "4/8", "3/8", "2/8"],
    pareto=6,
    cache=folder / "cache",
)
best = dybit.quantize_(copy.deepcopy(exact), result.recipe, calibration)
print(f"searched: {result.point.measured['size']:.0f} bytes of {budget}, {accuracy(best):.1f} % right")
write_run(result, folder / "run", model="SignalCNN")
subprocess.run([sys.executable, "-m", "dybit", "report", folder / "run", "-o", folder / "report.html"], check=True)

# %% [markdown]
# ## Hand it to another runtime
# The export is run beside the model before the file is kept.

# %%
done = export(best, folder / "searched.onnx", calibration)
print(f"{done.path.name}: {done.nbytes} bytes, differs by {done.check.difference:.1g} of the largest output")
print(f"all of it is in {folder}")
