"""Heads on vectors equal scikit-learn and slow loops; the choice sees validation patients only."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from tapct.eval.heads import probe_training, probes
from tapct.eval.heads.probe_training import EfficientProbe, GatedAttention, Linear, Recipe
from tapct.eval.heads.probes import ClassHeadSettings, HeadSettings, Scaler, Target
from tapct.eval.targets import probe_choice
from tapct.eval.targets.probe_choice import Candidate, Labelled
from tapct.eval.targets.vectors import ScanVectors


@dataclasses.dataclass(frozen=True)
class Settings(ClassHeadSettings, HeadSettings):
    """Settings of all heads."""


QUICK = Settings(C=(0.01, 1.0), epochs=30, warmup_epochs=2, batch_size=8, hidden=4, queries=3)


def classes_of(rng: np.random.Generator, num: int, dim: int, num_classes: int):
    target_N = np.arange(num) % num_classes
    x_ND = rng.normal(size=(num, dim))
    x_ND[:, :num_classes] += 1.5 * np.eye(num_classes)[target_N]
    return x_ND, target_N


@pytest.mark.parametrize(("num", "dim"), [(40, 5), (20, 60)])  # narrow, and wider than long
@pytest.mark.parametrize("num_classes", [2, 3])
def test_logistic_regression_equals_scikit_learn_at_every_c(num, dim, num_classes) -> None:
    from sklearn.linear_model import LogisticRegression

    x_ND, target_N = classes_of(np.random.default_rng(0), num, dim, num_classes)
    members = probes.grid("logistic", QUICK)
    config = dataclasses.replace(QUICK, class_weight="balanced")
    fitted = probes.fit("logistic", x_ND, Target(target_N, num_classes), members, config, 0)
    for member in fitted:
        own = LogisticRegression(
            C=member.settings["C"], tol=1e-10, max_iter=5000, class_weight="balanced"
        ).fit(x_ND, target_N)
        assert member.predict(x_ND) == pytest.approx(own.predict_proba(x_ND), abs=2e-4)


@pytest.mark.parametrize(("num", "dim"), [(30, 6), (12, 40)])
def test_ridge_regression_equals_scikit_learn_at_every_c(num: int, dim: int) -> None:
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(1)
    x_ND = rng.normal(3, 2, size=(num, dim))
    values_N = x_ND[:, 0] * 2 + 100 + rng.normal(size=num)
    fitted = probes.fit("ridge", x_ND, Target(values_N), probes.grid("ridge", HeadSettings()),
                        HeadSettings(), 0)  # fmt: skip
    assert len(fitted) == 12
    for member in fitted:
        own = Ridge(alpha=1 / member.settings["C"], solver="svd").fit(x_ND, values_N)
        assert member.predict(x_ND) == pytest.approx(own.predict(x_ND), rel=1e-6)


def test_a_class_that_the_training_scans_lack_has_probability_zero() -> None:
    x_ND, target_N = classes_of(np.random.default_rng(2), 20, 4, 2)
    (member,) = probes.fit("logistic", x_ND, Target(target_N * 2, 3), [{"C": 1.0}], QUICK, 0)
    probability_NC = member.predict(x_ND)
    assert (probability_NC[:, 1] == 0).all()
    assert probability_NC.sum(1) == pytest.approx(1)
    one_class = Target(np.zeros(20, dtype=np.int64), 2)
    (member,) = probes.fit("logistic", x_ND, one_class, [{"C": 1.0}], QUICK, 0)
    assert (member.predict(x_ND)[:, 0] == 1).all()


@pytest.mark.parametrize("architecture", [Linear(), GatedAttention(4), EfficientProbe(3)])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_members_of_a_grid_equal_torch_optim_adamw_one_by_one(architecture, num_classes) -> None:
    rng = np.random.default_rng(3)
    x_NWD = [rng.normal(size=(1 + i % 3, 5)).astype(np.float32) for i in range(11)]
    if isinstance(architecture, Linear):
        x_NWD = [one[:1] for one in x_NWD]
    values_N = torch.from_numpy(rng.normal(size=11)).float()
    if num_classes:
        values_N = torch.arange(11) % num_classes
    lr, decay = [1e-3, 1e-2, 0.1], [0.0, 0.1, 0.01]
    recipe = Recipe(epochs=4, warmup_epochs=1, batch_size=4, balanced=False, seed=7)
    outputs = num_classes or 1
    together = probe_training.train(architecture, x_NWD, values_N, outputs, lr, decay, recipe)
    for g in range(3):
        draw = torch.Generator().manual_seed(
            probe_training.rng.hash_int(recipe.seed, "probe training")
        )
        own = architecture.start(1, 5, outputs, draw)
        leaves = {name: nn.Parameter(value) for name, value in own.items()}
        optimizer = torch.optim.AdamW(leaves.values(), lr=lr[g], weight_decay=decay[g])
        step = 0
        for _ in range(recipe.epochs):
            order = torch.randperm(11, generator=draw)
            for rows in order.split(4):
                optimizer.param_groups[0]["lr"] = lr[g] * probe_training.factor(step, 3, recipe)
                scores = [
                    architecture.outputs(leaves, torch.from_numpy(x_NWD[i])[None],
                                         torch.ones(1, len(x_NWD[i]), dtype=torch.bool))[0, 0]
                    for i in rows.tolist()
                ]  # fmt: skip
                scores_BC = torch.stack(scores)
                if num_classes:
                    loss = nn.functional.cross_entropy(scores_BC, values_N[rows])
                else:
                    loss = nn.functional.mse_loss(scores_BC[:, 0], values_N[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
        for name, leaf in leaves.items():
            torch.testing.assert_close(together[name][g], leaf.detach()[0], rtol=2e-4, atol=2e-5)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    recipe = Recipe(epochs=10, warmup_epochs=2)
    factors = [probe_training.factor(step, 3, recipe) for step in range(30)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert factors[6] == 1 and sorted(factors[6:], reverse=True) == factors[6:]
    assert factors[-1] < 0.01


def test_rare_classes_are_drawn_as_often_as_others() -> None:
    target_N = torch.tensor([0] * 95 + [1] * 5)
    draw = torch.Generator().manual_seed(0)
    drawn = torch.cat([probe_training._order(target_N, True, draw) for _ in range(50)])
    assert float(target_N[drawn].float().mean()) == pytest.approx(0.5, abs=0.02)


def test_attention_weights_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(5)
    draw = torch.Generator().manual_seed(1)
    x_WD = torch.from_numpy(rng.normal(size=(4, 6))).float()
    padding_WD = torch.cat([x_WD, torch.zeros(2, 6)])
    is_window_BW = torch.tensor([[True] * 4 + [False] * 2])
    gated = GatedAttention(3)
    own = gated.start(1, 6, 2, draw)
    own["weight"] = torch.from_numpy(rng.normal(size=(1, 6, 2))).float()
    score_W = [
        float(
            own["score"][0] @ (torch.tanh(h @ own["tanh"][0]) * torch.sigmoid(h @ own["gate"][0]))
        )
        for h in x_WD
    ]
    share_W = np.exp(score_W) / np.exp(score_W).sum()
    expected = (torch.from_numpy(share_W).float() @ x_WD) @ own["weight"][0]
    assert torch.allclose(
        gated.outputs(own, padding_WD[None], is_window_BW)[0, 0], expected, atol=1e-5
    )
    probe = EfficientProbe(3)
    own = probe.start(1, 6, 2, draw)
    own["query"] *= 100
    own["weight"] = torch.from_numpy(rng.normal(size=(1, 6, 2))).float()
    pooled = []
    for channel in range(6):
        query_D = own["query"][0, channel // 2]
        share_W = torch.softmax(x_WD @ query_D / math.sqrt(6), 0)
        pooled.append(float(share_W @ x_WD[:, channel]))
    expected = torch.tensor(pooled) @ own["weight"][0]
    assert torch.allclose(
        probe.outputs(own, padding_WD[None], is_window_BW)[0, 0], expected, atol=1e-5
    )


def test_scaling_uses_training_scans_and_fills_in_what_a_scan_lacks() -> None:
    x_ND = np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, np.nan]])
    scaler = Scaler.of(list(x_ND), "zscore")
    assert scaler(x_ND[0]).tolist() == [-1, 0]  # the constant channel carries nothing
    assert scaler(x_ND[2]).tolist() == [0, 0]
    assert scaler(np.array([5.0, 9.0])).tolist() == [3, 0]
    raw = Scaler.of(list(x_ND), "raw")
    assert raw(x_ND[1]).tolist() == [3, 5] and raw(x_ND[2]).tolist() == [2, 5]


# --- the choice ---


def scans_with(vectors: dict[str, np.ndarray]) -> list[ScanVectors]:
    """Scans of a backbone with one block from part -> (N, D)."""
    num = len(next(iter(vectors.values())))
    return [
        ScanVectors(1, {0: {part: x_ND[i].astype(np.float32) for part, x_ND in vectors.items()}})
        for i in range(num)
    ]


def labelled(x: dict[str, np.ndarray], target: Target, sides: list[str] | None = None) -> Labelled:
    num = len(target.values_N)
    patients = [f"p{i // 2}" for i in range(num)]
    return Labelled(scans_with(x), patients, sides or [""] * num, target)


def test_the_vector_that_sees_the_target_is_chosen() -> None:
    rng = np.random.default_rng(8)
    noise = {name: rng.normal(size=(40, 4)) for name in ("cls", "mean", "std", "max")}
    target_N = rng.permutation(np.arange(40) % 2)
    noise["max"][:, 1] += 5 * target_N
    wanted = probe_choice.candidates(
        ["logistic"], ["cls", "mean", "mean_std_max"], ["last"], ["zscore"]
    )
    choice = probe_choice.choose(wanted, labelled(noise, Target(target_N, 2)), QUICK, 4, 0)
    assert choice.chosen.candidate.vector == "mean_std_max"
    assert choice.chosen.validation > 0.9 > choice.outcomes[0].validation
    assert choice.how == "4-fold cross-validation over 20 training patients"


def test_the_same_choice_by_a_plain_loop_over_folds() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    x_ND, target_N = classes_of(np.random.default_rng(9), 24, 3, 2)
    x_ND[:, :2] *= 0.4
    given = labelled({"cls": x_ND}, Target(target_N, 2))
    folds, _ = probe_choice.make_folds(given, 3, 0)
    wanted = [Candidate("logistic", "cls", "last", "zscore")]
    choice = probe_choice.choose(wanted, given, QUICK, 3, 0)
    values = {}
    x_ND = x_ND.astype(np.float32).astype(np.float64)
    for c in QUICK.C:
        truth, scores = [], []
        for fitted_to, aside in folds:
            mean_D, sd_D = x_ND[fitted_to].mean(0), x_ND[fitted_to].std(0)
            model = LogisticRegression(C=c, tol=1e-10).fit(
                (x_ND[fitted_to] - mean_D) / sd_D, target_N[fitted_to]
            )
            scores += model.predict_proba((x_ND[aside] - mean_D) / sd_D)[:, 1].tolist()
            truth += target_N[aside].tolist()
        values[c] = roc_auc_score(truth, scores)
    assert choice.chosen.validation == pytest.approx(max(values.values()))
    assert values[choice.chosen.settings["C"]] == pytest.approx(choice.chosen.validation)


def test_patients_of_validation_scans_are_not_fitted_to() -> None:
    sides, people = ["train", "train", "val", "train"], ["a", "b", "b", "c"]
    given = Labelled([], people, sides, Target(np.array([0, 1, 1, 0]), 2))
    ((fitted_to, aside),), _ = probe_choice.make_folds(
        dataclasses.replace(given, scans=[None] * 4), 3, 0
    )
    assert (fitted_to.tolist(), aside.tolist()) == ([0, 3], [2])


def test_folds_keep_patients_together_and_classes_apart() -> None:
    target_N = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0] * 3)  # 9 positive patients of 18
    given = labelled({"cls": np.zeros((36, 1))}, Target(target_N, 2))
    folds, _ = probe_choice.make_folds(given, 3, 0)
    assert sorted(np.concatenate([aside for _, aside in folds])) == list(range(36))
    for fitted_to, aside in folds:
        assert not {i // 2 for i in fitted_to} & {i // 2 for i in aside}
        assert target_N[aside].sum() == 3
    again, _ = probe_choice.make_folds(given, 3, 0)
    other, _ = probe_choice.make_folds(given, 3, 1)
    assert [list(aside) for _, aside in again] == [list(aside) for _, aside in folds]
    assert [list(aside) for _, aside in other] != [list(aside) for _, aside in folds]


def test_the_validation_scans_of_an_official_split_are_used_alone() -> None:
    rng = np.random.default_rng(10)
    target_N = np.arange(24) % 2
    # cls sees the target in the training scans only, mean in the validation scans too
    is_val_N = np.arange(24) >= 16
    cls_ND = rng.normal(size=(24, 2))
    cls_ND[:, 0] += np.where(is_val_N, -3, 3) * target_N
    mean_ND = rng.normal(size=(24, 2))
    mean_ND[:, 0] += 3 * target_N
    sides = ["val" if one else "train" for one in is_val_N]
    given = labelled({"cls": cls_ND, "mean": mean_ND}, Target(target_N, 2), sides)
    wanted = probe_choice.candidates(["logistic"], ["cls", "mean"], ["last"], ["raw"])
    choice = probe_choice.choose(wanted, given, QUICK, 5, 0)
    assert choice.how == "8 validation scans of the official split"
    assert choice.chosen.candidate.vector == "mean"


def test_two_patients_leave_no_choice_and_this_is_stated() -> None:
    given = labelled({"cls": np.arange(4.0)[:, None]}, Target(np.array([0, 1, 0, 1]), 2))
    wanted = probe_choice.candidates(["logistic"], ["registers", "cls"], ["last"], ["raw"])
    choice = probe_choice.choose(wanted, given, QUICK, 5, 0)
    assert choice.how.startswith("none: fewer than 3 training patients")
    assert math.isnan(choice.chosen.validation)
    assert choice.left_out == ("registers of last",)


@pytest.mark.parametrize("head", ["adamw_grid", "abmil", "efficient"])
def test_heads_trained_by_adamw_learn_and_repeat(head: str) -> None:
    rng = np.random.default_rng(11)
    target_N = np.arange(20) % 2
    config = dataclasses.replace(QUICK, lr=(0.1,), attention_lr=(0.1,))
    x = [rng.normal(size=(3, 4)) for _ in target_N]
    for one, label in zip(x, target_N, strict=True):
        one[rng.integers(3), 2] += 6 * label  # a lesion in one window
    if head == "adamw_grid":
        x = [one.max(0) for one in x]
    members = probes.grid(head, config)
    first, again = (
        probes.fit(head, x, Target(target_N, 2), members, config, 0)[0].predict(x) for _ in range(2)
    )
    assert (first == again).all()
    assert ((first[:, 1] > 0.5) == target_N).mean() > 0.9
