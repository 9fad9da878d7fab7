"""The prompts that every way of serving must answer with the reference's tokens."""

from __future__ import annotations

import json
from typing import Any

MAX_TOKENS = 24
MAX_STEP_TOKENS = 256
"""The servers' chunk size, small so that a prompt of some hundred tokens takes several."""

_SENTENCES = (
    "The river rose slowly through the night, and nobody in the village slept. ",
    "In 1911 the expedition carried 52 dogs, 4 sledges and food for 120 days. ",
    "A cache keeps what is likely to be needed again close to where it is needed. ",
    "She wrote the numbers in a column: 3, 14, 15, 92, 65, 35, 89, 79. ",
    "Bread needs flour, water, salt and time, and mostly it needs time. ",
)


def long_text(num_sentences: int, start: int = 0) -> str:
    """Prose of about 26 tokens a sentence; no two are the same."""
    return "".join(
        f"{index}. {_SENTENCES[(start + index) % len(_SENTENCES)]}" for index in range(start, start + num_sentences)
    )


def _chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": json.dumps(
            [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)], ensure_ascii=False
        )
    }


PROMPTS: dict[str, dict[str, Any]] = {
    "one word": {"text_input": "Hello"},
    "capital": {"text_input": "The capital of France is"},
    "counting": {"text_input": "1, 2, 3, 4, 5, 6, 7,"},
    "code": {"text_input": "def fibonacci(n):\n    "},
    "json": {"text_input": '[{"city": "Paris", "country": "France"}, {"city": "Rome", "country":'},
    "question": {"text_input": "Question: Why is the sky blue?\nAnswer:"},
    "list": {"text_input": "Three primary colours:\n1. Red\n2."},
    "spaces": {"text_input": "   leading and trailing   "},
    "exactly a block": {"text_input": " the" * 16},
    "just over a block": {"text_input": " a" * 17},
    "german": {"text_input": "Die Hauptstadt von Österreich heißt"},
    "french": {"text_input": "Il était une fois, dans une forêt enchantée,"},
    "russian": {"text_input": "Москва — столица"},
    "chinese": {"text_input": "中国的首都是北京。日本的首都是"},
    "arabic": {"text_input": "اللغة العربية هي"},
    "emoji": {"text_input": "Weather report 🌧️🌧️☀️🌈 and today's mood 😀😃"},
    "story": {"text_input": long_text(8)},
    "two chunks": {"text_input": long_text(13, start=20)},
    "three chunks": {"text_input": long_text(23, start=40)},
    "many chunks": {"text_input": long_text(42, start=100)},
    "chat": _chat("What is the capital of Italy?"),
    "chat about code": _chat("Write a Python function that adds two numbers."),
    "chat in turns": _chat("Hi, I am Mia.", "Hello Mia! How can I help?", "What is my name?"),
    "chat, multilingual": _chat("Übersetze ins Englische: Der Himmel ist blau. ☀️"),
}
LONGEST = "many chunks"
