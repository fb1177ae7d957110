"""Pages of the KV memory: who has them, what is kept for reuse, and what is given away next.

A block of a sequence has one page per layer group. Complete blocks are kept in a tree of prefixes. What lies in a page
that was given back is left alone until the page has a new owner, as in the real engine; `executor.py` poisons it then.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from .content import Words
from .geometry import Geometry
from .request import EngineRequest
from .retention import DEFAULT_PRIORITY


@dataclass(eq=False)
class Node:
    """A complete block that is kept. `number` stands for its whole prefix; `pages` has -1 where a page is gone."""

    number: int
    scope: tuple[object, ...]
    tokens: tuple[int, ...]
    numbers: Words
    pages: list[int]
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    users: int = 0
    priority: int = DEFAULT_PRIORITY
    duration: float | None = None
    expires: float | None = None
    released: int = 0


@dataclass
class Holding:
    """What a request has: nodes of the tree, and pages of its own per layer group."""

    nodes: list[Node] = field(default_factory=list)
    own: list[set[int]] = field(default_factory=list)


@dataclass
class Match:
    nodes: list[Node]
    partial: Node | None = None
    partial_tokens: int = 0


class BlockManager:
    def __init__(self, geometry: Geometry, order: str, seed: int) -> None:
        self.geometry = geometry
        self._order = order
        self._random = random.Random(seed)
        self.free: list[list[int]] = [list(range(geometry.pages)) for _ in geometry.groups]
        self.root = Node(0, (), (), None, [], None)  # type: ignore[arg-type]
        # Ordered, so that all ranks give the same pages away.
        self.nodes: dict[Node, None] = {}
        self.holdings: dict[int, Holding] = {}
        self.on_free: Callable[[int, int], None] = lambda group, page: None
        """Told (group, page) when a page has no owner any more."""
        self._clock = 0

    # Capacity.

    def blocks_available(self) -> int:
        """Blocks that could be allocated now, if everything that nobody uses were given away."""
        used: set[Node] = set()
        for node in self.nodes:
            above: Node | None = node if node.users else None
            while above is not None and above is not self.root and above not in used:
                used.add(above)
                above = above.parent
        idle = [node for node in self.nodes if node not in used]
        return min(
            len(free) + sum(1 for node in idle if node.pages[group] >= 0) for group, free in enumerate(self.free)
        )

    def allocate(self, request: EngineRequest, group: int) -> int:
        """One page for a request."""
        while not self.free[group]:
            self._evict(group)
        free = self.free[group]
        if self._order == "lifo":
            page = free.pop()
        elif self._order == "fifo":
            page = free.pop(0)
        else:
            page = free.pop(self._random.randrange(len(free)))
        self.holdings[request.request_id].own[group].add(page)
        return page

    def give_back(self, request: EngineRequest, group: int, page: int) -> bool:
        """A page of the request's own leaves it. False if the tree keeps the page."""
        own = self.holdings[request.request_id].own[group]
        if page not in own:
            return False
        own.remove(page)
        self._free(group, page)
        return True

    def _free(self, group: int, page: int) -> None:
        self.free[group].append(page)
        self.on_free(group, page)

    def _evict(self, group: int) -> None:
        leaves = [n for n in self.nodes if n.users == 0 and not n.children]
        if not leaves:
            raise RuntimeError(f"no page left in group {group}: the admission was wrong")
        self._remove(min(leaves, key=lambda node: (node.priority, node.released)))

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.number]
        del self.nodes[node]
        for group, page in enumerate(node.pages):
            if page >= 0:
                self._free(group, page)

    def drop_unused(self) -> None:
        """Forgets everything that nobody uses."""
        while leaves := [n for n in self.nodes if n.users == 0 and not n.children]:
            for node in leaves:
                self._remove(node)

    def refresh(self, now: float) -> None:
        """Kept blocks whose time is over go to the default priority, at its tail."""
        for node in self.nodes:
            if node.users == 0 and node.expires is not None and node.expires <= now:
                node.priority, node.expires, node.released = DEFAULT_PRIORITY, None, self._tick()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    # Reuse.

    def match(self, request: EngineRequest, partial: bool) -> Match:
        """The longest kept prefix, of at most all prompt tokens but one."""
        tokens, limit = request.tokens[: request.prompt_len], request.prompt_len - 1
        size = self.geometry.tokens_per_block
        request.digests.extend(tokens, len(tokens))
        nodes: list[Node] = []
        parent = self.root
        while (len(nodes) + 1) * size <= limit:
            child = parent.children.get(request.digests.block_hash((len(nodes) + 1) * size))
            if child is None:
                break
            nodes.append(child)
            parent = child
        while nodes and not self._windows_covered(nodes):
            nodes.pop()
        found = Match(nodes)
        if partial and len(self.geometry.groups) == 1:
            self._match_part(found, request, limit)
        return found

    def _match_part(self, found: Match, request: EngineRequest, limit: int) -> None:
        size = self.geometry.tokens_per_block
        start = len(found.nodes) * size
        scope = scope_of(request)
        parent = found.nodes[-1] if found.nodes else self.root
        for child in parent.children.values():
            count = 0
            while count < size and start + count < limit and child.tokens[count] == request.tokens[start + count]:
                count += 1
            if child.scope == scope and count > found.partial_tokens:
                # Items in the prompt may differ behind equal tokens: the numbers tell.
                same = child.numbers[:count] == request.digests.numbers(start, start + count)
                if bool(same.all()):
                    found.partial, found.partial_tokens = child, count

    def _windows_covered(self, nodes: list[Node]) -> bool:
        end = len(nodes) * self.geometry.tokens_per_block
        for group, shape in enumerate(self.geometry.groups):
            first = first_in_window(end, shape.window, self.geometry.tokens_per_block)
            if any(node.pages[group] < 0 for node in nodes[first:]):
                return False
        return True

    def start(self, request: EngineRequest, match: Match) -> None:
        """The request holds what was matched."""
        self.holdings[request.request_id] = Holding(list(match.nodes), [set() for _ in self.geometry.groups])
        for node in match.nodes:
            node.users += 1
        request.pages = [[node.pages[group] for node in match.nodes] for group in range(len(self.geometry.groups))]

    def take_over(self, request: EngineRequest, node: Node) -> None:
        """A kept block that ends a branch and that nobody uses becomes the request's own."""
        assert node.parent is not None and not node.children and node.users == 0
        del node.parent.children[node.number]
        del self.nodes[node]
        for group, page in enumerate(node.pages):
            self.holdings[request.request_id].own[group].add(page)
            request.pages[group].append(page)

    def keep(self, request: EngineRequest, upto: int) -> None:
        """Complete blocks of the first `upto` tokens are kept for reuse."""
        size = self.geometry.tokens_per_block
        holding = self.holdings[request.request_id]
        parent, held = self.root, set(map(id, holding.nodes))
        for ordinal in range(upto // size):
            number = request.digests.block_hash((ordinal + 1) * size)
            node = parent.children.get(number)
            if node is None:
                node = self._add(request, holding, ordinal, number, parent)
                held.add(id(node))
            if id(node) in held and request.spec.retention is not None:
                priority, duration = request.spec.retention.block(ordinal, size, request.prompt_len)
                node.priority = DEFAULT_PRIORITY if priority is None else priority
                node.duration = duration
            parent = node

    def _add(self, request: EngineRequest, holding: Holding, ordinal: int, number: int, parent: Node) -> Node:
        size = self.geometry.tokens_per_block
        start, end = ordinal * size, (ordinal + 1) * size
        pages = []
        for group, own in enumerate(holding.own):
            page = request.pages[group][ordinal]
            pages.append(page if page in own else -1)
            own.discard(page)
        numbers = request.digests.numbers(start, end)
        node = Node(number, scope_of(request), tuple(request.tokens[start:end]), numbers, pages, parent, users=1)
        parent.children[number] = node
        self.nodes[node] = None
        holding.nodes.append(node)
        return node

    def release(self, request: EngineRequest, now: float) -> list[tuple[int, int]]:
        """The request lets go of everything. Returns (group, page) of what is free now."""
        holding = self.holdings.pop(request.request_id)
        for node in reversed(holding.nodes):
            node.users -= 1
            node.released = self._tick()
            if node.duration is not None and node.priority != DEFAULT_PRIORITY:
                node.expires = now + node.duration
        freed = [(group, page) for group, own in enumerate(holding.own) for page in sorted(own)]
        for group, page in freed:
            self._free(group, page)
        request.pages = []
        return freed


def scope_of(request: EngineRequest) -> tuple[object, ...]:
    return (request.spec.cache_salt, request.spec.lora_task_id)


def first_in_window(history: int, window: int | None, tokens_per_block: int) -> int:
    """First block of which a token may still be read after `history` tokens."""
    return 0 if window is None else max(0, (history + 1 - window) // tokens_per_block)
