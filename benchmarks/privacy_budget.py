"""What privacy costs: five methods at epsilon 1, 3, 6 and without privacy, on SST-2 and QNLI.

    python benchmarks/privacy_budget.py --data DIR [--out DIR] [--sets sst2 qnli]

DIR holds sst2/ and qnli/, each with train.csv.gz and test.csv.gz (GLUE's columns: text or question and sentence, and label). The
config is configs/studies/privacy_budget.yaml: three clients, iid, privacy of single examples over the whole run. The learning rate is
picked for each method among three, at epsilon 3 on a validation split of the first seed of SST-2, and used at every epsilon and on
QNLI; without privacy among three in the same way, with gradients clipped to 1. What the search costs in
privacy is not accounted, as in the papers. FoRA adapts every layer that the others adapt, since its choice
of layers looks at the data. Every set is a study of its own: a stopped benchmark goes on where it was. Writes
benchmarks/results/privacy_budget.json, .md and a picture for each set.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import platform
from typing import Any

from fedpeft import environment

environment.prepare()

import torch  # noqa: E402
from tables import said, signed  # noqa: E402

from fedpeft.intervals import Estimate, estimate  # noqa: E402
from fedpeft.simulations.study import run  # noqa: E402
from fedpeft.simulations.study_epsilon import draw, epsilon  # noqa: E402
from fedpeft.simulations.study_plan import Settings, plan  # noqa: E402
from fedpeft.simulations.study_results import Results, paired  # noqa: E402

HERE = pathlib.Path(__file__).parent
CONFIG = HERE.parent / "configs" / "studies" / "privacy_budget.yaml"
SEEDS = 3
RATES = ["1e-2", "3e-2", "1e-1"]
PLAIN_RATES = ["3e-3", "1e-2", "3e-2"]  # without privacy
METHODS: dict[str, Settings] = {
    "LoRA": {"strategy.name": "fedavg"},
    "FFA-LoRA": {"strategy.name": "ffa_lora"},
    "LoRA-FAIR": {"strategy.name": "lora_fair"},
    "FedSVD": {"strategy.name": "fed_svd"},
    "FoRA": {"strategy.name": "fedavg", "adapter.name": "fora", "adapter.layers": "1"},
}
PLAIN: Settings = {"privacy": "null", "training.max_grad_norm": "1"}
BUDGETS: list[Settings] = [PLAIN, *({"privacy": f"{{target_epsilon: {budget}, max_grad_norm: 5}}"} for budget in (6, 3, 1))]
TUNED_AT = BUDGETS[2]
SETS: dict[str, Settings] = {
    "sst2": {"data.max_length": "48"},
    "qnli": {  # pairs, three times as long, and 1,488 a client
        "data.columns": "{text: question, text_pair: sentence}",
        "data.max_length": "80",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/privacy-budget"))
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    given = parser.parse_args()
    private = tuned(given.data, given.out / "tuning", TUNED_AT, RATES)
    plain = tuned(given.data, given.out / "tuning-plain", PLAIN, PLAIN_RATES)
    arms = [
        {**settings, **budget, "training.learning_rate": (plain if budget is PLAIN else private)[method]}
        for method, settings in METHODS.items()
        for budget in BUDGETS
    ]
    rows: list[dict[str, Any]] = []
    for name in given.sets:
        study = plan(str(CONFIG), overrides(name, given.data), [arms], [], SEEDS)
        found = compared(name, run(study, given.out / name))
        (HERE / "results").mkdir(exist_ok=True)
        costs: dict[str, dict[float, Estimate]] = {method: {} for method in METHODS}
        for row in found:
            costs[row["method"]][row["epsilon"] or math.inf] = estimate(row["accuracy"])
        draw(costs, f"accuracy on {name}", HERE / "results" / f"privacy_budget_{name}.png")
        rows += found
        write(rows)


def tuned(data: pathlib.Path, out: pathlib.Path, at: Settings, rates: list[str]) -> dict[str, str]:
    """The learning rate of each method at one budget."""
    choices = [{"training.learning_rate": rate} for rate in rates]
    settings = [*overrides("sst2", data), *(f"{key}={value}" for key, value in at.items())]
    results = run(plan(str(CONFIG), settings, [list(METHODS.values())], [choices], 1), out)
    picked = [cells[0].settings["training.learning_rate"] for cells in results.arms.values()]
    return dict(zip(METHODS, picked, strict=True))


def overrides(name: str, data: pathlib.Path) -> list[str]:
    return [f"name={name}", f"data.name={data / name}", *(f"{key}={value}" for key, value in SETS[name].items())]


def compared(name: str, results: Results) -> list[dict[str, Any]]:
    """A row a method and budget, each beside LoRA at the same budget and seeds."""
    arms = list(results.arms.values())
    rows = []
    for place, cells in enumerate(arms):
        method, lora = list(METHODS)[place // len(BUDGETS)], arms[place % len(BUDGETS)]
        done = [cell.run for cell in cells if cell.run]
        difference = paired(cells, lora)
        rows.append(
            {
                "set": name,
                "method": method,
                "epsilon": None if not done or math.isinf(epsilon(done[0])) else epsilon(done[0]),
                "spent": [run.summary["privacy"]["epsilon"] for run in done if run.summary["privacy"]],
                "learning rate": cells[0].settings["training.learning_rate"],
                "parameters": done[0].summary["trainable_parameters"] if done else None,
                "accuracy": [cell.result("final") for cell in cells if cell.run],
                "against LoRA": [None, None] if cells is lora else [difference.mean, difference.half_width],
                "seconds": [cell.result("seconds") for cell in cells if cell.run],
                "failed": [cell.reason for cell in cells if cell.reason],
            }
        )
    return rows


def write(rows: list[dict[str, Any]]) -> None:
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts |= {"config": "configs/studies/privacy_budget.yaml", "seeds": SEEDS, "rates": RATES, "plain rates": PLAIN_RATES}
    (HERE / "results" / "privacy_budget.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    (HERE / "results" / "privacy_budget.md").write_text(page(rows))


def page(rows: list[dict[str, Any]]) -> str:
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        lines += [
            f"### {name}",
            "",
            "| method | learning rate | epsilon | accuracy | against LoRA | seconds |",
            "|---|---|---|---|---|---|",
        ]
        for row in (row for row in rows if row["set"] == name):
            budget = "none" if row["epsilon"] is None else f"{row['epsilon']:g}"
            lines += [
                f"| {row['method']} | {row['learning rate']} | {budget} | {said(estimate(row['accuracy']))} | "
                f"{signed(*row['against LoRA'])} | {estimate(row['seconds']).mean or 0:.0f} |"
            ]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
