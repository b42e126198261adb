"""What `python -m opendit info` says: hardware, versions, and what of opendit can run on this machine, or why not."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

import opendit
from opendit import attention, engines
from opendit.fastseq import methods
from opendit.kernels import backend, fp8, spec
from opendit.patch.registry import families

_PACKAGES = (
    *("torch", "triton", "flash-attn", "flash-attn-4", "apex", "diffusers", "timm", "transformers", "safetensors"),
    *("colossalai", "peft", "accelerate", "lightning"),
)


def lines() -> Iterator[str]:
    """The page, line by line. Nothing is computed on a device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"opendit {opendit.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield from _devices()
    yield "packages"
    for name in _PACKAGES:
        version = _version(name)
        if version is not None:
            yield f"  {name} {version}"
    yield f"absent: {', '.join(name for name in _PACKAGES if _version(name) is None) or 'none of those it can use'}"
    yield f"kernels, on {device.type}"
    for kernel in sorted(spec.discover()):
        reason = backend.unavailable("triton", device, kernel)
        yield f"  {kernel}: {'triton' if reason is None else f'reference; {reason}'}"
    reason = fp8.unavailable(device)
    yield f"  products in 8 bits: {'yes' if reason is None else f'no; {reason}'}"
    yield f"attention, on {device.type}"
    for name in attention.backend_names():
        reason = attention.backend_unavailable(name, device)
        yield f"  {name}: {'yes' if reason is None else f'no; {reason}'}"
    yield f"sequence parallel: {', '.join(sorted(methods()))}"
    for source in sorted({source for source, _ in engines.engines()}):
        yield f"plugins of {source}: {', '.join(sorted(n for s, n in engines.engines() if s == source))}"
    yield f"families: {', '.join(sorted(families()))}, generic"


def _devices() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield f"no CUDA device; {torch.get_num_threads()} CPU threads"
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / 2**30
        yield f"GPU {index}: {facts.name}, compute capability {facts.major}.{facts.minor}, {memory:.0f} GiB"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
