"""The command line: one function a command, all of them thin. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedpeft import collector, environment
from fedpeft.arguments import Command, parser
from fedpeft.errors import FedpeftError, Problem, RunStopped, UserError
from fedpeft.units import one_line

if TYPE_CHECKING:
    from fedpeft.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 stopped, 2 bad input, 130 interrupted."""
    environment.prepare()
    given = parser(COMMANDS).parse_args(arguments)
    try:
        return int(given.command(given) or 0)
    except FedpeftError as error:
        for line in str(error).splitlines():
            print(f"fedpeft: {one_line(line)}", file=sys.stderr)  # it may quote a client
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"fedpeft: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fedpeft: interrupted; --resume continues a run after its last whole round, the same command a study", file=sys.stderr)
        return 130


def simulate(given: argparse.Namespace) -> None:
    """run a federation on this machine"""
    from fedpeft.config import Config
    from fedpeft.screen import choose
    from fedpeft.server.run_folder import RunFolder

    path, overrides = _config_and_overrides(given.config)
    if given.resume and path is None and given.out is not None:
        path = str(RunFolder(pathlib.Path(given.out)).config)
    config = Config.load(path, overrides)
    collector.load_libraries()
    with choose(json=given.json) as screen:
        from fedpeft.server.federation import FINISHED
        from fedpeft.simulations.run import simulate as run

        summary = run(config, given.out, given.resume, screen).summary
    if summary["stopped_because"] != FINISHED:
        raise RunStopped(f"the run stopped before its end: {summary['stopped_because']}")


def partition(given: argparse.Namespace) -> None:
    """show how the data is split over the clients"""
    from rich.console import Console
    from rich.table import Table

    from fedpeft.config import Config
    from fedpeft.data import partitions
    from fedpeft.data.partitions.picture import draw
    from fedpeft.simulations.assemble import deal

    config = Config.load(*_config_and_overrides(given.config))
    split = deal(config)
    corpus, dealt = split.corpus, split.partition
    header, rows, measures = partitions.table(dealt, corpus.train)
    shown = Table(*header)
    kept = rows[: max(0, given.rows)]
    for row in kept:
        shown.add_row(*row)
    Console().print(shown)
    if len(rows) > len(kept):
        print(f"... and {len(rows) - len(kept)} more clients (--rows shows more)")
    for name, value in measures.items():
        print(f"{name}: {value:,.4f}" if isinstance(value, float) else f"{name}: {value:,}")
    if given.examples:
        from fedpeft.quiet import quiet_libraries
        from fedpeft.simulations.examples import show

        with quiet_libraries():
            for line in show(config, split, given.examples):
                print(line)
    if given.out:
        out = _folder(given.out)
        counts = partitions.label_counts(dealt, corpus.train)
        draw(counts, corpus.train.label_names, dealt.names, out / "partition.png")
        lines = [",".join(_csv(cell) for cell in row) for row in (header, *rows)]
        (out / "partition.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out / 'partition.png'} and {out / 'partition.csv'} written")


def privacy(given: argparse.Namespace) -> None:
    """what differential privacy will cost, before anything is trained (plan), and whether the code keeps it (audit)"""
    from fedpeft.config import Config

    config = Config.load(*_config_and_overrides(given.config))
    if config.privacy is None:
        raise UserError(Problem("privacy", "the config asks for none", do="give privacy.target_epsilon, or privacy.noise_multiplier"))
    {"plan": _plan, "audit": _audit}[given.what](config)


def _audit(config: Config) -> None:
    from fedpeft.simulations.privacy_audit import audit

    found = audit(config)
    print("\n".join(found.lines()))
    if not found.passed:
        raise RunStopped("the privacy that is claimed is not kept: see the lines with FAIL or VIOLATION")


