"""Strategies over strategies: server optimisers against their papers' updates, robust means against arbitrary clients, refusals."""

import numpy as np
import pytest

from fedpeft import Config, UserError
from fedpeft.lookup import TABLES, find
from fedpeft.records import Layout, Update
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.over import Over
from fedpeft.strategies.strategy import Round

AT = Round(1, 10, Layout({}))


def steps(strategy, deltas, x=0.0):
    """The value of one number after the server has seen each delta."""
    arrays, state, path = {"w": np.array([x])}, strategy.start({}), []
    for delta in deltas:
        arrays, state = strategy.apply(arrays, {"w": arrays["w"] + delta}, state)
        path.append(float(arrays["w"][0]))
    return path


def by_hand(name, deltas, eta, b1=0.9, b2=0.99, tau=1e-3, x=0.0):
    """Reddi et al., algorithm 2, and Hsu et al., written for one number."""
    m, v, path = 0.0, tau**2, []
    for d in deltas:
        if name == "fedavgm":
            m = b1 * m + d
            x += eta * m
        else:
            m = d if name == "fedadagrad" else b1 * m + (1 - b1) * d
            if name == "fedadagrad":
                v = v + d**2
            elif name == "fedadam":
                v = b2 * v + (1 - b2) * d**2
            else:
                v = v - (1 - b2) * d**2 * np.sign(v - d**2)
            x += eta * m / (np.sqrt(v) + tau)
        path.append(x)
    return path


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_a_server_optimiser_is_the_papers(name):
    deltas = [0.5, -0.2, 0.0, 0.003, -1.0]
    strategy = find("strategy", name)(server_learning_rate=0.05)
    np.testing.assert_allclose(steps(strategy, deltas), by_hand(name, deltas, 0.05), rtol=1e-12)


def test_momentum_zero_and_rate_one_is_the_strategy_underneath():
    strategy = find("strategy", "fedavgm")(server_momentum=0.0)
    assert steps(strategy, [0.5, -0.25]) == [0.5, 0.25]


def test_what_is_not_combined_keeps_value_and_moments():
    strategy = find("strategy", "fedadam")(over="ro_lora")
    arrays, state = strategy.apply({"a": np.ones(1), "b": np.ones(1)}, {"a": np.zeros(1)}, {})
    assert arrays["b"] == 1.0
    assert set(state) == {"m/a", "v/a"}


def test_dtypes_survive_a_server_optimiser():
    arrays, _ = find("strategy", "fedadam")().apply({"a": np.ones(2, np.float32)}, {"a": np.zeros(2, np.float32)}, {})
    assert arrays["a"].dtype == np.float32


def updates(rows):
    return [Update(1, client, {"w": np.asarray(row, float)}, 10 + client) for client, row in enumerate(rows)]


def gathered(name, rows, **own):
    return find("strategy", name)(of="factors", **own).combine(updates(rows), {"w": np.zeros(2)}, AT).arrays["w"]


HONEST = [[1.0, 2.0], [1.1, 2.1], [0.9, 1.9], [1.0, 2.1], [1.05, 1.95]]


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "multi_krum"])
@pytest.mark.parametrize("attack", [1e30, -1e30, 5.0])
def test_one_arbitrary_client_moves_the_result_little(name, attack):
    result = gathered(name, [*HONEST, [attack, -attack]])
    assert np.abs(result - [1.0, 2.0]).max() < 0.2
    plain = FedAvg().combine(updates([*HONEST, [attack, -attack]]), {"w": np.zeros(2)}, AT).arrays["w"]
    assert np.abs(plain - [1.0, 2.0]).max() > 0.5, "the attack is one"


def test_median_and_trimmed_mean_are_those_of_every_entry():
    rows = np.random.default_rng(0).normal(size=(7, 5))
    np.testing.assert_allclose(gathered("median", rows), np.median(rows, axis=0))
    from scipy.stats import trim_mean

    np.testing.assert_allclose(gathered("trimmed_mean", rows, beta=0.3), trim_mean(rows, 0.3))


