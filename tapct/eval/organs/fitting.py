"""Training patches of a segmentation task, and the decoders that are fitted to them.

Axes: K training patches, D channels, V label values of one scan, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tapct.base import rng
from tapct.config import setting
from tapct.eval.heads.decoder import Decoder, fit_decoder
from tapct.eval.heads.minibatch_decoder import HEADS, fit_head
from tapct.eval.labels.organ_classes import BODY, ClassWords

VALIDATION_SHARE = 0.25  # of the training patients, where a setting is chosen among several
MIN_PATIENTS_TO_CHOOSE = 4


@dataclass(frozen=True)
class DecoderConfig:
    """How a decoder is fitted; the same for every model."""

    head: str = setting(
        "linear",
        "`linear`: one linear layer, fitted by L-BFGS; `bn_linear`: batch normalisation and a "
        "linear layer, trained in minibatches; `mlp`: one hidden layer, trained in minibatches",
        choices=HEADS,
    )
    class_power: float = setting(
        0.5,
        "exponent p of the class weights (n / n_c)^p in the cross-entropy, where n_c of the n "
        "patches have class c; 0: every patch has the same weight, 1: every class has the same "
        "weight",
        ge=0,
        le=1,
    )
    dice_weight: float = setting(
        1.0, "weight of the soft Dice of the organs, which is added to the cross-entropy", ge=0
    )
    l2: float = setting(
        1e-6,
        "`linear`: L2 penalty on the weights w for standardised features, l2 / 2 x sum of w^2; the "
        "other heads: weight decay",
        ge=0,
    )
    steps: int = setting(
        100,
        "`linear`: L-BFGS iterations; the other heads are trained on 10 times this number of "
        "minibatches of 4,096 patches",
        ge=1,
    )
    lr: tuple[float, ...] = setting(
        (1e-3, 1e-2),
        "learning rates of `bn_linear` and `mlp` to choose from: the one with the best Dice on a "
        "quarter of the training patients is used",
        gt=0,
    )
    hidden: int = setting(256, "channels of the hidden layer of `mlp`", ge=1)


@dataclass(frozen=True)
class KeptPatches:
    """The training patches of one scan and one model.

    Args:
        scan: scan ID.
        patient: keyed hash of the patient; the scan ID where it is unknown.
        features_KD: float32.
        target_KV: float32, share of each label value in a patch times the number of patches that
            it stands for.
        values: label values of the columns.
        names: label value -> name.
    """

    scan: str
    patient: str
    features_KD: Tensor
    target_KV: Tensor
    values: tuple[int, ...]
    names: dict[int, str]

    def target_KC(self, classes: Sequence[str], words: ClassWords) -> Tensor:
        """The same by class instead of by label value.

        Args:
            classes: classes of the decoder; the label of a scan that is none of them counts as
                body.
            words: rule that gives the class of a label.
        """
        named = [words.class_of(value, self.names) for value in self.values]
        column_V = torch.tensor([classes.index(c if c in classes else BODY) for c in named])
        empty_KC = self.target_KV.new_zeros(len(self.target_KV), len(classes))
        return empty_KC.index_add_(1, column_V, self.target_KV)


@dataclass(frozen=True)
class FittedDecoder:
    """A decoder and the learning rate that was chosen for it.

    Args:
        decoder: the decoder.
        lr: learning rate; None for `linear`, which has none.
    """

    decoder: Decoder
    lr: float | None = None


def fit(
    kept: Sequence[KeptPatches],
    classes: Sequence[str],
    organs: Sequence[str],
    words: ClassWords,
    config: DecoderConfig,
    seed: int,
) -> FittedDecoder:
    """Fit the decoder of one model to the training patches of some scans.

    Where the config gives several learning rates, a quarter of the training patients is set aside,
    the rate with the best Dice on their patches is chosen, and the decoder is fitted again to all
    patients. With fewer than 4 patients the first rate is used.

    Args:
        kept: patches by scan.
        classes: classes in order.
        organs: classes whose Dice counts.
        words: rule that gives the class of a label.
        config: settings.
        seed: random seed of the choice of validation patients and of minibatches.
    """
    features_KD = torch.cat([one.features_KD for one in kept])
    target_KC = torch.cat([one.target_KC(classes, words) for one in kept]).to(features_KD.device)
    organ_columns = tuple(classes.index(organ) for organ in organs)
    patches = _Patches(features_KD, target_KC, organ_columns)
    if config.head == "linear":
        return FittedDecoder(_linear(patches, config))
    lr = config.lr[0]
    aside = _validation_patients([one.patient for one in kept], seed)
    if aside and len(config.lr) > 1:
        is_aside = [torch.full((len(one.features_KD),), one.patient in aside) for one in kept]
        is_aside_K = torch.cat(is_aside).to(features_KD.device)
        lr = _best_lr(patches, is_aside_K, config, seed)
    return FittedDecoder(_trained(patches, config, lr, seed), lr)


@dataclass(frozen=True)
class _Patches:
    """Training patches of several scans.

    Args:
        features_KD: float32.
        target_KC: mass of each class in each patch.
        organ_columns: classes whose Dice counts.
    """

    features_KD: Tensor
    target_KC: Tensor
    organ_columns: tuple[int, ...]

    def where(self, rows_K: Tensor) -> _Patches:
        """Some of the patches."""
        return replace(self, features_KD=self.features_KD[rows_K], target_KC=self.target_KC[rows_K])


def _linear(patches: _Patches, config: DecoderConfig) -> Decoder:
    return fit_decoder(
        patches.features_KD,
        patches.target_KC,
        l2=config.l2,
        steps=config.steps,
        class_power=config.class_power,
        dice_weight=config.dice_weight,
        dice_classes=patches.organ_columns,
    )


def _trained(patches: _Patches, config: DecoderConfig, lr: float, seed: int) -> Decoder:
    return fit_head(
        config.head,
        patches.features_KD,
        patches.target_KC,
        lr=lr,
        steps=10 * config.steps,
        weight_decay=config.l2,
        class_power=config.class_power,
        dice_weight=config.dice_weight,
        dice_classes=patches.organ_columns,
        hidden=config.hidden,
        seed=seed,
    )


def _best_lr(patches: _Patches, is_aside_K: Tensor, config: DecoderConfig, seed: int) -> float:
    """The learning rate with the best Dice on the patches that are set aside."""
    rest, aside = patches.where(~is_aside_K), patches.where(is_aside_K)
    scores = {}
    for lr in config.lr:
        decoder = _trained(rest, config, lr, seed)
        scores[lr] = patch_dice(decoder, aside.features_KD, aside.target_KC, patches.organ_columns)
    return max(scores, key=lambda lr: scores[lr])


def patch_dice(
    decoder: Decoder, features_KD: Tensor, target_KC: Tensor, columns: Sequence[int]
) -> float:
    """Mean Dice of the most probable class of each patch, counted in the mass of the patches.

    Args:
        decoder: fitted decoder.
        features_KD: features of the patches.
        target_KC: mass of each class in each patch.
        columns: classes of the mean; those without mass are left out.
    """
    target_KC = target_KC.to(features_KD.device)
    predicted_K = decoder.logits_NC(features_KD).argmax(1)
    all_K = target_KC.sum(1)
    scores = []
    for column in columns:
        is_predicted_K = predicted_K == column
        both = float(all_K[is_predicted_K].sum() + target_KC[:, column].sum())
        if float(target_KC[:, column].sum()) > 0:
            scores.append(2 * float(target_KC[is_predicted_K, column].sum()) / both)
    return sum(scores) / len(scores) if scores else 0.0


def _validation_patients(patients: Sequence[str], seed: int) -> frozenset[str]:
    """A quarter of the patients; none where there are fewer than 4."""
    people = set(patients)
    if len(people) < MIN_PATIENTS_TO_CHOOSE:
        return frozenset()

    def place(patient: str) -> tuple[int, str]:
        return rng.hash_int(seed, "decoder validation", rng.purpose_id(patient)), patient

    return frozenset(sorted(people, key=place)[: max(1, round(VALIDATION_SHARE * len(people)))])
