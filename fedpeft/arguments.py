"""What a person may type after `fedpeft`: every command's arguments. What the commands do is in cli.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

Command = Callable[[argparse.Namespace], None]


def parser(named: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands; what a command is for is its docstring."""
    parser = argparse.ArgumentParser(prog="fedpeft", description="Federated fine-tuning of Hugging Face models with LoRA-family adapters.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    made = {}
    for name, command in named.items():
        made[name] = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        made[name].set_defaults(command=command)
    for name in ("simulate", "study", "partition", "server"):
        made[name].add_argument(
            "config", nargs="*", metavar="CONFIG key=value", help="a YAML file and overrides; without a file: the quickstart"
        )
    made["simulate"].add_argument("--out", metavar="DIR", help="the run folder (default: runs/NAME)")
    made["simulate"].add_argument("--resume", action="store_true", help="continue the run in --out after its last whole round")
    made["simulate"].add_argument("--json", action="store_true", help="one JSON object a line instead of a progress bar")
    made["study"].add_argument(
        "--vary", action="append", default=[], metavar="KEY=A,B", help="settings to compare; given again: every combination"
    )
    made["study"].add_argument(
        "--tune", action="append", default=[], metavar="KEY=X,Y", help="settings to pick for each combination, on a validation split"
    )
    made["study"].add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of each combination (default: 3)")
    made["study"].add_argument("--out", required=True, metavar="DIR", help="the study's folder; the same command goes on with it")
    made["study"].add_argument("--target", type=float, metavar="X", help="show rounds and bytes until the metric first reaches X")
    made["study"].add_argument("--json", action="store_true", help="one JSON object a line instead of progress bars")
    made["privacy"].add_argument(
        "what",
        choices=["plan", "audit"],
        help="plan: sigma, steps and epsilon of every client; audit: checks, and a lower bound on epsilon",
    )
    made["privacy"].add_argument("config", nargs="*", metavar="CONFIG key=value", help="a YAML file and overrides")
    made["partition"].add_argument("--out", metavar="DIR", help="write partition.png and partition.csv there")
    made["partition"].add_argument(
        "--examples", type=int, default=0, metavar="N", help="print N examples of the first client as the model sees them"
    )
    made["partition"].add_argument("--rows", type=int, default=40, metavar="N", help="clients shown in the table (default: 40)")
    made["report"].add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    made["report"].add_argument("--out", metavar="DIR", help="where the comparison of several runs goes")
    made["export"].add_argument("run", metavar="RUN", help="the folder of a run that has ended")
    made["export"].add_argument("--to", required=True, metavar="DIR", help="a new folder")
    made["export"].add_argument("--merge", action="store_true", help="the whole model, for whoever has no PEFT")
    made["export"].add_argument("--client", metavar="NAME", help="that client's own model, where the strategy leaves it one")
    made["export"].add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the merged model")
    made["keys"].add_argument("folder", metavar="DIR", help="where they go; what is there already stays as it is")
    made["keys"].add_argument(
        "--server", required=True, metavar="NAME,...", help="host names or addresses that clients reach the server by"
    )
    made["keys"].add_argument("--clients", required=True, metavar="A,B,...", help="a name for each client")
    made["server"].add_argument("--address", required=True, metavar="HOST:PORT", help="where clients connect")
    made["server"].add_argument("--keys", required=True, metavar="DIR", help="the folder that fedpeft keys made")
    made["server"].add_argument("--out", required=True, metavar="DIR", help="the run folder")
    made["server"].add_argument("--resume", action="store_true", help="continue the run in --out; start it where there is none yet")
    made["client"].add_argument("--server", required=True, metavar="HOST:PORT", help="where the server is")
    made["client"].add_argument("--keys", required=True, metavar="DIR/NAME", help="this client's own folder, as fedpeft keys made it")
    made["client"].add_argument(
        "--data", required=True, metavar="FILE", help="a YAML file: where your data lies, and the limits of what you do"
    )
    made["client"].add_argument("--state", metavar="DIR", help="what the client remembers between rounds (default: state in --keys)")
    for name in ("server", "client"):
        made[name].add_argument("--insecure", action="store_true", help="no encryption: for trials on one machine only")
        made[name].add_argument("--health", metavar="HOST:PORT", help="answer GET /health there, in JSON")
        made[name].add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    made["list"].add_argument("kind", nargs="?", default="kinds", help='such as "strategy"; "config" lists every key')
    return parser
