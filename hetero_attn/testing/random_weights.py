"""Random weights for decoders that are measured or compared, not listened to."""

from __future__ import annotations

import torch

from hetero_attn.models.decoder import Decoder


def randomised(decoder: Decoder) -> Decoder:
    """The decoder in eval mode, its weights scaled so that the residual stream stays near 1; the same ones for the same shapes."""
    generator = torch.Generator(decoder.device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return decoder.eval()
