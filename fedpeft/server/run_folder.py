"""The run folder on disk: what a run leaves behind for people and programs (the list is in README.md, "What a run leaves behind")."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fedpeft import durable
from fedpeft.config import Config
from fedpeft.errors import Problem, UserError
from fedpeft.records import RoundRecord


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder, and the writing of its records."""

    path: pathlib.Path

    @property
    def adapter(self) -> pathlib.Path:
        """A plain PEFT folder."""
        return self.path / "adapter"

    def personal(self, client: str) -> pathlib.Path:
        """A plain PEFT folder of one client's own model, where the strategy has such."""
        return self.path / "personal" / client

    @property
    def ledgers(self) -> pathlib.Path:
        """The clients' privacy ledgers, where there is privacy and the clients are in this process."""
        return self.path / "ledger"

    @property
    def ledger(self) -> pathlib.Path:
        """The server's own, where whole clients are private."""
        return self.ledgers / "server.jsonl"

    @property
    def checkpoint(self) -> pathlib.Path:
        """What `--resume` reads."""
        return self.path / "checkpoint"

    @property
    def config(self) -> pathlib.Path:
        """The config as resolved."""
        return self.path / "config.yaml"

    @property
    def rounds(self) -> pathlib.Path:
        """One line a round."""
        return self.path / "rounds.jsonl"

    @property
    def summary(self) -> pathlib.Path:
        """The run in one object; it exists once the run has ended."""
        return self.path / "summary.json"

    def check_free(self) -> None:
        """Raises UserError when something is there already, or nothing can be made there."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(
                Problem("--out", f"{self.path} is there and not empty", do="name another folder, or continue that run with --resume")
            )
        above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(Problem("--out", f"{self.path} cannot be made ({above} is no folder that can be written to)"))

    def create(self, config: Config) -> None:
        """Make the folder of a new run."""
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        durable.replace(self.config, config.to_yaml().encode())

    def reopen(self, config: Config) -> None:
        """Check that `config` is the one the run was started with. Raises UserError naming the first key that differs."""
        if not self.config.is_file() or not self.config.stat().st_size:
            raise UserError(
                Problem("--resume", f"{self.path} holds no run (there is no config.yaml)", do="give the folder of a run with --out")
            )
        then, now = Config.load(self.config).as_dict(), config.as_dict()
        changed = [f"{section}.{key}" if key else section for section, key in _differences(then, now)]
        if changed:
            raise UserError(Problem("--resume", f"the run was started with another {', '.join(changed)}", do=f"resume with {self.config}"))

    def append(self, record: RoundRecord) -> None:
        """Add a line to rounds.jsonl, on disk before this returns."""
        with self.rounds.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self, up_to: int) -> list[RoundRecord]:
        """The records up to round `up_to`; later or torn lines, of a round that was cut off, are dropped from the file."""
        if not self.rounds.is_file():
            return []
        kept = []
        for line in self.rounds.read_text(encoding="utf-8").splitlines():
            try:
                record = RoundRecord(**json.loads(line))
            except (ValueError, TypeError):
                break
            if record.round <= up_to:
                kept.append(record)
        beside = self.rounds.with_suffix(".new")
        beside.write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in kept), encoding="utf-8")
        os.replace(beside, self.rounds)
        return kept

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        beside = self.summary.with_suffix(".new")
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, self.summary)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for section in then.keys() | now.keys():
        left, right = then.get(section), now.get(section)
        if isinstance(left, dict) and isinstance(right, dict):
            found += [(section, key) for key in left.keys() | right.keys() if left.get(key) != right.get(key)]
        elif left != right:
            found.append((section, ""))
    return sorted(found)
