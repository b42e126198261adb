"""Copies of a source file with something broken in them, to see that a check notices.

A mutant is the present source with one place replaced, so it stays in step with the code; a replacement that no longer
matches is an error, not a pass.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch

Edit = tuple[str, str, int]
"""What is replaced, by what, how often it occurs."""


def load_mutant(
    module: ModuleType, edits: Iterable[Edit], folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str = ""
) -> ModuleType:
    """`module`'s file with the edits made, imported from a copy in `folder`. It registers no operators."""
    path = Path(module.__file__ or "")
    source = path.read_text()
    for old, new, count in edits:
        assert source.count(old) == count, f"{path.name}: {old!r} occurs {source.count(old)} times, not {count}"
        source = source.replace(old, new)
    copy = folder / f"mutant_{path.stem}{suffix}.py"
    copy.write_text(source)
    located = importlib.util.spec_from_file_location(copy.stem, copy)
    assert located is not None
    assert located.loader is not None
    mutant = importlib.util.module_from_spec(located)
    monkeypatch.setitem(sys.modules, copy.stem, mutant)
    with monkeypatch.context() as patch:
        for register in ("custom_op", "triton_op"):
            patch.setattr(torch.library, register, lambda *_, **__: _NoOperator())
        located.loader.exec_module(mutant)
    return mutant


class _NoOperator:
    """Stands for an operator, and for the decorator that makes one."""

    def __call__(self, function: Callable) -> _NoOperator:
        return self

    def register_fake(self, fake: Callable) -> None: ...

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None: ...