def _plan(config: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedpeft.simulations.privacy_plan import table

    header, rows, said = table(config)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    print(said)


def study(given: argparse.Namespace) -> None:
    """run a grid of settings x seeds, and compare what comes out"""
    import json

    from fedpeft.simulations.study_plan import plan

    path, overrides = _config_and_overrides(given.config)
    planned = plan(path, overrides, given.vary, given.tune, given.seeds)
    from fedpeft.simulations.study import run
    from fedpeft.simulations.study_tables import arm_table

    out = pathlib.Path(given.out)
    results = run(planned, out, given.target, given.json)
    failed = len(results.failed)
    if given.json:
        print(json.dumps({"event": "study", "out": str(out), "cells": len(results.cells), "failed": failed}), flush=True)
    else:
        print(arm_table(results))
        print(f"{out / 'study.md'}, study.png, results.csv and curves.csv written")
    if failed:
        raise RunStopped(f"{failed} of {len(results.cells)} cells failed ({out / 'study.md'} says why); the same command tries them again")


def report(given: argparse.Namespace) -> None:
    """one page that shows a run, or compares several"""
    from fedpeft.report import write_report
    from fedpeft.runs import read_runs

    runs = read_runs(map(pathlib.Path, given.runs))
    out = _folder(given.out) if given.out else pathlib.Path(given.runs[0])
    if len(runs) > 1 and not given.out:
        raise UserError(Problem("--out", "several runs need a folder for their comparison", do="name it with --out"))
    for written in write_report(runs, out):
        print(written)


def export(given: argparse.Namespace) -> None:
    """give away what a run has made: its adapter, or the whole model with the adapter merged into its weights"""
    from fedpeft.server.export import export

    print(export(pathlib.Path(given.run), pathlib.Path(given.to), given.client, given.merge, given.dtype))


def keys(given: argparse.Namespace) -> None:
    """certificates and keys for a server and its clients"""
    from fedpeft.keys import make

    for line in make(pathlib.Path(given.folder), _names(given.server), _names(given.clients)):
        print(line)


def server(given: argparse.Namespace) -> None:
    """run a federation with real clients: wait for them, and write the run folder"""
    from fedpeft.config import Config
    from fedpeft.screen import choose
    from fedpeft.server.run_folder import RunFolder

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the SuperLink is ended in order
    path, overrides = _config_and_overrides(given.config)
    out = pathlib.Path(given.out)
    if given.resume and path is None:
        path = str(RunFolder(out).config)
    config = Config.load(path, overrides)
    with choose(json=given.json) as screen:
        from fedpeft.server.deployment import Site, serve
        from fedpeft.server.federation import FINISHED

        site = Site(given.address, pathlib.Path(given.keys), given.insecure, given.health)
        summary = serve(config, site, out, given.resume, screen)
    if summary["stopped_because"] != FINISHED:
        raise RunStopped(f"the run stopped before its end: {summary['stopped_because']}")


def client(given: argparse.Namespace) -> None:
    """take part in a run with your own data, which stays here"""
    from fedpeft.screen import choose

    with choose(json=given.json) as screen:
        from fedpeft.client.participation import Place, take_part

        folder = pathlib.Path(given.keys)
        state = pathlib.Path(given.state) if given.state else folder / "state"
        take_part(Place(given.server, folder, state, given.insecure, given.health), pathlib.Path(given.data), screen)


def list_names(given: argparse.Namespace) -> None:
    """what a config may name, and every key it may hold"""
    from fedpeft.listing import describe

    for line in describe(given.kind):
        print(line)


def doctor(given: argparse.Namespace) -> None:
    """whether this machine is ready"""
    from fedpeft.listing import examine

    for line in examine():
        print(line)


COMMANDS: dict[str, Command] = {
    "simulate": simulate,
    "study": study,
    "partition": partition,
    "privacy": privacy,
    "report": report,
    "export": export,
    "keys": keys,
    "server": server,
    "client": client,
    "list": list_names,
    "doctor": doctor,
}


def _config_and_overrides(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """A first word without "=" is the config file."""
    if words and "=" not in words[0]:
        return words[0], list(words[1:])
    return None, list(words)


def _folder(name: str) -> pathlib.Path:
    """A folder to write to, made if it is not there."""
    try:
        pathlib.Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem("--out", f"{name} cannot be made ({error.strerror})")) from error
    return pathlib.Path(name)


def _names(text: str) -> list[str]:
    """The parts of A,B,C."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _csv(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if set(cell) & set(',"\n') else cell
