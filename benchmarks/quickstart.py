"""What the quickstart reaches, beside a linear probe on the frozen encoder and the same budget trained centrally.

    python benchmarks/quickstart.py [CONFIG] [key=value ...] [--seeds 3] [--central-rate 1e-3]

Prints a table and writes benchmarks/results/<config name>.json. The probe is logistic regression on mean-pooled,
normalised embeddings; its penalty is chosen on a quarter of the training data, never on the test part.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import tempfile
import time
from typing import Any

from fedpeft import environment

environment.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

from fedpeft import Config, simulate  # noqa: E402
from fedpeft.data.encoded import Encoded  # noqa: E402
from fedpeft.quiet import quiet_libraries  # noqa: E402
from fedpeft.screen import Plain  # noqa: E402
from fedpeft.simulations.assemble import Parts, assemble  # noqa: E402
from fedpeft.training.job import local_steps  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--central-rate", type=float, default=1e-3)
    given = parser.parse_args()
    path = given.config[0] if given.config and "=" not in given.config[0] else None
    overrides = given.config[path is not None :]
    rows = [measure(path, overrides, seed, given.central_rate) for seed in range(given.seeds)]
    name = Config.load(path, overrides).name
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"config": name, "overrides": overrides, **facts, "seeds": rows}, indent=2) + "\n")
    print(f"\n| {name}, {given.seeds} seeds | mean | each |\n|---|---|---|")
    for key in rows[0]:
        print(f"| {key} | {np.mean([row[key] for row in rows]):.3f} | {', '.join(f'{row[key]:.3f}' for row in rows)} |")


def measure(path: str | None, overrides: list[str], seed: int, central_rate: float) -> dict[str, float]:
    config = Config.load(path, [*overrides, f"seed={seed}"])
    with quiet_libraries():
        parts = assemble(config)
    budget = sum(local_steps(config, len(node.train)) for node in parts.worker.nodes.values())
    steps = round(budget * config.strategy.fraction_train * config.strategy.num_rounds)
    central = ["partition={name: iid, clients: 1}", "strategy.num_rounds=1", "strategy.fraction_train=1.0", f"training.max_steps={steps}"]
    row = {"majority class": float(np.bincount(parts.test.labels).max() / len(parts.test)), "frozen probe": probe(parts)}
    started = time.perf_counter()
    federated = run([*overrides, f"seed={seed}"], path)
    row |= {"before round 1": federated["initial"]["accuracy"], "federated": federated["metrics"]["accuracy"]}
    row["federated, seconds"] = time.perf_counter() - started
    row["same budget, centrally"] = run([*overrides, f"seed={seed}", *central, f"training.learning_rate={central_rate}"], path)["metrics"][
        "accuracy"
    ]
    print(f"seed {seed}: {row}", flush=True)
    return row


def run(overrides: list[str], path: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return simulate(Config.load(path, overrides), pathlib.Path(folder) / "run", screen=Plain()).summary


def probe(parts: Parts) -> float:
    """Test accuracy of logistic regression on frozen, mean-pooled, normalised embeddings."""
    nodes = list(parts.worker.nodes.values())
    train = Encoded([row for node in nodes for row in node.train.inputs], np.concatenate([node.train.labels for node in nodes]), 0)
    x, x_test = embed(parts, train), embed(parts, parts.test)
    order = np.random.default_rng(0).permutation(len(x))
    held, kept = order[: len(x) // 4], order[len(x) // 4 :]
    scores = {
        c: LogisticRegression(C=c, max_iter=2000).fit(x[kept], train.labels[kept]).score(x[held], train.labels[held]) for c in (1, 10, 100)
    }
    best = max(scores, key=lambda c: scores[c])
    return float(LogisticRegression(C=best, max_iter=2000).fit(x, train.labels).score(x_test, parts.test.labels))


def embed(parts: Parts, data: Encoded) -> np.ndarray[Any, Any]:
    base = parts.adapted.base
    out = None
    base.model.eval()
    with torch.no_grad(), parts.adapted.model.disable_adapter():
        for rows in data.by_length(64):
            inputs, _ = data.batch(rows, base.tokenizer, base.device)
            hidden = base.model.base_model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu().numpy()
            out = np.empty((len(data), pooled.shape[1]), np.float32) if out is None else out
            out[rows] = pooled
    assert out is not None
    return out


if __name__ == "__main__":
    main()
