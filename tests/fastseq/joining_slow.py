"""Cases for the slow part of `test_joint`: whole models compiled."""

from tests.fastseq.joining import compiled_cases as cases

__all__ = ["cases"]
