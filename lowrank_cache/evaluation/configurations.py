"""Cache configurations by name, as the command line takes them: ``fisher:8.8,groups=1,frame=16``, ``xkv:8,bits=4``.

The name of a configuration is its specification, so a table's row says what it was.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lowrank_cache.calibration.api import METHODS, projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.evaluation.baselines import BASELINES
from lowrank_cache.projections import Projections
from lowrank_cache.prompt_svd import NEW_TOKENS

__all__ = ["Configuration", "build", "parse"]

XKV = "xkv"  # needs no calibration


@dataclass(frozen=True)
class Configuration:
    """A compressed cache: how its bases are made, and the arguments of ``LowRankCache``.

    Attributes:
        method: Of calibration, or ``"xkv"``.
        groups: ``layer_group_size``: ``"auto"`` (4 for xkv) or a number.
        frame: ``frame_length``.
        joint: Whether keys and values share a latent; None for the method's default.
        compression_ratio, bits, ranks: Of the cache; ranks replace the ratio.
        new: xkv's ``new_tokens``.
    """

    method: str
    compression_ratio: float
    groups: int | str = "auto"
    frame: int = 1
    joint: bool | None = None
    bits: int | None = None
    ranks: int | None = None
    new: str | None = None

    @property
    def refit_ratio(self) -> float:
        """Ratio of the ranks at which values are fitted to the compressed stream; 1 where they are not."""
        if self.method != "recalkv" or self.ranks is not None:
            return 1.0
        return max(1.0, self.compression_ratio * (self.bits or 16) / 16)

    @property
    def bases_name(self) -> str:
        """Equal for configurations with equal bases; part of a path."""
        joint = {None: "auto", True: "1", False: "0"}[self.joint]
        refit = f",refit={self.refit_ratio:g}" if self.refit_ratio > 1 else ""
        return f"{self.method},groups={self.groups},frame={self.frame},joint={joint}{refit}"


def parse(specification: str) -> Configuration | None:
    """A configuration, or None if ``specification`` names a baseline.

    ``METHOD:RATIO`` and, after commas, ``groups=``, ``frame=``, ``joint=`` (0 or 1), ``bits=`` and ``ranks=``,
    for xkv also ``new=`` (encode or exact).

    Raises:
        ValueError: If it cannot be read.
    """
    if specification in BASELINES:
        return None
    head, *options = specification.split(",")
    method, separator, ratio = head.partition(":")
    try:
        if method not in (*METHODS, XKV) or not separator:
            raise ValueError
        fields: dict = {}
        for option in options:
            name, _, value = option.partition("=")
            if name == "new" and method == XKV and value in NEW_TOKENS:
                fields[name] = value
                continue
            if name not in ("groups", "frame", "joint", "bits", "ranks"):
                raise ValueError
            fields[name] = value if value == "auto" else int(value)
            if name == "joint":
                fields[name] = bool(fields[name])
        return Configuration(method, float(ratio), **fields)
    except ValueError:
        raise ValueError(
            f"cache must be one of {BASELINES} or METHOD:RATIO[,groups=G][,frame=L][,joint=0|1][,bits=B][,ranks=R] "
            f"with a method of {sorted((*METHODS, XKV))} (for xkv also ,new=encode|exact), got {specification!r}"
        ) from None


def build(
    specifications: list[str],
    moments: Moments | None,
    refit: Callable[[Projections, float], Moments | None] = lambda projections, ratio: None,
    ready: Callable[[Configuration], Projections | None] = lambda configuration: None,
) -> dict[str, tuple[Projections | None, dict]]:
    """Projections and cache arguments of each specification; equal bases are made once.

    Args:
        moments: Statistics; None if every configuration that needs them is ready.
        refit: Moments of the values in a stream that projections compress at a ratio, for recalkv's value
            calibration; None leaves it out. The ratio is that of the ranks, 1 where none is cut away.
        ready: The projections of a configuration for which none need be made.
    """
    made: dict[str, Projections] = {}
    built: dict[str, tuple[Projections | None, dict]] = {}
    for specification in specifications:
        configuration = parse(specification)
        if configuration is None:
            built[specification] = (None, {})
            continue
        options = {name: getattr(configuration, name) for name in ("compression_ratio", "bits", "ranks")}
        if configuration.method == XKV:
            size = 4 if configuration.groups == "auto" else configuration.groups
            of_prompt = {"method": XKV, "layer_group_size": size, "new_tokens": configuration.new}
            built[specification] = (None, {**options, **of_prompt})
            continue
        name = configuration.bases_name
        if name not in made:
            made[name] = ready(configuration) or _made(configuration, moments, refit)
        built[specification] = (made[name], options)
    return built


def _made(configuration: Configuration, moments: Moments | None, refit) -> Projections:
    if moments is None:
        raise ValueError(f"bases {configuration.bases_name!r} need statistics, got none")
    arguments: dict = {
        "method": configuration.method,
        "frame_length": configuration.frame,
        "layer_group_size": configuration.groups,
        "joint": configuration.joint,
    }
    projections = projections_from_moments(moments, **arguments)
    ratio = configuration.refit_ratio
    refitted = refit(projections, ratio) if ratio > 1 else None
    if refitted is None:
        return projections
    return projections_from_moments(moments, **arguments, refitted=refitted)
