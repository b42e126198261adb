"""Sequence parallelism: the tokens of one sample spread over the processes of a group, with exact gradients.

    tokens [B, L, D] ── split ──► blocks on [B, l, D], attention by one of the methods ── gather ──► [B, L, C]

    sp processes share a sequence, dp of these groups share a batch; the world is dp × sp, sp innermost
    B batch, L tokens, l tokens of one process (padding included), D hidden, H heads, h heads of one process, K head dim

Blocks that alternate between the tokens of a frame and the frames of a token have no attention to spread: for them the
layout is switched (`switch.py`). Each method is one file here that ends in ``METHOD``; files are discovered.

Gradient contract (`collectives.py`): after backward, the mean of the gradients over all dp × sp processes is the
gradient that one device would have computed, for every parameter. So DDP over the world needs no scaling of the loss.
"""

from opendit.fastseq.method import Method, Projection, SelfAttention, methods
from opendit.fastseq.sequence import Sequence

__all__ = ["Method", "Projection", "SelfAttention", "Sequence", "methods"]