def test_a_trimmed_mean_always_trims():
    rows = [[0.0], [0.0], [0.0], [1e9]]
    assert gathered("trimmed_mean", rows, beta=0.1) == 0.0


def test_krum_is_the_row_with_the_smallest_score():
    rows = np.random.default_rng(1).normal(size=(9, 4))
    scores = [np.sort(((rows - row) ** 2).sum(axis=1))[1 : 9 - 2 - 2 + 1].sum() for row in rows]
    np.testing.assert_array_equal(gathered("krum", rows, f=2), rows[int(np.argmin(scores))])
    best = sorted(np.argsort(scores)[:3])
    np.testing.assert_allclose(gathered("multi_krum", rows, f=2, m=3), rows[best].mean(axis=0))


def test_on_a_tie_the_earlier_client_wins():
    assert find("strategy", "krum")(of="factors").ranked(np.zeros((5, 2))) == [0, 1, 2, 3, 4]


REFUSED = {
    "momentum over a turning basis": ({"name": "fedadam", "over": "fed_svd"}, "turns the basis"),
    "robust factors without saying so": ({"name": "median"}, "say of: factors"),
    "a robust mean in place of a correction": ({"name": "krum", "over": "lora_fair", "of": "factors"}, "does more than average"),
    "over itself": ({"name": "fedprox", "over": "fedadam"}, "laid over another"),
    "control variates of tensors that move by rules of their own": ({"name": "scaffold"}, "no sum of gradients"),
    "over nothing known": ({"name": "fedprox", "over": "fedavgg"}, 'did you mean "fedavg"?'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_composition_that_means_nothing_is_refused_with_the_reason(name):
    strategy, says = REFUSED[name]
    ruled = {"adapter": {"name": "fora"}, "training": {"optimizer": "sgd"}} if strategy == {"name": "scaffold"} else {}
    with pytest.raises(UserError) as caught:
        Config.from_dict({"strategy": strategy, **ruled})
    (problem,) = caught.value.problems
    assert says in str(problem)
    assert problem.where.startswith("adapter" if ruled else "strategy")


OVERS = [name for name in TABLES["strategy"] if issubclass(find("strategy", name), Over)]


@pytest.mark.parametrize("over", sorted(set(TABLES["strategy"]) - set(OVERS)))
@pytest.mark.parametrize("name", OVERS)
def test_what_is_said_of_a_strategy_is_said_of_one_over_it(name, over):
    """Privacy, exports and refusals go by these."""
    target = find("strategy", name)
    try:
        whole = target(over=over, **({"of": "factors"} if "of" in target.model_fields else {}))
    except ValueError:
        return  # the pair means nothing
    inner = find("strategy", over)()
    for fact in ("noise_proof", "personal", "merges", "mixed_ranks", "of_factors"):
        assert getattr(whole, fact) == getattr(inner, fact), fact
    assert whole.stateful == (inner.stateful or name == "scaffold")


@pytest.mark.parametrize("over", ["fedsmooth_lora", "slora"])
def test_a_layer_hides_no_uploads_that_noise_does_not_cover(over):
    with pytest.raises(UserError, match="uploads functions of the data that training's noise does not cover"):
        Config.from_dict(
            {"strategy": {"name": "fedprox", "over": over}, "privacy": {"target_epsilon": 4}, "training": {"head_init": "random"}}
        )


def test_personal_models_under_another_layer_are_evaluated_and_exported(tiny_settings, tmp_path):
    """A vanishing proximal term changes nothing."""
    from fedpeft import simulate

    own = {"name": "fedsa_lora", "num_rounds": 2}
    runs = [
        simulate(Config.from_dict({**tiny_settings, "strategy": strategy}), tmp_path / strategy["name"])
        for strategy in (own, {**own, "name": "fedprox", "over": "fedsa_lora", "mu": 1e-9})
    ]
    assert runs[0].summary["metrics"] == pytest.approx(runs[1].summary["metrics"], rel=1e-4)
    assert [len(list((run.folder / "personal").iterdir())) for run in runs] == [4, 4]


def test_multi_krum_wants_enough_updates_for_its_m():
    assert find("strategy", "multi_krum")(of="factors", f=1, m=5).fewest == 6


@pytest.mark.parametrize(
    "name",
    sorted(
        set(TABLES["strategy"])
        - {"fedavg", "ffa_lora", "lora_fair", "ro_lora", "fed_svd", "flora_na", "flora", "fedex_lora", "flex_lora", "fedsmooth_lora"}
        - {"het_lora", "fedsa_lora", "fed_sb", "fed_ask", "slora"}
    ),
)
@pytest.mark.parametrize("over", ["fedavg", "ffa_lora", "ro_lora"])
def test_every_composition_that_means_something_runs(name, over, tiny_settings, tmp_path):
    from fedpeft import simulate

    own = {"of": "factors"} if "of" in find("strategy", name).model_fields else {}
    settings = {
        **tiny_settings,
        "partition": {"name": "iid", "clients": 5},
        "strategy": {"name": name, "over": over, "num_rounds": 2, **own},
        "training": {**tiny_settings["training"], "optimizer": "sgd" if name == "scaffold" else "adamw"},
    }
    run = simulate(Config.from_dict(settings), tmp_path / "run")
    assert run.summary["stopped_because"] == "finished"
    assert run.summary["rejected_updates"] == 0


def test_too_few_clients_for_krum_are_refused_before_training(tiny_settings):
    from fedpeft.simulations.assemble import assemble

    with pytest.raises(UserError, match="krum needs 5 updates a round, and 4 of 4 clients are asked"):
        assemble(Config.from_dict({**tiny_settings, "strategy": {"name": "krum", "over": "ffa_lora"}}))


def test_a_strong_proximal_term_holds_the_clients(tiny_settings, tmp_path):
    from fedpeft import simulate

    moved = {}
    for mu in (1e-6, 30.0):
        settings = {**tiny_settings, "strategy": {"name": "fedprox", "mu": mu, "num_rounds": 1}}
        settings["training"] = {**tiny_settings["training"], "optimizer": "sgd", "max_steps": 20}
        import json

        simulate(Config.from_dict(settings), tmp_path / str(mu))
        line = json.loads((tmp_path / str(mu) / "rounds.jsonl").read_text().splitlines()[1])
        moved[mu] = max(line["client_update_norms"].values())
    assert moved[30.0] < 0.5 * moved[1e-6]


def test_one_proximal_step_is_the_gradient_of_the_paper(tiny_settings):
    """theta <- theta - eta (g + mu (theta - theta_start)), seen in the second step, where theta has left the start."""
    from fedpeft.simulations.assemble import assemble
    from fedpeft.training import one
    from fedpeft.training.job import Job

    training = {**tiny_settings["training"], "optimizer": "sgd", "max_grad_norm": None, "learning_rate": 0.1}
    ends = {}
    for steps_taken in (1, 2):
        config = Config.from_dict({**tiny_settings, "training": {**training, "max_steps": steps_taken}})
        parts = assemble(config)
        start, names = parts.adapted.read(), parts.adapted.trained
        for mu in (0.0, 0.5):
            (trained,) = one.train(parts.adapted, parts.task, config, [Job(0, 1, start, names, parts.worker.nodes[0].train, mu)])
            ends[steps_taken, mu] = trained.arrays
    for name in names:
        np.testing.assert_array_equal(ends[1, 0.0][name], ends[1, 0.5][name])
        pulled = 0.1 * 0.5 * (ends[1, 0.0][name] - start[name])
        np.testing.assert_allclose(ends[2, 0.5][name], ends[2, 0.0][name] - pulled, atol=1e-7)
