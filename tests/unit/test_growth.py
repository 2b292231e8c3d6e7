"""How a draft tree grows: nothing is drafted after what ends the text, and previews overrule drafts."""

import math
import random

import pytest
import torch

from subspec.speculation.calibration import Calibration
from subspec.speculation.growth import CHILDREN, Growth
from subspec.speculation.recycled import Recycled
from subspec.speculation.sampling import Sampler, SamplingParams
from subspec.speculation.tree import DraftTree
from subspec.speculation.verify import Walk

END, VOCABULARY = 7, 20


def grown(ends: tuple[int, ...]) -> Growth:
    """A tree whose root is likeliest followed by the end token, then by 3."""
    sampler = Sampler(SamplingParams(), [1], ends=ends)
    growth = Growth(DraftTree.rooted(1, 10), sampler, Calibration(), 100, 8, 100)
    assert forwarded(growth, 4) == [0]
    logits = torch.zeros(1, VOCABULARY)
    logits[0, END], logits[0, 3] = 5.0, 4.0
    growth.take([0], logits, 0.1, 0.001)
    return growth


def forwarded(growth: Growth, most: int) -> list[int]:
    """Open and forward all that the frontier has."""
    nodes = growth.open(growth.frontier(most)[0])
    if nodes:
        growth.forward(nodes)
    return nodes


def test_the_likeliest_child_is_not_forwarded_if_it_ends_the_text() -> None:
    growth = grown((END,))
    openings, chances = growth.frontier(4)
    tokens = [one.token for one in openings]
    assert tokens[0] == 3
    assert END not in tokens
    assert END in growth.tree.tokens  # it is there to tell how probable the end is
    assert chances == sorted(chances, reverse=True)


def test_an_end_is_worth_something_after_its_parent_and_is_not_verified() -> None:
    growth = grown((END,))
    tree = growth.tree
    nodes = growth.likeliest()
    assert END not in [tree.tokens[node] for node in nodes]
    assert len(nodes) == len(tree) - 1
    reached = [math.exp(tree.scores[node]) for node in nodes]
    assert growth.worth() == reached == sorted(reached, reverse=True)
    end = math.exp(tree.scores[tree.children_of(0)[END]])
    assert end > 0.5
    assert growth.worth(10.0) == [pytest.approx(reached[0] + 10 * end), *reached[1:]]
    assert len(grown(()).likeliest()) == len(tree), "where nothing ends the text, it is a node like others"


@pytest.mark.parametrize("remaining", [2, 3])
def test_the_token_that_fills_the_text_is_worth_more(remaining: int) -> None:
    growth = grown(())
    growth.remaining = remaining
    fills = remaining == 2  # the children of the root, with the target's token after them
    reached, worth = growth.worth(), growth.worth(10.0)
    assert worth[0] == reached[0] == 1
    assert worth[1:] == pytest.approx([(11 if fills else 1) * score for score in reached[1:]])
    openings = growth.frontier(4)[0]
    assert [growth.levels_left(one) for one in openings] == [1] * len(openings)
    assert fills == (not openings), "nothing is drafted that the text has no room for"
    growth.remaining = 100
    assert growth.levels_left(growth.frontier(4)[0][0]) is None, "the tree is not deep enough to fill it"


def test_it_is_if_the_text_goes_on() -> None:
    growth = grown(())
    assert growth.frontier(4)[0][0].token == END


def test_a_proposed_chain_ends_there() -> None:
    for ends, expected in (((END,), [1, 2, END]), ((), [1, 2, END, 4])):
        sampler = Sampler(SamplingParams(), [1], ends=ends)
        growth = Growth(DraftTree.rooted(1, 10), sampler, Calibration(), 100, 8, 100)
        growth.propose([2, END, 4], [0.9, 0.9, 0.9], 0.01)
        assert growth.tree.tokens == expected


def test_a_root_is_drafted_whatever_it_is() -> None:
    sampler = Sampler(SamplingParams(), [END], ends=(END,))
    growth = Growth(DraftTree.rooted(END, 10), sampler, Calibration(), 100, 8, 100)
    assert [one.node for one in growth.frontier(4)[0]] == [0]


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
    assert [one.node for one in growth.frontier(1)[0]] == [children[3]]


