"""Check the quantisation settings, for the checkpoint's own scheme and for its references."""

from __future__ import annotations

from dataclasses import dataclass

from peelcli.config.setting import setting
from peelcli.errors import UsageError
from peelcli.records.schemes import GRANULARITIES, INTEGERS, SCALE_RULES, SCHEMES


def granularity_of(granularity: str | None, group_size: int | None, prefix: str = "--") -> str:
    """The granularity in effect. None means group if a group size is given, else channel.

    UsageError, with the flags that begin with `prefix`, where a group size stands beside another granularity.
    """
    found = granularity or ("channel" if group_size is None else "group")
    if (group_size is not None) != (found == "group"):
        raise UsageError(
            f"{prefix}granularity {found} with {prefix}group-size {group_size or 'none'}: a group size belongs to "
            "the granularity group, and to no other; give both or neither"
        )
    return found


def check_scheme(
    scheme: str | None, granularity: str | None, group_size: int | None, scale: str, symmetric: bool
) -> None:
    """Raise UsageError if the settings of references contradict each other."""
    granularity_of(granularity, group_size)
    if scheme == "nf4" and scale == "absmean":
        raise UsageError(
            "--scale absmean with --scheme nf4: its levels end at 1, so that half the weights would be clipped; "
            "choose absmax or mse"
        )
    if not symmetric and (scheme not in INTEGERS or scale == "absmean"):
        raise UsageError(
            f"--no-symmetric with --scheme {scheme or 'not given'} and --scale {scale}: zero points belong to "
            f"{', '.join(INTEGERS)} with absmax or mse; choose such or leave it out"
        )


@dataclass(frozen=True)
class TrainedSchemeConfig:
    """In which scheme the checkpoint was trained, where its file holds the latent weights of a training of one's own.

    The weights are rounded as that training's forward pass rounded them, before anything is measured.
    """

    trained_scheme: str | None = setting(
        None,
        "Scheme that the latent weights of the checkpoint are rounded to before anything is measured.",
        key="scheme",
        choices=SCHEMES[:-1],
        unset="as the checkpoint says",
    )
    trained_granularity: str = setting(
        "tensor",
        "Weights that share one step of the trained scheme.",
        key="granularity",
        choices=GRANULARITIES,
    )
    trained_group_size: int | None = setting(
        None,
        "Weights of a row that share one step, for granularity group.",
        key="group_size",
        at_least=1,
        unset="none",
    )
    trained_scale: str = setting(
        "absmean",
        "Rule for the step: the mean or the largest magnitude (over the highest level), or the least squared error.",
        key="scale",
        choices=SCALE_RULES,
    )
    trained_modules: tuple[str, ...] = setting(
        (),
        "Linear maps that were trained so, as globs such as *.mlp.*, parted by commas or repeated.",
        key="modules",
        metavar="GLOB",
        unset="all linear maps of the blocks",
    )
    trained_activation_bits: int | None = setting(
        None,
        "Bits that the inputs of those maps are rounded to, per token.",
        key="activation_bits",
        at_least=2,
        unset="none",
    )
