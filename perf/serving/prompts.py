"""Prompts of a fixed mix: plain English words, equal in length, unlike from the first block on.

They are unlike so that the prefix cache never hits: a hit would measure the cache and not the path.
"""

from __future__ import annotations

import random

_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many off before must well back through years where much your way down should because long
people day house water food work world hand city river light paper music garden winter summer bread stone silver
"""

_HEAD_TOKENS = 6
"""About what the number and the colon in front take."""


def make_prompts(count: int, num_tokens: int, seed: int) -> tuple[str, ...]:
    """Prompts of about `num_tokens` tokens each; the same arguments give the same prompts."""
    generator = random.Random(seed)
    vocabulary = _WORDS.split()
    prompts = []
    for _ in range(count):
        words = generator.choices(vocabulary, k=max(1, num_tokens - _HEAD_TOKENS))
        prompts.append(f"{generator.randrange(100_000, 1_000_000)}: {' '.join(words)}")
    return tuple(prompts)
