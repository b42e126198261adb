"""Cases for the slow part of `test_whole_models`: every model, layout, method, checkpointing and accumulation."""

from tests.fastseq.whole_models import every_case as cases

__all__ = ["cases"]
