"""Keeps messages of other libraries off the screen that mean nothing to the user, while a model is loaded or a run goes on.

Each is named here with its reason, and everything is put back at the end of the block: no level is raised, no logger
is switched off, and whatever is not named comes through.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

NEW_HEADS = frozenset({"classifier", "pre_classifier", "score"})
"""Layers that no base checkpoint has: the task's head, which the run initialises and trains."""

OLD_HEADS = frozenset(
    {
        "cls",  # BERT
        "lm_head",  # RoBERTa, GPT
        "vocab_transform",  # DistilBERT, this and the next two
        "vocab_layer_norm",
        "vocab_projector",
        "lm_predictions",  # DeBERTa, this and the next
        "mask_predictions",
        "discriminator_predictions",  # ELECTRA
    }
)
"""Layers of the pretraining task that a checkpoint carries and no fine-tuned model has."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the named messages inside the block and restore every filter, hook and switch after it. May be nested.

    The bars of `datasets` can only be hidden where `datasets` is imported before the block is entered.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # PEFT asks every model for this property and transformers 5 renamed it: nothing a user could change.
        warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        # A base model has no head for the task, and its pretraining head is not wanted: the table that says so is no news.
        stack.enter_context(_filtered("transformers.modeling_utils", _says_more_than_heads))
        # Flower tells of its own starting and stopping; a round's news comes from our screen. Its warnings stay,
        # and so does everything for a user who asked for it with Flower's own variable.
        if "FLWR_LOG_LEVEL" not in os.environ:
            stack.enter_context(_filtered("flwr", lambda record: record.levelno >= logging.WARNING))
        # "Loading weights 103/103" takes milliseconds and tears our progress bar. Downloads from the Hub keep theirs.
        stack.enter_context(_no_weight_bars())
        # "Map", "Generating train split": the same.
        if "datasets" in sys.modules:
            stack.enter_context(_no_dataset_bars())
        yield


@contextmanager
def _filtered(name: str, keep: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    logger = logging.getLogger(name)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _says_more_than_heads(record: logging.LogRecord) -> bool:
    """False for a load report whose every row is a head that had to be new or was left behind.

    A backbone weight that is missing or of another shape is a wrong checkpoint: such a report is shown whole.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
    report, _, _ = text.partition("\n\n")  # tips follow the table
    head, rule, table = report.partition("-+-")
    if "LOAD REPORT" not in head or not rule:
        return True
    cells = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()[1:]]  # the rule's own rest stands first
    return not cells or not all(len(row) >= 2 and _expected(row[0], row[1]) for row in cells)


def _expected(key: str, status: str) -> bool:
    first, last = key.split(".")[0], key.split(".")[-1]
    if status in ("MISSING", "MISMATCH"):  # none there, or one for other classes
        return first in NEW_HEADS
    # position_ids: a constant that older checkpoints stored.
    return status == "UNEXPECTED" and (first in OLD_HEADS or last == "position_ids")


@contextmanager
def _no_weight_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ or not transformers_logging.is_progress_bar_enabled():
        yield  # the user has decided
        return
    hub_had_bars = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # takes the Hub's bars with it
    if hub_had_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        if not hub_had_bars:
            disable_progress_bars()


@contextmanager
def _no_dataset_bars() -> Iterator[None]:
    import datasets

    if datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None or datasets.are_progress_bars_disabled():
        yield  # the user has decided
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
