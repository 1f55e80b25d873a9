"""Is the run learning? Measures of what the loss does not show, and a verdict in words.

Everything but `verdict` runs on the tensors' device without waiting for it (`rankme` excepted: an
SVD waits on CUDA).
Legend: N rows (teacher targets or tokens), K prototypes, B samples, D channels, P patch tokens.
    Entropies in nats.

A stuck run sits at CE = ln K; a collapsed one (every target one-hot on the same prototype) has the
best CE of all. The information of the targets distinguishes both from a run that learns. It is the
entropy of their mean minus the mean of their entropies (the mutual information of sample and
prototype): 0 when all targets are equal, whatever they are, and at most ln K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tapct.types import TargetSums

# a prototype is in use if it carries at least this part of its fair share 1/K of the target mass
USED_SHARE = 0.1
RANKME_ROWS = 512
OUTLIER_SIGMAS = 6.0  # robust standard deviations above the median norm
# and at least this part of the median above it, so that equal norms have no outliers
OUTLIER_FLOOR = 0.05

NO_INFORMATION = 0.05  # nats; below it the targets do not distinguish samples
FAINT_INFORMATION = 0.2  # nats; below it the run may still become stuck
NO_PROGRESS = 0.02  # nats of ln K - CE
MIN_STEPS = 200  # steps before which a finite run has no verdict
ONE_PROTOTYPE = 0.2  # as a share of ln K: below it the mean target sits on few prototypes


@dataclass(frozen=True)
class TargetHealth:
    """Health of one term's targets, float32 scalars on the device.

    Args:
        marginal_entropy: entropy of the mean target, nats; ln K when all prototypes serve equally.
        target_entropy: mean entropy of the targets, nats; ln K when each target is uniform.
        information: their difference, >= 0 up to rounding.
        prototypes_used: share of the K prototypes that carry at least `USED_SHARE` / K of the mass.
    """

    marginal_entropy: Tensor
    target_entropy: Tensor
    information: Tensor
    prototypes_used: Tensor


def target_health(sums: TargetSums) -> TargetHealth:
    """Entropies, information and prototypes in use; all 0 when there was no row."""
    rows = sums.rows.clamp_min(1.0)
    mean_K = sums.mass_K / rows
    marginal, target = torch.special.entr(mean_K).sum(), sums.entropy / rows
    used = (mean_K * len(mean_K) >= USED_SHARE).float().mean()
    return TargetHealth(marginal, target, marginal - target, used)


def rankme(features_ND: Tensor, eps: float = 1e-7) -> Tensor:
    """Effective rank: exp of the entropy of the normalised singular values, between 1 and min(rows,
    D).

    At most `RANKME_ROWS` evenly spaced rows are used, not centred, as in the paper. On CUDA this
    waits for the device: call it where metrics are fetched, not at every step.

    Args:
        features_ND: any scale, N >= 1.
    Source: Garrido et al. 2023, arXiv:2210.02885, equation 1.
    """
    stride = -(-len(features_ND) // RANKME_ROWS)
    singular = torch.linalg.svdvals(features_ND[::stride].detach().float())
    share = singular / singular.sum().clamp_min(eps) + eps
    return torch.special.entr(share).sum().exp()


def teacher_student_cosine(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean cosine of matching rows; 1 when student and teacher have equal directions."""
    return functional.cosine_similarity(
        student_BD.detach().float(), teacher_BD.detach().float(), dim=-1
    ).mean()


def cls_moments(cls_BD: Tensor) -> Tensor:
    """What `cls_std` needs of one batch, as sums that add up over ranks: float64 (3, D).

    Rows of the result: sum over samples of the L2-normalised class tokens, of their squares, and
        the count.
    """
    unit_BD = functional.normalize(cls_BD.detach().double(), dim=-1)
    return torch.stack(
        [unit_BD.sum(0), unit_BD.square().sum(0), torch.full_like(unit_BD[0], len(unit_BD))]
    )


def cls_std(moments_3D: Tensor) -> Tensor:
    """Spread of class tokens: standard deviation over samples of L2-normalised rows, mean over
    channels.

    Evenly spread tokens have 1/sqrt(D); 0 means that all samples look alike. The population
    formula: 0 at B = 1.

    Args:
        moments_3D: from `cls_moments`.
    Source: Chen & He 2020, arXiv:2011.10566, section 4.1.
    """
    total_D, squares_D, count_D = moments_3D
    mean_D = total_D / count_D
    return (squares_D / count_D - mean_D.square()).clamp_min(0.0).sqrt().mean()


def patch_norm_outliers(patches_PD: Tensor) -> Tensor:
    """Share of patch tokens whose norm stands out: above median + max(6 robust sigmas, 5 % of the
    median).

    A robust sigma is 1.4826 times the median absolute deviation. High-norm patches hold global
    instead of local content and spoil dense features; registers are the remedy. The paper cuts at a
    fixed norm per model.

    Args:
        patches_PD: patch tokens; any leading axes.
    Source: Darcet et al. 2023, arXiv:2309.16588, section 2.
    """
    norm = patches_PD.detach().float().norm(dim=-1).flatten()
    median = norm.median()
    sigma = 1.4826 * (norm - median).abs().median()
    return (
        (norm > median + torch.maximum(OUTLIER_SIGMAS * sigma, OUTLIER_FLOOR * median))
        .float()
        .mean()
    )


