"""The SSM parameter contract: one table that says how every parameter is treated.

A state-space model is sensitive to the precision and the decay of a few small parameters: `A_log`,
`D` and the bias of Δ. The table below is keyed by the *name* of a parameter because attributes on
tensors do not survive sharding. The initialiser, the optimiser, every engine and the audit read
it; nothing else decides any of this.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a parameter is, which decides how it is drawn."""

    embedding = "embedding"
    linear = "linear"  # (out, in) matrix
    residual_out = "residual_out"  # (out, in) matrix that writes into the residual stream
    conv_weight = "conv_weight"
    conv_bias = "conv_bias"
    dt_projection = "dt_projection"
    dt_bias = "dt_bias"
    a_log = "A_log"
    skip = "D"
    norm = "norm"


@dataclass(frozen=True)
class ParameterRule:
    """How the parameters whose names match `pattern` are treated.

    Masters, gradients and moments of all parameters are fp32; `fp32_forward` says that the forward
    pass, too, must compute with the unrounded fp32 value.
    """

    pattern: str
    role: Role
    weight_decay: bool
    fp32_forward: bool = False


RULES: tuple[ParameterRule, ...] = (
    ParameterRule("embedding.weight", Role.embedding, weight_decay=True),
    ParameterRule("lm_head.weight", Role.linear, weight_decay=True),
    ParameterRule("*norm.weight", Role.norm, weight_decay=False),
    ParameterRule("*.in_proj.weight", Role.linear, weight_decay=True),
    ParameterRule("*.out_proj.weight", Role.residual_out, weight_decay=True),
    ParameterRule("*.mixer.*conv_weight", Role.conv_weight, weight_decay=True),
    ParameterRule("*.mixer.*conv_bias", Role.conv_bias, weight_decay=False),
    ParameterRule("*.ssm.x_proj_weight", Role.linear, weight_decay=True),
    ParameterRule("*.ssm.dt_proj_weight", Role.dt_projection, weight_decay=True),
    ParameterRule("*.ssm.dt_bias", Role.dt_bias, weight_decay=False, fp32_forward=True),
    ParameterRule("*.ssm.A_log", Role.a_log, weight_decay=False, fp32_forward=True),
    ParameterRule("*.ssm.D", Role.skip, weight_decay=False, fp32_forward=True),
    ParameterRule("*.ssm.norm_weight", Role.norm, weight_decay=False),
)


def rule_for(name: str) -> ParameterRule:
    """The one rule that covers the parameter `name`.

    Raises:
        KeyError: when no rule or more than one matches; a new parameter needs its line in `RULES`.
    """
    matches = [rule for rule in RULES if fnmatch.fnmatchcase(name, rule.pattern)]
    if len(matches) != 1:
        raise KeyError(f"parameter {name} is covered by {len(matches)} rules of contract.RULES, expected 1")
    return matches[0]


def decay_split(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split parameter names into those with and those without weight decay, in their order."""
    decayed: list[str] = []
    undecayed: list[str] = []
    for name in names:
        (decayed if rule_for(name).weight_decay else undecayed).append(name)
    return decayed, undecayed
