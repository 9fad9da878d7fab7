"""What transformers generates: the truth that served tokens are compared with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from prompts import MAX_TOKENS, PROMPTS

from support.serving import MODEL


@dataclass(frozen=True)
class Expected:
    """Greedy continuation of one prompt.

    Attributes:
        log_probs: Of the tokens, under the unmodified logits.
        margin: Smallest distance, over all steps, between the best logit and the next.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    log_probs: list[float]
    text: str
    margin: float


class HuggingFace:
    """One model in one dtype, in this process."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def prompt_ids(self, prompt: dict[str, Any]) -> list[int]:
        """Tokens of a prompt as the tests send it: `text_input` or `messages`."""
        if "messages" in prompt:
            conversation = json.loads(prompt["messages"])
            encoded = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
            return list(encoded["input_ids"])
        return list(self.tokenizer(prompt["text_input"])["input_ids"])

    def generate(self, prompt: dict[str, Any], max_tokens: int) -> Expected:
        """Greedy decoding."""
        prompt_ids = self.prompt_ids(prompt)
        ids = torch.tensor([prompt_ids])
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        token_ids = output.sequences[0, len(prompt_ids) :].tolist()
        steps = [logits[0].float().log_softmax(-1) for logits in output.logits]
        log_probs = [float(step[token]) for step, token in zip(steps, token_ids, strict=True)]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        best = [logits[0].float().topk(2).values for logits in output.logits]
        margin = min(float(first - second) for first, second in best)
        return Expected(prompt_ids, token_ids, log_probs, text, margin)


def reference_answers(dtype_name: str, names: list[str]) -> dict[str, Expected]:
    """The greedy continuations of these of `prompts.PROMPTS`."""
    torch.set_num_threads(1)  # more only fight over a busy machine: measured 4 times slower
    model = HuggingFace(MODEL, getattr(torch, dtype_name))
    return {name: model.generate(PROMPTS[name], MAX_TOKENS) for name in names}
