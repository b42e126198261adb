"""Cases for the slow part of `test_alternating`: every number of frames with every number of tokens."""

from tests.fastseq.alternating import every_shape as cases

__all__ = ["cases"]
