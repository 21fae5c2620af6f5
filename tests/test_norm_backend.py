"""Whose norm a profile's models use: the first available backend that has one, whoever has the products."""

from dataclasses import replace

import torch

from hetero_attn import registry
from hetero_attn.backend import Backend
from hetero_attn.norm import rms_norm
from hetero_attn.profile import load_profile


class Norms(Backend):
    name, here = "norms", True

    def unavailable_reasons(self):
        return [] if self.here else ["not here"]

    def rms_norm(self, x, weight, eps, weight_offset=0.0):
        return rms_norm(x, weight, eps, weight_offset)


class Multiplies(Backend):
    name = "multiplies"

    def unavailable_reasons(self):
        return []

    def linear(self, x, weight, bias=None, out=None):
        return torch.nn.functional.linear(x, weight, bias)


def test_norms_and_products_may_be_different_backends():
    profile = replace(load_profile("cpu"), backends=("multiplies", "norms", "sdpa"))
    with registry.register("norms", Norms), registry.register("multiplies", Multiplies):
        assert registry.linear_backend(profile).name == "multiplies" and registry.norm_backend(profile).name == "norms"
        registry.get("norms").here = False
        assert type(registry.norm_backend(profile)) is Backend


def test_triton_has_a_norm_and_no_products():
    triton = registry.get("triton")
    assert type(triton).rms_norm is not Backend.rms_norm and type(triton).linear is Backend.linear


def test_a_decoder_takes_both():
    from hetero_attn.communicator import SoloCommunicator
    from hetero_attn.models.decoder import Decoder
    from hetero_attn.models.norm import RMSNorm

    norm, products, used = Norms(), Multiplies(), []
    holder = torch.nn.Module()
    holder.norm = RMSNorm("norm", 8, 1e-6, dtype=torch.float32, device="cpu")
    with SoloCommunicator() as holder.communicator:
        Decoder.use_backend(holder, products, norm)
        used = [holder.norm.rms_norm, holder.communicator.linear]
        assert used == [norm.rms_norm, products.linear]
        Decoder.use_backend(holder, products)
        assert holder.norm.rms_norm == products.rms_norm
