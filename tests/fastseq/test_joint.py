"""Image and text beside each other over processes: what is particular to that, and mistakes that must be seen."""

from __future__ import annotations

import pytest

from tests.fastseq import joining
from tests.launch import of_every_rank


def found(case: str):
    return of_every_rank("tests.fastseq.behaving", 2, f"joint, {case}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3.5", "flux"])
def test_compiled_in_one_graph(name: str):
    assert max(of_every_rank("tests.fastseq.joining_slow", 2, name)) <= 1e-10


@pytest.mark.parametrize("mutant", joining.MUTANTS)
def test_mistakes_are_seen(mutant: str):
    for seen in found(f"wrong/{mutant}"):
        if mutant == "none":
            assert seen <= 1e-10
        else:
            assert isinstance(seen, str) or seen >= 1e-2


@pytest.mark.parametrize("name", ["sd3.5", "flux"])
def test_two_collectives_a_layer_each_way_whatever_the_streams(name: str):
    """And one gather of the image at the end; in the backward, one for each stream at the beginning."""
    for forward, backward, layers in found(f"calls/{name}"):
        assert forward == [*["all_to_all_single"] * 2 * layers, "gather"]
        assert backward == [*["all_to_all_single"] * 2 * layers, "gather", "gather"]


def test_explain_says_what_is_split_and_why_not_fastseq():
    for text in found("explain"):
        assert "gets its process's part of image and text" in text
        assert "its output is gathered" in text
        assert "chosen by auto" in text
        assert "fastseq" not in text


SAID = {
    "fastseq": "sequence_parallel: got 'fastseq', but image and text have projections of their own",
    "last norm": "sp_size: the tokens of norm_out can't be spread over processes: it is left to upstream",
    "text's norm": "the tokens of transformer_blocks.1.norm1_context can't be spread",
    "controlnet": "sp_size: block_controlnet_hidden_states are added to all tokens between blocks",
    "skipped": "sp_size: skip_layers leaves the first block out",
    "controlnet of flux": "sp_size: controlnet_single_block_samples are added to all tokens between blocks",
    "arguments": "a mask or other arguments were given",
    "positions": "positions of 16 tokens were given for sequences of [5, 9]",
    "positions of a part": "rotary positions: got 5 rows for a sequence of 9 tokens",
    "a block alone": "its block does not say how much of its input is text",
    "upstream's block": "its block does not say how much of its input is text",
}


@pytest.mark.parametrize("what", SAID)
def test_refused_by_name(what: str):
    for said in found("refusals"):
        assert SAID[what] in said[what]
