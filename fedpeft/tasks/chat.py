"""Conversations as text: what a row says turn by turn, which characters the assistant says, and templates of ours.

A template is Jinja in Transformers' form (`apply_chat_template`): `messages`, `add_generation_prompt`, `bos_token`, `eos_token`.
"""

from __future__ import annotations

from typing import Any

from fedpeft.data.examples import Examples
from fedpeft.errors import Problem, UserError

Turns = list[dict[str, str]]


def turns(examples: Examples, row: int, system: str | None) -> Turns:
    """The conversation of a row; plain text is a single turn of the assistant's."""
    columns = examples.columns
    if "messages" in columns:
        said = [{"role": turn["role"], "content": turn["content"]} for turn in columns["messages"][row]]
    else:
        said = [{"role": "assistant", "content": columns["completion"][row]}]
        if "prompt" in columns:
            context = (columns["context"][row] or "") if "context" in columns else ""
            asked = f"{columns['prompt'][row]}\n\n{context}" if context.strip() else columns["prompt"][row]
            said.insert(0, {"role": "user", "content": asked})
    if system and len(said) > 1 and said[0]["role"] != "system":
        said.insert(0, {"role": "system", "content": system})
    return said


def opening(said: Turns, tokenizer: Any) -> str:
    """The text of `said`, up to where the assistant begins to speak."""
    text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return text


def rendered(said: Turns, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the characters that the assistant says in each of its turns, end marks included.

    An empty turn says nothing. Raises UserError when the template does not write a conversation as the beginning of its
    continuation: then nobody can say which tokens are the assistant's.
    """
    text: str = tokenizer.apply_chat_template(said, tokenize=False)
    spans = []
    for place, turn in enumerate(said):
        if turn["role"] == "assistant" and turn["content"].strip():
            before = opening(said[:place], tokenizer)
            upto = text if place == len(said) - 1 else tokenizer.apply_chat_template(said[: place + 1], tokenize=False)
            if not (upto.startswith(before) and text.startswith(upto)):
                got = "the template writes a turn otherwise once the next one follows: what the assistant says cannot be told apart"
                raise UserError(Problem("model.chat_template", got, "plain, instruction, dialogue", "name one of these"))
            spans.append((len(before), len(upto)))
    return text, spans


def plain() -> str:
    """Prompt, line break, completion: nothing but the text, for models that have seen no chat."""
    return (
        "{{ bos_token }}{% for turn in messages %}{{ turn.content }}"
        "{% if turn.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    )


def instruction() -> str:
    """Headings before instruction and answer, in the manner of Alpaca."""
    return (
        "{{ bos_token }}{% for turn in messages %}"
        "{% if turn.role == 'assistant' %}{{ turn.content + eos_token }}"
        "{% elif turn.role == 'user' %}{{ '### Instruction:\n' + turn.content + '\n\n### Response:\n' }}"
        "{% else %}{{ turn.content + '\n\n' }}{% endif %}{% endfor %}"
    )


def dialogue() -> str:
    """Who speaks, a colon, and what is said; a line a turn."""
    return (
        "{{ bos_token }}{% for turn in messages %}"
        "{% if turn.role == 'assistant' %}{{ 'Assistant: ' + turn.content + eos_token + '\n' }}"
        "{% else %}{{ ('User: ' if turn.role == 'user' else '') + turn.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    )
