"""Run a case on a backend and compare with the fp64 reference: every promise of the design's "The call" that a case can show.

A broken promise is an AssertionError that carries the case as an expression. A backend that objects raises UnsupportedError,
which the tests turn into a skip with the backend's own reasons. Everything goes through hetero_attn.attention, as a user's call.
"""

import os
from functools import lru_cache

import torch

from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.ops import attention, attention_varlen
from hetero_attn.testing.attention_cases import plain_cases
from hetero_attn.testing.cases import AttentionCase
from hetero_attn.testing.tolerances import mismatch

BACKENDS_VARIABLE = "HETERO_ATTN_TEST_BACKENDS"
DEVICE_VARIABLE = "HETERO_ATTN_TEST_DEVICE"


def named_backends() -> list[str]:
    """The backends that HETERO_ATTN_TEST_BACKENDS names, in its order; [] where it is unset."""
    return [name.strip() for name in os.environ.get(BACKENDS_VARIABLE, "").split(",") if name.strip()]


def selected_backends() -> list[str]:
    """The named backends, or every one that is available here. An unknown name raises the registry's error."""
    named = named_backends()
    return [name for name in named or registry.names() if not registry.get(name).unavailable_reasons() or named]


def devices_of(backend: str) -> list[str]:
    """The device types here on which `backend` runs some plain case; HETERO_ATTN_TEST_DEVICE overrides, cpu where there is none."""
    if os.environ.get(DEVICE_VARIABLE):
        return [os.environ[DEVICE_VARIABLE]]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    present = ["cpu"] + ([accelerator.type] if accelerator is not None else [])
    reasons = registry.get(backend).unsupported_reasons
    return [device for device in present if any(not reasons(case.spec(device)) for case in plain_cases())] or ["cpu"]