def test_where_a_later_draft_differs_from_a_preview_the_tree_has_both_tokens() -> None:
    growth = grown(())
    leaf = growth.tree.children_of(0)[3]
    growth.verified = frozenset([0, leaf])
    said = torch.zeros(1, VOCABULARY)
    said[0, 12] = 9.0
    calibration = Calibration(temperature=0.1, miss=0.001)
    growth.tree.add(5, leaf, growth.tree.scores[leaf])  # guessed elsewhere
    growth.preview([leaf], said, calibration, 0.0)
    children, scores = growth.tree.children_of(leaf), growth.tree.scores
    assert scores[children[5]] == pytest.approx(scores[leaf] + math.log(calibration.miss)), (
        "by its own misses"
    )
    growth.forward(growth.open([one for one in growth.frontier(8)[0] if one.node == leaf]))
    other = torch.zeros(1, VOCABULARY)
    other[0, 9] = 9.0
    growth.take([leaf], other, 0.1, 0.001)
    assert {9, 12} <= growth.tree.children_of(leaf).keys()


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
    growth.remaining = 2
    assert growth.open_below(nodes, 100) == [0]


def guessing(text: list[int], ends: tuple[int, ...] = (), depth: int = 8) -> Growth:
    """A tree of the text's last token, with what the text tells of successors."""
    sampler = Sampler(SamplingParams(), [1], ends=ends)
    growth = Growth(DraftTree.rooted(text[-1], 10), sampler, Calibration(), 100, depth, 100)
    growth.recycled = Recycled(text)
    return growth


def test_a_pass_tries_what_followed_before_and_goes_on_where_it_is_right() -> None:
    growth = guessing([1, 2, 3, 4, 5, 1, 2])
    openings, chances = growth.frontier(4)
    assert [one.token for one in openings] == [2, 3, 4, 5]
    assert chances == sorted(chances, reverse=True)
    assert len(growth.tree) == 1, "a guess that is not tried is no node"
    nodes = growth.open(openings[:3])
    rows = growth.forward(nodes)
    assert rows.tokens.tolist() == [2, 3, 4]
    assert rows.path_lens.tolist() == [1, 2, 3]
    logits = torch.zeros(3, VOCABULARY)
    logits[0, 3], logits[1, 8], logits[2, 9] = 9.0, 9.0, 9.0  # the first guess is right, the second is not
    growth.take(nodes, logits, 0.1, 2 * growth.calibration.miss)
    tree = growth.tree
    assert tree.scores[nodes[1]] > -0.1
    assert tree.scores[nodes[2]] < -3
    assert tree.children_of(nodes[2]) == {}, "nothing grows below a wrong guess"
    assert growth.frontier(1)[0][0].node == tree.children_of(nodes[1])[8]


def test_guesses_keep_to_the_depth_and_to_what_goes_on() -> None:
    text = [1, 2, 3, 4, 5, 1, 2]
    assert [one.token for one in guessing(text, ends=(4,)).frontier(8)[0]] == [2, 3]
    assert [one.token for one in guessing(text, depth=3).frontier(8)[0]] == [2, 3, 4]
    assert [one.token for one in guessing([1, 2]).frontier(8)[0]] == [2]


def test_what_a_text_took_counts_for_the_next_guess_and_goes_over_to_the_next_tree() -> None:
    growth = guessing([1, 2, 3, 1])
    growth.take(forwarded(growth, 1), torch.eye(VOCABULARY)[[6]] * 9, 0.1, 0.01)
    walk = Walk([0], [9])
    growth.learn(walk)
    following, _ = growth.continue_from(walk, None)
    found = following.recycled.guess([3, 1], lambda tokens: [0.0] * len(tokens))
    assert found is not None
    assert found.token == 9


def test_the_frontier_has_room_for_what_it_opens_and_parents_come_first() -> None:
    chance = random.Random(4)
    for capacity in (10, 20, 40, 80):
        growth = guessing([chance.randrange(4) for _ in range(60)])
        growth.capacity = capacity
        for turn in range(12):
            if turn == 3:  # a sweep begins: each of its nodes that is forwarded takes a shadow as well
                growth.verified = frozenset(range(len(growth.tree)))
            nodes = forwarded(growth, chance.randint(1, 6))
            for node in nodes:
                parent = growth.tree.parents[node]
                assert parent not in nodes or nodes.index(parent) < nodes.index(node)
            if not nodes:
                break
            logits = (0.1, 1.0)[turn % 2] * torch.randn(len(nodes), VOCABULARY)  # flat: with all children
            growth.take(nodes, logits, 0.1, 0.0)
            assert len(growth.tree) + len(growth.tree.shadows) <= capacity
