"""How a draft tree grows: nothing is drafted after what ends the text, and previews overrule drafts."""

import math

import torch

from subspec.speculation.calibration import Calibration
from subspec.speculation.growth import CHILDREN, Growth
from subspec.speculation.sampling import Sampler, SamplingParams
from subspec.speculation.tree import DraftTree
from subspec.speculation.verify import Walk

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


def previewed(logits: torch.Tensor, capacity: int = 100) -> tuple[Growth, Calibration]:
    """The tree of ``grown`` with its root in a sweep, of which a preview says this."""
    growth = grown(())
    growth.capacity = capacity
    growth.verified = frozenset([0])
    calibration = Calibration(temperature=0.1)
    growth.preview([0], logits, calibration, 0.0)
    return growth, calibration


def test_a_preview_takes_the_place_of_what_the_draft_said() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3], logits[0, 12] = 5.0, 4.0
    growth, calibration = previewed(logits)
    children = growth.tree.children_of(0)
    scores = {token: growth.tree.scores[node] for token, node in children.items()}
    assert max(scores, key=scores.__getitem__) == 3
    assert scores[3] > -0.1
    assert scores[END] <= math.log(calibration.miss), "neither the draft's favourite nor this one's"
    assert 12 in children, "a child that the draft did not think of"
    assert growth.frontier(1)[0] == [children[3]]


def test_of_equals_the_target_takes_the_first() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [4, 3, 9]] = 5.0
    growth, _ = previewed(logits)
    children, scores = growth.tree.children_of(0), growth.tree.scores
    assert scores[children[3]] > scores[children[4]] > scores[children[9]]


def test_a_preview_adds_no_more_than_there_is_room_for() -> None:
    before = len(grown(()).tree)
    growth, _ = previewed(torch.randn(1, VOCABULARY), capacity=before + CHILDREN - 1)
    assert len(growth.tree) == before


def test_previews_learn_from_the_walk_and_drafts_go_on_learning_theirs() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3] = 5.0
    growth, calibration = previewed(logits)
    growth.learn(Walk([0], [3]))
    assert calibration.observations == growth.calibration.observations == 1
    assert calibration.reliability.kept[-1] == 1


def test_only_nodes_whose_children_could_be_used_are_previewed() -> None:
    growth = grown((END,))
    nodes = list(range(len(growth.tree)))
    found = growth.open_below(nodes, 100)
    assert [growth.tree.tokens[node] for node in nodes if node not in found] == [END]
    assert growth.open_below(nodes, 2) == [0, growth.tree.children_of(0)[3]]
    growth.max_depth = 1
    assert growth.open_below(nodes, 100) == [0]