@dataclass(frozen=True)
class TermReading:
    """Recent means of one prototype loss, as plain numbers in nats.

    Args:
        name: `dino` or `ibot`.
        ln_k_minus_ce: ln K minus the plain mean cross-entropy.
        marginal_entropy: entropy of the mean target.
        target_entropy: mean entropy of the targets.
        ln_k: logarithm of the number of prototypes.
    """

    name: str
    ln_k_minus_ce: float
    marginal_entropy: float
    target_entropy: float
    ln_k: float

    @property
    def information(self) -> float:
        """Marginal minus mean target entropy, nats."""
        return self.marginal_entropy - self.target_entropy


@dataclass(frozen=True)
class Verdict:
    """What the health numbers show.

    Args:
        state: `alive`, `faint`, `not following`, `stuck`, `collapsed`, `not finite` (from good to
            bad), `unknown`, or `too early to say`.
        words: one sentence with the numbers.
        next_step: what to do about it.
    """

    state: str
    words: str
    next_step: str


TOO_EARLY = "too early to say"
STATES = (
    "unknown",
    "alive",
    "faint",
    "not following",
    "stuck",
    "collapsed",
    "not finite",
)  # a run has the last of these that one of its terms has

NEXT_STEP = {
    "unknown": "Log the health metrics: a falling loss alone does not show that a run learns.",
    "alive": "Evaluate the features: tapct eval.",
    "faint": "Continue; if this persists, lower lr or set the momentum closer to 1.",
    "not following": "The teacher changes faster than the student learns: set the momentum closer "
    "to 1, or use a longer warm-up.",
    "stuck": "Lower lr (to 1e-3 or less), use a slower teacher (momentum 0.992 or more), fewer "
    "prototypes (at most 64 per target of a step) or LayerScale 1 in a short run.",
    "collapsed": "Check that centring or Sinkhorn is used, raise teacher_temp, lower lr, and keep "
    "KoLeo at 0.1.",
    "not finite": "Stop; start again from an earlier checkpoint with a lower lr, and look at the "
    "gradient norms before the failure.",
}


def verdict_of_term(term: TermReading) -> Verdict:
    """Verdict on one prototype loss."""
    numbers = (term.ln_k_minus_ce, term.marginal_entropy, term.target_entropy, term.ln_k)
    information = term.information
    facts = f"ln K - CE {term.ln_k_minus_ce:.2f}, information {information:.2f} nats"
    if not all(math.isfinite(number) for number in numbers):
        return Verdict(
            "not finite", f"{term.name}: a health number is not finite", NEXT_STEP["not finite"]
        )
    if information < NO_INFORMATION:
        if term.ln_k_minus_ce < NO_PROGRESS:
            state, words = (
                "stuck",
                "all targets are equal and the cross-entropy is ln K: nothing is learned",
            )
        elif term.target_entropy < ONE_PROTOTYPE * term.ln_k:
            state, words = (
                "collapsed",
                "every sample has the same sharp target: a very low loss, but nothing is learned",
            )
        else:
            state, words = (
                "collapsed",
                "every sample has the same broad target, which the student predicts",
            )
    elif term.ln_k_minus_ce < NO_PROGRESS:
        state, words = (
            "not following",
            "the targets differ between samples but the student does not predict them",
        )
    elif information < FAINT_INFORMATION:
        state, words = "faint", "the targets begin to distinguish samples"
    else:
        state, words = "alive", "the targets distinguish samples and the student predicts them"
    return Verdict(state, f"{term.name}: {words} ({facts})", NEXT_STEP[state])


def verdict(terms: Sequence[TermReading]) -> Verdict:
    """Verdict on a run: the state of its worst term, and a sentence about each term."""
    verdicts = [verdict_of_term(term) for term in terms]
    if not verdicts:
        return Verdict("unknown", "no prototype loss reported its health", NEXT_STEP["unknown"])
    worst = max(verdicts, key=lambda one: STATES.index(one.state))
    return Verdict(worst.state, "; ".join(one.words for one in verdicts), worst.next_step)


def verdict_at(terms: Sequence[TermReading], step: int, warmup_steps: int) -> Verdict:
    """Verdict on a run after some steps: none before the learning rate has warmed up, nor in the
    first `MIN_STEPS` steps, unless a number is not finite.

    Args:
        terms: recent means.
        step: finished steps.
        warmup_steps: warm-up steps of the learning rate; 0 where unknown.
    """
    found, needed = verdict(terms), max(MIN_STEPS, warmup_steps)
    if step >= needed or found.state in ("unknown", "not finite"):
        return found
    words = f"The run has {step} steps; the first verdict comes after {needed}"
    if warmup_steps > MIN_STEPS:
        words += ", when the learning rate has warmed up"
    return Verdict(TOO_EARLY, words, "Train on and look again.")
