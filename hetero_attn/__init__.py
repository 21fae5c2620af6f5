"""hetero_attn: one attention call and one set of collectives over unlike accelerators.

    out = hetero_attn.attention(q, k, v, is_causal=True)        # the registry picks the implementation for the device
    print(hetero_attn.explain(q, k, v, is_causal=True))         # which one, and why not the others
    model = hetero_attn.load_model("path/to/model")             # a tensor-parallel decoder that uses nothing else

Importing this needs torch and yaml only; backends, models and communication are imported when first used.
"""

from hetero_attn import library as _library  # noqa: F401  (registers the operators torch.compile sees)
from hetero_attn.backend import Backend, UnsupportedError
from hetero_attn.environment import warn_unknown_variables
from hetero_attn.explain import explain
from hetero_attn.ops import attention, attention_varlen
from hetero_attn.profile import DeviceProfile, ProfileError, load_profile
from hetero_attn.registry import UnknownBackendError, use_backend, use_profile

__version__ = "0.1.0"
__all__ = [
    "Backend", "Communicator", "CommunicatorError", "DeviceProfile", "ProfileError", "SamplingParams", "UnknownBackendError",
    "UnsupportedError", "attention", "attention_varlen", "explain", "generate", "init_communicator", "load_model", "load_profile",
    "use_backend", "use_profile",
]
_LAZY = {
    "Communicator": "hetero_attn.communicator",
    "CommunicatorError": "hetero_attn.communicator",
    "init_communicator": "hetero_attn.collectives",
    "SamplingParams": "hetero_attn.models.sampling",
    "generate": "hetero_attn.models.generate",
    "load_model": "hetero_attn.models",
}

warn_unknown_variables()


def __getattr__(name: str):
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'hetero_attn' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(module), name)
