"""One function for softmax attention, several kernels behind it.

    attend(q, k, v)[b, i, h] = Σ_j softmax_j(scale · q[b, i, h] · k[b, j, h] + mask[b, h, i, j]) · v[b, j, h]

    B batch, Lq queries, Lk keys (L where they are equal), H heads, K channels of a head
    q [B, Lq, H, K], k and v [B, Lk, H, K], mask broadcastable to [B, H, Lq, Lk], result [B, Lq, H, K]

A kernel is taken by name (`backend_names()`), or by ``backend="auto"`` from a measured table (`choice.py`). A named
backend that cannot do what is asked raises; nothing is swapped, dropped or approximated behind the caller's back.
A new backend is one record in `backends.py`.
"""

from opendit.attention.backends import BACKENDS, Backend, backend_names, backend_unavailable
from opendit.attention.choice import Choice, choices_made, choose, choose_backend
from opendit.attention.dispatch import attend

__all__ = [
    "BACKENDS",
    "Backend",
    "Choice",
    "attend",
    "backend_names",
    "backend_unavailable",
    "choices_made",
    "choose",
    "choose_backend",
]
