"""The prefix tree: nothing lost, nothing twice."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tracer.replay.tree import PrefixTree, build_tree

# Few different tokens, so that sequences often begin alike.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6)


def prefixes(sequences: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    return {tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))}


def spelled(tree: PrefixTree) -> list[list[int]]:
    return [tree.token_ids[places].tolist() for places in tree.sequences]


@given(SEQUENCES)
def test_every_prefix_is_there_once_and_sequences_come_back(sequences: list[list[int]]) -> None:
    tree = build_tree(sequences)
    assert spelled(tree) == sequences
    assert len(tree) == len(prefixes(sequences))
    for places in tree.sequences:
        assert tree.positions[places].tolist() == list(range(len(places)))


@given(SEQUENCES, st.integers(1, 4), st.lists(st.integers(0, 12), max_size=4))
def test_cuts_change_nodes_but_no_tokens(sequences: list[list[int]], longest: int, at: list[int]) -> None:
    tree = build_tree(sequences, cuts=[at for _ in sequences], longest=longest)
    assert spelled(tree) == sequences
    assert len(tree) == len(prefixes(sequences))
    assert max(len(node.token_ids) for node in tree.nodes) <= longest
    starts = {node.position for node in tree.nodes}
    for node in tree.nodes:
        assert not any(node.position < cut < node.position + len(node.token_ids) for cut in at)
        assert node.parent is None or node.parent.number < node.number
        assert node.columns.tolist() == sorted(set(node.columns.tolist()))
        assert len(node.columns) == node.position + len(node.token_ids)
    assert 0 in starts


def test_levels_hold_parents_before_children() -> None:
    tree = build_tree([[1, 2, 3, 4], [1, 2, 5], [1, 2, 5, 6], [7]])
    depth = {node.number: level for level, nodes in enumerate(tree.levels()) for node in nodes}
    assert sorted(depth) == list(range(len(tree.nodes)))
    for node in tree.nodes:
        assert node.parent is None or depth[node.parent.number] == depth[node.number] - 1
    assert np.bincount(tree.node_of()).tolist() == [len(node.token_ids) for node in tree.nodes]
