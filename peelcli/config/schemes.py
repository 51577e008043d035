"""The vocabulary of schemes, for what a checkpoint was trained in and for what its references lie in."""

from __future__ import annotations

from dataclasses import dataclass

from peelcli.config.setting import setting

INTEGERS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")
SCHEMES = ("binary", "ternary", *INTEGERS[:3], "nf4", *INTEGERS[3:], "fp8_e4m3", "fp")
GRANULARITIES = ("tensor", "channel", "group")
SCALE_RULES = ("absmean", "absmax", "mse")


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
