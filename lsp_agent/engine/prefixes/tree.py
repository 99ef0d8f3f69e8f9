"""A radix tree over tokens: what is known of many prompts, with what they share known once.

It knows tokens and where they branch; what is kept for a node's tokens is its user's (`store.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
M = TypeVar("M")

LONGEST = 512
"""Most tokens of a node: what is moved, split or evicted at a time."""


class Node(Generic[T, M]):
    """Consecutive `tokens` of prompts, the first of which is at `start`, after those of its `parent`.

    `content` is what is kept for all of these tokens, `mark` what is kept for the end of them; both may be absent.
    `priority` is the user's.
    """

    __slots__ = ("__weakref__", "children", "content", "mark", "parent", "priority", "start", "tokens")

    def __init__(self, tokens: Sequence[int], parent: Node[T, M] | None) -> None:
        self.tokens = list(tokens)
        self.parent = parent
        self.start: int = parent.end if parent else 0
        self.children: dict[int, Node[T, M]] = {}
        self.content: T | None = None
        self.mark: M | None = None
        self.priority: tuple[float, int] = (0.0, 0)

    @property
    def alive(self) -> bool:
        """Whether it is in the tree."""
        return self.parent is not None

    @property
    def end(self) -> int:
        """How many tokens lead to the end of this node, with its own."""
        return self.start + len(self.tokens)


class PrefixTree(Generic[T, M]):
    """`split(content, at)` divides what is kept for a node into that of its first `at` tokens and of the others."""

    def __init__(self, split: Callable[[T, int], tuple[T, T]], longest: int = LONGEST) -> None:
        self.root: Node[T, M] = Node((), None)
        self._split_content = split
        self._longest = longest

    def __iter__(self) -> Iterator[Node[T, M]]:
        """Every node but the root, parents first."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def walk(self, ids: Sequence[int]) -> list[tuple[Node[T, M], int]]:
        """The nodes along `ids` from the root on, and how many tokens of each agree: all but of the last one."""
        path: list[tuple[Node[T, M], int]] = []
        node, at = self.root, 0
        while at < len(ids) and (child := node.children.get(ids[at])) is not None:
            agreed = shared_prefix(child.tokens, ids[at : at + len(child.tokens)])
            path.append((child, agreed))
            if agreed < len(child.tokens):
                break
            node, at = child, at + agreed
        return path

    def insert(self, ids: Sequence[int]) -> list[Node[T, M]]:
        """The nodes that lead to `ids`, which end with the last of them; made, and split, where they are not there."""
        nodes = []
        for node, agreed in self.walk(ids):
            nodes.append(node if agreed == len(node.tokens) else self._split(node, agreed))
        last = nodes[-1] if nodes else self.root
        while last.end < len(ids):
            child = Node(ids[last.end : last.end + self._longest], last)
            last.children[child.tokens[0]] = child
            nodes.append(child)
            last = child
        return nodes

    def remove(self, node: Node[T, M]) -> None:
        """Take a node without children out of the tree."""
        if node.children or node.parent is None:
            raise ValueError("only a node at the end of a branch can be removed")
        del node.parent.children[node.tokens[0]]
        node.parent = None

    def _split(self, node: Node[T, M], at: int) -> Node[T, M]:
        """Divide a node; it becomes the second part, and the first, new one is returned."""
        assert node.parent is not None
        upper = Node(node.tokens[:at], node.parent)
        upper.priority = node.priority
        node.parent.children[upper.tokens[0]] = upper
        if node.content is not None:
            upper.content, node.content = self._split_content(node.content, at)
        node.tokens, node.start, node.parent = node.tokens[at:], node.start + at, upper
        upper.children[node.tokens[0]] = node
        return upper


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix; fast where both are lists."""
    most, at, step = min(len(left), len(right)), 0, 256
    while at + step <= most and left[at : at + step] == right[at : at + step]:
        at += step
    return next((index for index in range(at, most) if left[index] != right[index]), most)
