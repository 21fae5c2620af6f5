"""Rotary position embedding: inverse frequencies from the config, cosines and sines once a step, the rotation of q and k.

Cosines are computed for the step's positions instead of being tabulated: T x head_dim values a step are nothing beside the layers, and
a table for 131072 positions would be 64 MB a rank. Angles are fp32 whatever the model's dtype. Scaling types whose frequencies depend on
the longest sequence seen so far (dynamic, longrope) are refused: keys already in the cache were rotated with other frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RotaryConfig:
    """Frequencies of one model; every field but `rope_type` and `theta` is read by the scaling types that name it below."""

    head_dim: int
    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0                        # linear, llama3, yarn: how much longer the context was made
    original_context: int = 0                  # llama3, yarn: the context before that
    low_freq_factor: float = 1.0               # llama3
    high_freq_factor: float = 4.0              # llama3
    beta_fast: float = 32.0                    # yarn: rotations over the original context, above which a frequency stays
    beta_slow: float = 1.0                     # yarn: rotations below which it is divided by factor
    attention_factor: float = 1.0              # yarn: multiplies cosines and sines

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], *, head_dim: int, context_length: int) -> RotaryConfig:
        """From rope_parameters, or rope_scaling with rope_theta put into it. Raises ValueError with the key and what was expected."""
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope scaling type {rope_type!r} is not built; known: {', '.join(ROPE_TYPES)}")
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, the rotation needs an even number")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor is {parameters['partial_rotary_factor']}, only whole heads (1.0) are rotated")
        theta = _positive(parameters, "rope_theta")
        if rope_type == "default":
            return cls(head_dim, theta)
        factor = _positive(parameters, "factor")
        if rope_type == "linear":
            return cls(head_dim, theta, rope_type, factor)
        if rope_type == "llama3":
            original = _positive(parameters, "original_max_position_embeddings")
            low, high = _positive(parameters, "low_freq_factor"), _positive(parameters, "high_freq_factor")
            if low >= high:
                raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
            return cls(head_dim, theta, rope_type, factor, int(original), low_freq_factor=low, high_freq_factor=high)
        for key in ("mscale", "mscale_all_dim", "truncate"):
            if key in parameters and parameters[key] is not True:
                raise ValueError(f"{key} in a yarn rope scaling is not built")
        if not parameters.get("original_max_position_embeddings"):
            parameters = {**parameters, "original_max_position_embeddings": context_length}
        original = _positive(parameters, "original_max_position_embeddings")
        return cls(
            head_dim, theta, rope_type, factor, int(original),
            beta_fast=_positive(parameters, "beta_fast", 32.0),
            beta_slow=_positive(parameters, "beta_slow", 1.0),
            attention_factor=_positive(parameters, "attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
        )

    def inverse_frequencies(self) -> torch.Tensor:
        """[head_dim / 2] fp32: radians a position, of each rotated pair."""
        inverse = 1.0 / (self.theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim))
        if self.rope_type == "linear":
            return inverse / self.factor
        if self.rope_type == "llama3":
            return self._llama3(inverse)
        return self._yarn(inverse) if self.rope_type == "yarn" else inverse

    def _llama3(self, inverse: torch.Tensor) -> torch.Tensor:
        """Short waves stay, long ones are stretched by `factor`, and between the two bounds the stretch is blended."""
        turns = self.original_context * inverse / (2 * math.pi)                       # waves within the original context
        blend = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - blend) * inverse / self.factor + blend * inverse

    def _yarn(self, inverse: torch.Tensor) -> torch.Tensor:
        """As llama3, but the blend is linear in the pair's index rather than in its frequency."""
        def pair(turns: float) -> float:                                              # index of the pair that makes so many turns
            return self.head_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first = max(math.floor(pair(self.beta_fast)), 0)
        last = min(math.ceil(pair(self.beta_slow)), self.head_dim - 1)
        ramp = (torch.arange(self.head_dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
        stretch = ramp.clamp(0, 1)
        return stretch * inverse / self.factor + (1 - stretch) * inverse


def _positive(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = parameters.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r} in the rope parameters, expected a positive number")
    return float(value)


class RotaryEmbedding(torch.nn.Module):
    """Cosines and sines of a step's positions."""

    def __init__(self, config: RotaryConfig, device: torch.device | str = "cpu"):
        super().__init__()
        self.attention_factor = config.attention_factor
        self.register_buffer("inverse", config.inverse_frequencies().to(device), persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] int64 -> cos and signed sin [T, 1, head_dim] in dtype: the factors of a head and of its swapped halves."""
        angles = (positions.float()[:, None] * self.inverse)[:, None]
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] -> the same shape, with element i and element i + D/2 turned as a pair (the hub's order of weights).

    Three operations and one rounding: a decode step makes this call once a layer, and feels each operation more than its arithmetic.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)
