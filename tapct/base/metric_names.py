"""Names of the numbers in metrics.jsonl: the one place that makes them and takes them apart.

    loss/TERM            value of a term as it is optimised; loss/total is their sum
    ce/TERM              its plain cross-entropy, nats
    grad_norm/PART       norm of the gradient before clipping: backbone, or the head of a loss
    health/LOSS_READING  what the targets of a prototype loss look like: `TARGET_READINGS`
    health/READING       what the features look like: `FEATURE_READINGS`
    seconds/STAGE        time of a stage of the step; seconds/step is all of it
    ranks/READING        which rank came last to the step, and when: `RANK_READINGS`
    archive/NAME/READING loss and number of samples of one of several archives

Beside these: step, samples, time, samples_per_second and the values of the schedules.
"""

from __future__ import annotations

TOTAL = "total"  # the term that is the sum of all terms
LN_K_MINUS_CE = "ln_k_minus_ce"
INFORMATION = "information"
MARGINAL_ENTROPY = "marginal_entropy"
TARGET_ENTROPY = "target_entropy"
PROTOTYPES_USED = "prototypes_used"
TARGET_READINGS = (
    LN_K_MINUS_CE,
    INFORMATION,
    MARGINAL_ENTROPY,
    TARGET_ENTROPY,
    PROTOTYPES_USED,
)
COSINE = "teacher_student_cosine"
CLS_STD = "cls_std"
NORM_OUTLIERS = "patch_norm_outliers"
RANKME = "rankme"
FEATURE_READINGS = (COSINE, CLS_STD, NORM_OUTLIERS, RANKME)
SLOWEST, SLOWEST_S, MEDIAN_S = "slowest", "slowest_s", "median_s"
SLOWEST_DATA_S = "slowest_data_s"  # the part of SLOWEST_S in which that rank waited for data
RANK_READINGS = (SLOWEST, SLOWEST_S, SLOWEST_DATA_S, MEDIAN_S)
ARCHIVE_LOSS, ARCHIVE_SAMPLES = "loss", "samples"


def loss(term: str) -> str:
    """Name of an optimised term."""
    return f"loss/{term}"


def cross_entropy(term: str) -> str:
    """Name of a term's plain cross-entropy."""
    return f"ce/{term}"


def grad_norm(part: str) -> str:
    """Name of the gradient norm of a part of the student."""
    return f"grad_norm/{part}"


def target_health(loss_name: str, reading: str) -> str:
    """Name of a reading of a prototype loss's targets.

    Args:
        loss_name: name under which the loss reports its targets, e.g. dino.
        reading: one of `TARGET_READINGS`.
    """
    return f"health/{loss_name}_{reading}"


def feature_health(reading: str) -> str:
    """Name of a reading of the features, one of `FEATURE_READINGS`."""
    return f"health/{reading}"


def seconds(stage: str) -> str:
    """Name of the time of a stage of the step."""
    return f"seconds/{stage}"


def ranks(reading: str) -> str:
    """Name of a reading of the ranks, one of `RANK_READINGS`."""
    return f"ranks/{reading}"


def archive(name: str, reading: str) -> str:
    """Name of a reading of one of several archives, `ARCHIVE_LOSS` or `ARCHIVE_SAMPLES`."""
    return f"archive/{name}/{reading}"


def is_archive_reading(name: str, reading: str) -> bool:
    """Whether a number is this reading of an archive."""
    return name.startswith("archive/") and name.endswith(f"/{reading}")


def loss_with_targets(name: str) -> str:
    """The loss whose targets' information a metric is; empty for every other metric."""
    ending = f"_{INFORMATION}"
    if name.startswith("health/") and name.endswith(ending):
        return name.removeprefix("health/").removesuffix(ending)
    return ""


def must_be_finite(name: str) -> bool:
    """Whether training stops where this number is not finite: losses and gradient norms."""
    return name.startswith(("loss/", "grad_norm/"))


def is_sum_of_others(name: str) -> bool:
    """Whether a number is spoiled by another one that is not finite, which is to be named first."""
    return name == loss(TOTAL) or name.startswith("grad_norm/")
