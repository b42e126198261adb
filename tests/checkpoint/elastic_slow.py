"""All pairs of configurations, for the slow test."""

import functools

from tests.checkpoint import elastic


def cases(world):
    return {"all": functools.partial(elastic.told, elastic.ALL)}
