"""The smallest useful check: one call, against torch, in a second."""

import torch
import torch.nn.functional as F

import hetero_attn


def test_attention_is_attention():
    q, k, v = torch.randn(1, 8, 5, 64), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64)
    out = hetero_attn.attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
