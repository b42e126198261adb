"""Engines: who divides a model's parameters, gradients and optimizer states among processes, and averages gradients.

    accelerate: … apply (the faster forward) ── place (an engine) ──► the pair that the plain loop trains

No engine is made here; each file puts the model on one that exists, and ends in ``ENGINES``. Files are discovered.
`docs/engines.md` says which is for what.
"""

from opendit.engines.engine import Engine, Placed, Setup, engines, find

__all__ = ["Engine", "Placed", "Setup", "engines", "find"]
