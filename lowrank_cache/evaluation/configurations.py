"""Cache configurations by name, as the command line takes them: ``fisher:8.8,groups=1,frame=16``.

The name of a configuration is its specification, so a table's row says what it was.
"""

from dataclasses import dataclass

from lowrank_cache.calibration.api import METHODS, projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.evaluation.baselines import BASELINES
from lowrank_cache.projections import Projections

__all__ = ["Configuration", "build", "parse"]


@dataclass(frozen=True)
class Configuration:
    """A compressed cache: how its bases are made, and the arguments of ``LowRankCache``.

    Attributes:
        method: Of calibration.
        groups: ``layer_group_size``: ``"auto"`` or a number.
        frame: ``frame_length``.
        joint: Whether keys and values share a latent; None for the method's default.
        compression_ratio, bits, ranks: Of the cache; ranks replace the ratio.
    """

    method: str
    compression_ratio: float
    groups: int | str = "auto"
    frame: int = 1
    joint: bool | None = None
    bits: int | None = None
    ranks: int | None = None


def parse(specification: str) -> Configuration | None:
    """A configuration, or None if ``specification`` names a baseline.

    ``METHOD:RATIO`` and, after commas, ``groups=``, ``frame=``, ``joint=`` (0 or 1), ``bits=`` and ``ranks=``.

    Raises:
        ValueError: If it cannot be read.
    """
    if specification in BASELINES:
        return None
    head, *options = specification.split(",")
    method, separator, ratio = head.partition(":")
    try:
        if method not in METHODS or not separator:
            raise ValueError
        fields: dict = {}
        for option in options:
            name, _, value = option.partition("=")
            if name not in ("groups", "frame", "joint", "bits", "ranks"):
                raise ValueError
            fields[name] = value if value == "auto" else int(value)
            if name == "joint":
                fields[name] = bool(fields[name])
        return Configuration(method, float(ratio), **fields)
    except ValueError:
        raise ValueError(
            f"cache must be one of {BASELINES} or METHOD:RATIO[,groups=G][,frame=L][,joint=0|1][,bits=B][,ranks=R] "
            f"with a method of {sorted(METHODS)}, got {specification!r}"
        ) from None


def build(specifications: list[str], moments: Moments) -> dict[str, tuple[Projections | None, dict]]:
    """Projections and cache arguments of each specification; equal bases are made once."""
    made: dict[tuple, Projections] = {}
    built: dict[str, tuple[Projections | None, dict]] = {}
    for specification in specifications:
        configuration = parse(specification)
        if configuration is None:
            built[specification] = (None, {})
            continue
        key = (configuration.method, configuration.frame, configuration.groups, configuration.joint)
        if key not in made:
            made[key] = projections_from_moments(
                moments,
                method=configuration.method,
                frame_length=configuration.frame,
                layer_group_size=configuration.groups,
                joint=configuration.joint,
            )
        built[specification] = (
            made[key],
            {
                "compression_ratio": configuration.compression_ratio,
                "bits": configuration.bits,
                "ranks": configuration.ranks,
            },
        )
    return built
