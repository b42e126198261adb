"""All pairs of configurations, for the slow test."""

from tests.checkpoint import elastic


def cases(world):
    return {"all": elastic.every_pair}
