"""Causal language models and instruction tuning: the model learns to complete a prompt, a conversation, or plain text.

What trains is what the assistant says, token by token; the prompt is read and not learnt. The loss of a record is the mean
over its trained tokens, so that a record counts the same whatever its length and its gradient can be clipped alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from fedpeft.data.encoded import UNTRAINED, Encoded
from fedpeft.data.examples import Examples
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import find
from fedpeft.records import Metrics
from fedpeft.sections import Columns, DataSection
from fedpeft.tasks import generation, next_token, packing
from fedpeft.tasks.chat import Turns, rendered, turns
from fedpeft.tasks.task import Task, padding, pads_of

if TYPE_CHECKING:
    import torch

    from fedpeft.adapters.adapted import Adapted
    from fedpeft.base import Base


class CausalLM(Task):
    """Completions of prompts, conversations or plain text, by `AutoModelForCausalLM`; trained on completions only."""

    peft_task: ClassVar[str] = "CAUSAL_LM"
    needs_labels: ClassVar[bool] = False
    may_be_empty: ClassVar[frozenset[str]] = frozenset({"context"})

    chat_template: str | None = Field(None, description='plain, instruction, dialogue, or "file.py:function"; null: the tokenizer\'s own')
    system: str | None = Field(None, description="what the system says before every prompt")
    packing: bool = Field(False, description="several records in one row of max_length, none of which sees another; not under privacy")
    samples: int = Field(8, ge=0, le=1000, description="completions of test prompts written before and after the run (samples.jsonl)")
    max_new_tokens: int = Field(64, ge=1, description="tokens of such a completion")
    scorers: list[str] = Field(
        ["exact_match", "rouge_l"], description='what completions are held to: exact_match, rouge_l, final_number, "file.py:function"'
    )

    @field_validator("chat_template", "scorers")
    @classmethod
    def _there(cls, value: str | list[str] | None, info: Any) -> Any:
        kind = str(info.field_name).removesuffix("s")
        for name in [value] if isinstance(value, str) else value or ():
            find(kind, name, f"model.{info.field_name}")
        return value

    @property
    def primary_metric(self) -> str:
        """Perplexity of the trained tokens."""
        return "perplexity"

    @property
    def higher_is_better(self) -> bool:
        """Perplexity falls."""
        return False

    @property
    def records_stay_apart(self) -> bool:
        """A packed row is several records."""
        return not self.packing

    def roles(self, columns: Columns) -> dict[str, str]:
        """Conversations where columns.messages is given; else completions, with a prompt and what belongs to it where there is one."""
        if columns.messages:
            return {"messages": columns.messages}
        given = {"prompt": columns.prompt, "context": columns.context, "completion": columns.completion}
        return {role: column for role, column in given.items() if column}

    def unfit(self, role: str, cell: Any) -> str | None:
        """Conversations are lists of {role, content} that end with the assistant."""
        if role != "messages":
            return super().unfit(role, cell)
        shaped = isinstance(cell, Sequence) and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in cell
        )
        if not shaped:
            return 'holds no conversation, which is a list of {"role": ..., "content": ...}'
        return None if cell and cell[-1]["role"] == "assistant" else "holds a conversation that does not end with the assistant"

    def model_class(self) -> Any:
        """The Transformers class that loads the base with its output layer."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def processor(self, read: Callable[[Any], Any]) -> Any:
        """The tokenizer, with the chat template asked for. Raises UserError when it cannot say which characters a token covers."""
        tokenizer = super().processor(read)
        if not tokenizer.is_fast:
            raise UserError(Problem("model.name", "its tokenizer does not say where tokens stand in a text", "a fast tokenizer"))
        if self.chat_template is not None:
            tokenizer.chat_template = find("chat_template", self.chat_template)()
        return tokenizer

    def encode(self, examples: Examples, base: Base, data: DataSection) -> Encoded:
        """Tokens, and per token what it trains: itself, or UNTRAINED. The end is cut at `max_length` tokens."""
        tokenizer = base.tokenizer
        if "completion" not in examples.columns or "prompt" in examples.columns:
            _check_template(tokenizer)
        inputs, labels, left_out, cut = [], np.empty(len(examples), dtype=object), {}, 0
        for row in range(len(examples)):
            text, spans = self._text(turns(examples, row, self.system), tokenizer)
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = np.asarray(found["input_ids"][: data.max_length], dtype=np.int64)
            trained = _inside(np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)[: data.max_length], spans)
            trained[:1] = False  # nothing stands before it that could say it
            cut += len(found["input_ids"]) > data.max_length
            inputs.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
            labels[row] = np.where(trained, ids, UNTRAINED)
            if not trained.any():
                said = f"{len(found['input_ids'])} tokens, and all that trains is beyond data.max_length={data.max_length}"
                left_out[row] = said if any(end > start for start, end in spans) else "the completion is empty"
        return Encoded(inputs, labels, 0, cut, left_out)

    def _text(self, said: Turns, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
        """What the model reads, and which characters of it train. Plain text trains whole, between the tokenizer's own ends."""
        if len(said) > 1:
            return rendered(said, tokenizer)
        start, text, end = tokenizer.bos_token or "", said[0]["content"], tokenizer.eos_token or ""
        return f"{start}{text}{end}", [(len(start), len(start + text + end))] if text.strip() else []

    def arrange(self, data: Encoded, base: Base, settings: DataSection) -> Encoded:
        """With packing, the client's records in as few rows of `max_length` as come; else as they are."""
        if not self.packing:
            return data
        packing.check(base, settings.max_length)
        return packing.packed(data, settings.max_length)

    def losses(self, model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of each record's trained tokens, [batch]; of a packed row, of all that its records train."""
        found = next_token.scores(model, packing.apart(model, inputs), labels)
        return found.loss / found.tokens.clamp(min=1)

    def outputs(self, model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Summed loss, tokens predicted right, tokens: [batch, 3]."""
        import torch

        return torch.stack(next_token.scores(model, packing.apart(model, inputs), labels), dim=1)

    def measure(self, outputs: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Metrics:
        """Over all trained tokens: mean loss, its exponential, and the share that is the likeliest next token."""
        loss, right, tokens = outputs.astype(np.float64).sum(axis=0)
        return {"perplexity": float(np.exp(loss / tokens)), "token_accuracy": float(right / tokens), "loss": float(loss / tokens)}

    def tell(self, inputs: dict[str, np.ndarray[Any, Any]], label: Any, names: tuple[str, ...], base: Base) -> tuple[str, str]:
        """What trains stands between \u27e6 and \u27e7."""
        before, behind = pads_of(inputs)
        ids, trained = inputs["input_ids"], label != UNTRAINED
        ends = [before, *(np.flatnonzero(np.diff(trained[before : len(ids) - behind])) + 1 + before), len(ids) - behind]
        whole = [base.tokenizer.decode(ids[before:end]) for end in ends]
        pieces = [text[len(start) :] for start, text in itertools.pairwise(whole)]
        marked = [f"\u27e6{piece}\u27e7" if trained[first] else piece for first, piece in zip(ends, pieces, strict=False)]
        return f"{len(ids) - before - behind} tokens, {trained.sum()} of them train, {padding((before, behind))}", repr("".join(marked))

    def show(self, adapted: Adapted, examples: Examples, data: DataSection) -> list[dict[str, Any]]:
        """Completions of `samples` prompts, evenly spaced over `examples`, beside what should be said, each scored."""
        return generation.show(adapted, examples, data, self)


def _inside(offsets: np.ndarray[Any, Any], spans: Sequence[tuple[int, int]]) -> np.ndarray[Any, Any]:
    """Which tokens have a character in one of the spans, [time]; tokens without characters are in none."""
    start, end = offsets[:, 0], offsets[:, 1]
    found = np.zeros(len(offsets), dtype=np.bool_)
    for first, last in spans:
        found |= (end > first) & (start < last) & (end > start)
    return found


def _check_template(tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        got = "the tokenizer has no chat template, and the config names none"
        raise UserError(
            Problem("model.chat_template", got, 'plain, instruction, dialogue, or "file.py:function" that gives a Jinja template')
        )
