"""Random conversations of several turns, some of which begin alike. One seed makes the same ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

VOCABULARY = range(3, 4000)


@dataclass
class Conversation:
    opening: list[int]
    questions: list[list[int]]
    answers: list[int]
    # Everything said so far; each run of the conversations fills its own.
    said: list[int] = field(default_factory=list)

    def turns(self) -> int:
        return len(self.questions)

    def prompt(self, turn: int, said: list[int]) -> list[int]:
        return said + self.questions[turn] if turn else self.opening + self.questions[0]


def conversations(seed: int, count: int) -> list[Conversation]:
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.choice(VOCABULARY) for _ in range(rng.randint(least, most))]

    openings = [tokens(20, 150) for _ in range(max(1, count // 8))]
    made = []
    for _ in range(count):
        # A third begins with what others begin with, all of it or a part.
        opening = list(rng.choice(openings)) if rng.random() < 0.35 else tokens(1, 120)
        turns = rng.randint(2, 4)
        made.append(
            Conversation(opening, [tokens(1, 90) for _ in range(turns)], [rng.randint(2, 12) for _ in range(turns)])
        )
    return made


def order(seed: int, all_of_them: list[Conversation]) -> list[tuple[int, int]]:
    """`(conversation, turn)`, the turns of each in order, those of eight at a time mixed."""
    rng = random.Random(seed + 1)
    turns: list[tuple[int, int]] = []
    for start in range(0, len(all_of_them), 8):
        left = {index: 0 for index in range(start, min(start + 8, len(all_of_them)))}
        while left:
            index = rng.choice(sorted(left))
            turns.append((index, left[index]))
            left[index] += 1
            if left[index] == all_of_them[index].turns():
                del left[index]
    return turns
