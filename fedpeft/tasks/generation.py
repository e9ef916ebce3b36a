"""What a language model says before and after a run, and how near it is to what it should say."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data.encoded import padded
from fedpeft.data.examples import Examples
from fedpeft.lookup import find
from fedpeft.sections import DataSection
from fedpeft.tasks.chat import opening, turns

if TYPE_CHECKING:
    from fedpeft.adapters.adapted import Adapted

TOGETHER = 16  # prompts a batch


def show(adapted: Adapted, examples: Examples, data: DataSection, task: Any) -> list[dict[str, Any]]:
    """A line a prompt: prompt, reference, generated, and a number a scorer. Greedy, so that before and after can be compared.

    Prompts longer than `max_length` tokens, or than the model has room for beside the answer, are passed over.
    """
    tokenizer = adapted.base.tokenizer
    room = getattr(adapted.base.model.config.get_text_config(), "max_position_embeddings", None)
    most = data.max_length if room is None else min(data.max_length, room - task.max_new_tokens)
    asked: list[tuple[str, str, list[int]]] = []
    order = np.argsort(np.arange(len(examples)) * 0.6180339887 % 1.0, kind="stable")  # evenly spread, however many are taken
    for row in order:
        if len(asked) == task.samples:
            break
        said = turns(examples, int(row), task.system)
        text = opening(said[:-1], tokenizer) if len(said) > 1 else tokenizer.bos_token or ""
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if 0 < len(tokens) <= most:
            asked.append((text, said[-1]["content"], tokens))
    score = {name: find("scorer", name) for name in task.scorers}
    lines = []
    for start in range(0, len(asked), TOGETHER):
        part = asked[start : start + TOGETHER]
        for (text, reference, _), generated in zip(part, _complete(adapted, [one[2] for one in part], task.max_new_tokens), strict=True):
            scores = {name: float(of(generated, reference)) for name, of in score.items()}
            lines.append({"prompt": text, "reference": reference, "generated": generated, **scores})
    return lines


def _complete(adapted: Adapted, prompts: list[list[int]], longest: int) -> list[str]:
    """The likeliest continuation of each prompt, padded on the left: every prompt ends where its answer begins."""
    import torch

    tokenizer, device = adapted.base.tokenizer, adapted.base.device
    ids = padded([np.asarray(tokens, dtype=np.int64) for tokens in prompts], tokenizer.pad_token_id, "left")
    mask = padded([np.ones(len(tokens), dtype=np.int64) for tokens in prompts], 0, "left")
    adapted.model.eval()
    with torch.no_grad():
        said = adapted.model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=longest,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    return [tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True).strip() for tokens in said]


def exact_match(generated: str, reference: str) -> float:
    """1 when both are equal but for case and white space, else 0."""
    return float(" ".join(generated.lower().split()) == " ".join(reference.lower().split()))


def final_number(generated: str, reference: str) -> float:
    """1 when the last number of both is the same, else 0: for sums whose steps may be said in other words (GSM8K)."""
    left, right = (re.findall(r"-?\d[\d,]*\.?\d*", text) for text in (generated, reference))
    return float(bool(left and right) and _number(left[-1]) == _number(right[-1]))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def rouge_l(generated: str, reference: str) -> float:
    """ROUGE-L: the F1 of the longest common subsequence of words (Lin 2004), by the package rouge-score, with stems."""
    return float(_rouge().score(reference, generated)["rougeL"].fmeasure)


@functools.cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
