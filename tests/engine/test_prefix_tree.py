"""The radix tree over tokens agrees with a plain dictionary of every prefix."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_agent.engine.prefixes.eviction import GreedyDual
from lsp_agent.engine.prefixes.tree import Node, PrefixTree, shared_prefix

IDS = st.lists(st.integers(0, 2), max_size=12)


def split(content, at):
    return content[:at], content[at:]


def common(left, right):
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["insert", "remove"]), IDS), max_size=25),
    queries=st.lists(IDS, min_size=1, max_size=5),
    longest=st.integers(1, 5),
)
def test_it_holds_what_a_dictionary_of_prefixes_holds(steps, queries, longest):
    tree: PrefixTree = PrefixTree(split, longest)
    model: dict[tuple[int, ...], int] = {}  # every prefix that is in the tree; the token that it ends with
    for action, ids in steps:
        if action == "insert":
            nodes = tree.insert(ids)
            assert [token for node in nodes for token in node.tokens] == ids
            for node in nodes:
                node.content = tuple(node.tokens)
            model.update({tuple(ids[: n + 1]): ids[n] for n in range(len(ids))})
        else:
            path = tree.walk(ids)
            if path and not path[-1][0].children:
                node = path[-1][0]
                whole = [token for one, _ in path for token in one.tokens]
                tree.remove(node)
                for length in range(node.start, node.end):
                    del model[tuple(whole[: length + 1])]
    assert sum(len(node.tokens) for node in tree) == len(model)
    for node in tree:
        assert node.content == tuple(node.tokens) and 0 < len(node.tokens) <= longest
        assert node.start == node.parent.end and node.parent.children[node.tokens[0]] is node
    for ids in queries:
        path = tree.walk(ids)
        found = sum(agreed for _, agreed in path)
        assert found == max((len(prefix) for prefix in model if list(prefix) == ids[: len(prefix)]), default=0)
        assert all(agreed == len(node.tokens) for node, agreed in path[:-1])


@given(st.lists(st.integers(0, 1), max_size=600), st.lists(st.integers(0, 1), max_size=9), st.integers(0, 600))
def test_the_shared_prefix_is_that_of_a_loop(ids, tail, cut):
    other = ids[:cut] + tail
    for left, right in ((ids, other), (tuple(ids), other), (other, ids)):
        assert shared_prefix(left, right) == common(ids, other)


def test_what_was_used_least_lately_goes_first_and_what_is_worth_little_before_that():
    queue: GreedyDual = GreedyDual()
    parent: Node = Node((), None)
    nodes = [Node((number,), parent) for number in range(5)]

    def use(*numbers, value=1.0):
        now = queue.use()
        for number in numbers:
            nodes[number].priority = queue.priority(value, now)
            queue.push(nodes[number])

    use(0, 1, 2)
    use(3)
    use(0)
    use(4, value=0.5)
    nodes[2].parent = None  # no longer there
    order = []
    while (node := queue.pop()) is not None:
        order.append(node.tokens[0])
        queue.evicted(node)
        if len(order) == 2:
            use(4)  # used again, later than all the others
    assert order == [4, 1, 3, 0, 4]


def test_values_age():
    queue: GreedyDual = GreedyDual()
    parent: Node = Node((), None)
    dear, order = Node((99,), parent), []
    dear.priority = queue.priority(5.0, queue.use())
    queue.push(dear)
    for number in range(10):
        cheap = Node((number,), parent)
        cheap.priority = queue.priority(1.0, queue.use())
        queue.push(cheap)
        queue.evicted(gone := queue.pop())
        order.append(gone.tokens[0])
        if gone is dear:
            break
    assert order == [0, 1, 2, 3, 99]
