"""How a draft tree grows: nothing is drafted after what ends the text."""

import torch

from subspec.speculation.calibration import Calibration
from subspec.speculation.growth import Growth
from subspec.speculation.sampling import Sampler, SamplingParams
from subspec.speculation.tree import DraftTree

END, VOCABULARY = 7, 20


def grown(ends: tuple[int, ...]) -> Growth:
    """A tree whose root is likeliest followed by the end token, then by 3."""
    sampler = Sampler(SamplingParams(), [1], ends=ends)
    growth = Growth(DraftTree.rooted(1, 10), sampler, Calibration(), 100, 8)
    assert growth.frontier(4)[0] == [0]
    logits = torch.zeros(1, VOCABULARY)
    logits[0, END], logits[0, 3] = 5.0, 4.0
    growth.forward([0])
    growth.take([0], logits, 0.1, 0.001)
    return growth


def test_the_likeliest_child_is_not_forwarded_if_it_ends_the_text() -> None:
    growth = grown((END,))
    nodes, chances = growth.frontier(4)
    tokens = [growth.tree.tokens[node] for node in nodes]
    assert tokens[0] == 3
    assert END not in tokens
    assert END in growth.tree.tokens  # it is verified like any other
    assert chances == sorted(chances, reverse=True)


def test_it_is_if_the_text_goes_on() -> None:
    growth = grown(())
    assert growth.tree.tokens[growth.frontier(4)[0][0]] == END


def test_a_proposed_chain_ends_there() -> None:
    for ends, expected in (((END,), [1, 2, END]), ((), [1, 2, END, 4])):
        sampler = Sampler(SamplingParams(), [1], ends=ends)
        growth = Growth(DraftTree.rooted(1, 10), sampler, Calibration(), 100, 8)
        growth.propose([2, END, 4], [0.9, 0.9, 0.9], 0.01)
        assert growth.tree.tokens == expected


def test_a_root_is_drafted_whatever_it_is() -> None:
    sampler = Sampler(SamplingParams(), [END], ends=(END,))
    growth = Growth(DraftTree.rooted(END, 10), sampler, Calibration(), 100, 8)
    assert growth.frontier(4)[0] == [0]
