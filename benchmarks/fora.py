"""FoRA against LoRA at half the parameters, and which of its two ideas does what: centrally and federated, on real data.

    python benchmarks/fora.py --data DIR [--out DIR] [--sets sst2 ag_news]

DIR holds sst2/ and ag_news/, each with train.csv.gz and test.csv.gz (columns text and label); strategies.py draws the same
4,000 and 500 of their rows. Five arms over three seeds:

  neither        LoRA of rank r in every layer
  Fisher only    LoRA of rank r in the half of the layers with the highest Fisher scores: half the parameters
  Stiefel only   B orthonormal in every layer
  both           FoRA: half the parameters
  half the rank  LoRA of rank r / 2 in every layer: half the parameters without an idea

Federated: ten clients, Dirichlet 0.5, eight rounds of five steps. Central: one client that holds everything and takes as
many steps as all clients together. The learning rate is picked for each arm and place between three, on a validation split of
the first seed of the first set, and used on both sets. Writes benchmarks/results/fora.json and fora.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
from typing import Any

from fedpeft import environment

environment.prepare()

import torch  # noqa: E402
from sets import subset  # noqa: E402
from tables import said, signed  # noqa: E402

from fedpeft.intervals import estimate  # noqa: E402
from fedpeft.simulations.study import run  # noqa: E402
from fedpeft.simulations.study_plan import Settings, plan  # noqa: E402
from fedpeft.simulations.study_results import Results, paired  # noqa: E402

HERE = pathlib.Path(__file__).parent
SETS = ["sst2", "ag_news"]
SEEDS = 3
RATES = ["3e-3", "1e-2", "3e-2"]
ARMS: dict[str, Settings] = {
    "neither (LoRA)": {"adapter.name": "lora"},
    "Fisher only": {"adapter.name": "fora", "adapter.orthonormal": "false"},
    "Stiefel only": {"adapter.name": "fora", "adapter.layers": "1"},
    "both (FoRA)": {"adapter.name": "fora"},
    "half the rank": {"adapter.name": "lora", "adapter.r": "4", "adapter.lora_alpha": "8"},
}
PLACES: dict[str, Settings] = {
    "federated": {"partition.alpha": "0.5"},
    "central": {
        "partition": "{name: iid, clients: 1}",
        "strategy.num_rounds": "1",
        "training.max_steps": "400",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/fora"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for place, settings in PLACES.items():
        picked: list[Settings] = []
        for name in given.sets:
            data = subset(given.data / name, given.out / "data" / name)
            overrides = [f"name={name}", f"data.name={data}", *(f"{key}={value}" for key, value in settings.items())]
            choices = [{"training.learning_rate": rate} for rate in RATES]
            study = plan(str(HERE / "fora.yaml"), overrides, [picked or list(ARMS.values())], [] if picked else [choices], SEEDS)
            results = run(study, given.out / f"{name}-{place}")
            picked = picked or [dict(cells[0].settings) for cells in results.arms.values()]
            rows += compared(name, place, results)
            write(rows)


def compared(name: str, place: str, results: Results) -> list[dict[str, Any]]:
    """A row an arm, each beside LoRA at the same seeds."""
    arms = list(results.arms.values())
    rows = []
    for title, cells in zip(ARMS, arms, strict=True):
        difference = paired(cells, arms[0])
        rows.append(
            {
                "set": name,
                "place": place,
                "arm": title,
                "learning rate": cells[0].settings.get("training.learning_rate"),
                "parameters": next((cell.result("trainable_parameters") for cell in cells if cell.run), None),
                "accuracy": [cell.result("final") for cell in cells if cell.run],
                "against LoRA": [None, None] if cells is arms[0] else [difference.mean, difference.half_width],
                "bytes": [cell.result("bytes_up") + cell.result("bytes_down") for cell in cells if cell.run],
                "seconds": [cell.result("seconds") for cell in cells if cell.run],
                "failed": [cell.reason for cell in cells if cell.reason],
            }
        )
    return rows


def write(rows: list[dict[str, Any]]) -> None:
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts |= {"config": "benchmarks/fora.yaml", "seeds": SEEDS, "rates": RATES}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "fora.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    (HERE / "results" / "fora.md").write_text(page(rows))


def page(rows: list[dict[str, Any]]) -> str:
    lines = []
    for name, place in dict.fromkeys((row["set"], row["place"]) for row in rows):
        lines += [f"### {name}, {place}", "", "| arm | learning rate | parameters | accuracy | against LoRA | seconds |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in (row for row in rows if (row["set"], row["place"]) == (name, place)):
            lines += [
                f"| {row['arm']} | {row['learning rate']} | {row['parameters']:,} | {said(estimate(row['accuracy']))} | "
                f"{signed(*row['against LoRA'])} | {estimate(row['seconds']).mean or 0:.0f} |"
            ]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