def run(case: AttentionCase, backend: str, arguments: dict, *, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call the public function of the case with `arguments`; (out, lse or None)."""
    function = attention_varlen if case.varlen else attention
    result = function(**arguments, return_lse=return_lse, backend=backend)
    return result if return_lse else (result, None)


@lru_cache(maxsize=512)
def expected(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """fp64 out and lse in the case's own shapes, and the gradients that `check` compares. Computed once a case."""
    numbers = {name: x.double() if x.is_floating_point() else x for name, x in case.numbers().items()}
    for name in case.gradients:
        numbers[name] = numbers[name].clone().requires_grad_()
    outs, lses = [], []
    for arguments in case.exact_calls(numbers):
        out, lse = attention(**_slopes_in_fp32(arguments), return_lse=True, backend="reference")
        outs.append(out[0].transpose(0, 1) if case.varlen else out)
        lses.append(lse[0] if case.varlen else lse)
    if case.varlen:
        out = torch.cat(outs) if outs else torch.zeros(0, case.q_heads, case.v_head_dim, dtype=torch.float64)
        lse = torch.cat(lses, dim=1) if lses else torch.zeros(case.q_heads, 0, dtype=torch.float64)
    else:
        out = out.transpose(1, 2) if case.layout == "bshd" else out
    gradients = {}
    if case.gradients and not out.numel():
        gradients = {name: torch.zeros_like(numbers[name]) for name in case.gradients}
    elif case.gradients:
        (out * _upstream(case, out.shape).double()).sum().backward()
        gradients = {name: torch.zeros_like(numbers[name]) if numbers[name].grad is None else numbers[name].grad for name in case.gradients}
    return out.detach(), lse.detach(), gradients


def check(case: AttentionCase, backend: str, device: str = "cpu") -> None:
    """Raise AssertionError where `backend` breaks a promise on `case`, UnsupportedError where it objects to the case."""
    complaints = broken_promises(case, backend, device)
    if complaints:
        lines = "\n  ".join(complaints)
        raise AssertionError(f"{backend} on {device} breaks {case.name!r}\n  {lines}\n  {case.describe()}\n  {case.spec(device)}")


def broken_promises(case: AttentionCase, backend: str, device: str = "cpu") -> list[str]:
    """What `check` found wrong, a line each; [] = the backend conforms on this case.

    The call is made with and without lse, since a kernel that writes no lse is often another one; never = without alone.
    """
    wrong = []
    for return_lse in {"always": (True, False), "never": (False,), "offered": (False, True)}[case.lse]:
        try:
            found = _broken_promises(case, backend, device, return_lse)
        except UnsupportedError:
            if not return_lse or case.lse != "offered":
                raise
            continue
        wrong += [f"return_lse={return_lse}: {line}" for line in found]
    return wrong


def _broken_promises(case: AttentionCase, backend: str, device: str, return_lse: bool) -> list[str]:
    arguments = case.call(device)
    before = {name: _memory_of(x) for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    out, lse = run(case, backend, arguments, return_lse=return_lse)
    wrong = _form(case, device, out, lse, return_lse)
    wrong += [f"{name} was written" for name, memory in before.items() if not torch.equal(memory, _memory_of(arguments[name]))]
    storage = out.untyped_storage().data_ptr() if out.numel() else None
    wrong += [f"out shares {name}'s memory" for name in before if storage and storage == arguments[name].untyped_storage().data_ptr()]
    if wrong:
        return wrong
    want, want_lse, want_gradients = expected(case)
    rows = case.untouched_rows()
    wrong += [mismatch(_rows(case, out.detach().cpu(), rows), _rows(case, want, rows), case.dtype, magnitude=case.magnitude)]
    if return_lse:
        wrong += [mismatch(_lse_rows(case, lse.cpu(), rows), _lse_rows(case, want_lse, rows), case.dtype, "lse")]
    again, lse_again = run(case, backend, arguments, return_lse=return_lse)
    if not torch.equal(_bits(out), _bits(again)) or (return_lse and not torch.equal(_bits(lse), _bits(lse_again))):
        wrong.append("a second call gave other bits")
    if out.numel() and out.untyped_storage().data_ptr() == again.untyped_storage().data_ptr():
        wrong.append("a second call wrote into the first one's result")
    for name, gradient in _gradients(case, out, arguments).items():
        wanted = want_gradients[name]
        if gradient is None:
            wrong.append(out.numel() and f"{name} has no gradient")     # an empty result may leave its inputs alone
        elif gradient.shape != arguments[name].shape:
            wrong.append(f"the gradient of {name} has shape {list(gradient.shape)}, expected {list(arguments[name].shape)}")
        else:
            size = max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)           # gradients of keys are sums over rows
            complaint = mismatch(_packed(case, name, gradient), wanted, _gradient_dtype(case, name), "gradient", magnitude=size)
            wrong.append(complaint and f"{name}: {complaint}")
    return [line for line in wrong if line]


def _form(case: AttentionCase, device: str, out: torch.Tensor, lse: torch.Tensor | None, return_lse: bool) -> list[str]:
    """Shapes, dtypes and devices of the results."""
    tokens = sum(q for q, _ in case.lengths)
    heads, Dv = case.q_heads, case.v_head_dim
    dense = (case.batch, heads, case.q_len, Dv) if case.layout == "bhsd" else (case.batch, case.q_len, heads, Dv)
    shape, lse_shape = ((tokens, heads, Dv), (heads, tokens)) if case.varlen else (dense, (case.batch, heads, case.q_len))
    lse_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    wrong = _form_of("out", out, shape, case.dtype, device)
    if not return_lse:
        return wrong
    if not isinstance(lse, torch.Tensor):
        return [*wrong, f"return_lse is True, lse is {type(lse).__name__}"]
    return wrong + _form_of("lse", lse, lse_shape, lse_dtype, device) + (["lse requires a gradient"] if lse.requires_grad else [])


def _form_of(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[str]:
    if not isinstance(x, torch.Tensor):
        return [f"{name} is {type(x).__name__}, expected a tensor"]
    got, want = (list(x.shape), x.dtype, x.device.type), (list(shape), dtype, torch.device(device).type)
    return [f"{name} is {got}, expected {want}"] if got != want else []


def _gradients(case: AttentionCase, out: torch.Tensor, arguments: dict) -> dict[str, torch.Tensor | None]:
    if not case.gradients:
        return {}
    if not out.requires_grad:
        return dict.fromkeys(case.gradients)
    gradients = torch.autograd.grad(out, [arguments[name] for name in case.gradients],
                                    _upstream(case, out.shape).to(out.device), allow_unused=True)
    return dict(zip(case.gradients, gradients))


def _gradient_dtype(case: AttentionCase, name: str) -> torch.dtype:
    """A gradient is as exact as the coarser of the call's dtype and its own."""
    own = case.numbers()[name].dtype
    return max((case.dtype, own), key=lambda dtype: torch.finfo(dtype).eps)


def _upstream(case: AttentionCase, shape: torch.Size) -> torch.Tensor:
    """d loss / d out: seeded, in the case's dtype."""
    generator = torch.Generator().manual_seed(len(case.name))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)


def _packed(case: AttentionCase, name: str, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient in the shape of case.numbers()[name]."""
    if name not in ("q", "k", "v"):
        return gradient
    if case.varlen:
        return gradient if name == "q" else case.packed_keys(gradient)
    return (gradient if case.layout == "bshd" else gradient.transpose(1, 2)).flatten(0, 1)


def _rows(case: AttentionCase, out: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """out as [rows, Hq, Dv], only the rows that are compared."""
    if case.varlen:
        return out[rows]
    return (out if case.layout == "bshd" else out.transpose(1, 2)).flatten(0, 1)[rows]


def _lse_rows(case: AttentionCase, lse: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (lse if case.varlen else lse.transpose(0, 1).flatten(1))[:, rows]


def _slopes_in_fp32(arguments: dict) -> dict:
    slopes = arguments.get("alibi_slopes")
    return arguments if slopes is None else {**arguments, "alibi_slopes": slopes.float()}


def _memory_of(x: torch.Tensor) -> torch.Tensor:
    """Every byte of the allocation behind x, copied: what lies between the strides counts too."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.detach().untyped_storage()).clone()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)
