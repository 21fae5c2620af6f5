"""hetero-attn doctor: what runs on this machine, and why not the rest.

Devices, backends (a tiny real call each), communicators, and the resolved profile with where every value came from.
"""

from __future__ import annotations

import argparse
import json
import os
import platform


def add_parser(subparsers) -> argparse.ArgumentParser:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "doctor", help="what runs here, and why not the rest", description="Devices, backends with reasons, and the resolved profile.",
    )
    parser.add_argument("--profile", metavar="NAME|FILE", help="device profile (default: detected)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the profile (repeatable)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def run(args) -> int:
    """Prints the report. Returns 0 if a backend of the profile runs here, else 1."""
    report = diagnosis(args.profile, args.set)
    print(json.dumps(report, indent=2, default=str) if args.json else as_text(report))
    return 0 if any(b["runs_here"] and b["listed"] for b in report["backends"]) else 1


def diagnosis(profile_name: str | None, sets: list[str]) -> dict:
    """The whole report as plain data. Raises ProfileError."""
    import torch

    from hetero_attn import __version__, registry
    from hetero_attn.environment import VARIABLES, unknown_variables
    from hetero_attn.profile import load_profile, shipped_profiles

    profile = load_profile(profile_name, sets=sets)
    names = [*profile.backends, *(n for n in profile.awaits if n not in profile.backends)]
    names += [name for name in registry.names() if name not in names]
    return {
        "versions": {"hetero_attn": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "devices": _devices(),
        "profile": profile.name,
        "verified": profile.verified,
        "shipped_profiles": list(shipped_profiles()),
        "backends": [_backend(name, profile) for name in names],
        "communicators": _communicators(profile),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "unknown_variables": list(unknown_variables()),
        "settings": [{"key": key, "value": value, "origin": origin} for key, value, origin in profile.resolved()],
    }


def _devices() -> list[dict]:
    import torch

    from hetero_attn.explain import device_here
    from hetero_attn.profile_detect import device_name

    cpu = {"device": "cpu", "name": device_name(torch.device("cpu")), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    devices = [cpu]
    for kind in ("cuda", "npu"):
        module = getattr(torch, kind, None)
        if module is None or not module.is_available():
            reason = f"this torch ({torch.__version__}) sees none" if kind == "cuda" else "torch_npu is not loaded"
            devices.append({"device": kind, "absent": reason})
            continue
        for index in range(module.device_count()):
            memory = module.get_device_properties(index).total_memory
            found = {"device": f"{kind}:{index}", "name": module.get_device_name(index), "memory_gib": round(memory / 2**30, 1)}
            if kind == "cuda" and torch.version.cuda:
                capability = module.get_device_capability(index)
                found["capability"] = "{}.{}".format(*capability)
                found["remark"] = missing_kernels(capability, module.get_arch_list())
            devices.append(found)
    devices += [{"device": kind, "name": f"torch's {kind} device"} for kind in ("mps", "xpu") if device_here(kind)]
    return devices


def missing_kernels(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Why a torch built for `architectures` ('sm_80', 'compute_90', ...) has no kernels for a GPU of this capability; None = it has."""
    major, minor = capability
    for name in architectures:
        kind, _, number = name.partition("_")
        number = "".join(filter(str.isdigit, number))                  # sm_90a
        built = (int(number[:-1]), int(number[-1]))
        if (kind == "sm" and built[0] == major and built[1] <= minor) or (kind == "compute" and built <= capability):
            return None
    remedy = "install a torch built for CUDA 12.6 (its wheels still have it)" if capability < (7, 5) else "install a torch built for it"
    return f"this torch has no kernels for compute capability {major}.{minor}, only for {', '.join(architectures)}; {remedy}"


def _backend(name: str, profile) -> dict:
    """One backend: does a tiny attention call work on it here, for the profile's device if that is here, else on the CPU."""
    from hetero_attn import registry

    backend = registry.find(name)
    reasons = registry.unavailable(backend)
    absent = name not in registry.names()
    probed_on = None
    if not reasons and not absent:
        probed_on, reasons = _probe(name, profile.device)
    return {
        "name": name, "listed": name in profile.backends, "absent": absent, "runs_here": not reasons and not absent,
        "probed_on": probed_on, "reasons": list(reasons), "notes": [] if reasons or absent else _notes(backend),
    }


def _notes(backend) -> list[str]:
    try:
        return list(backend.notes())
    except Exception as error:
        return [f"its notes() failed: {type(error).__name__}: {error}"]


def _probe(name: str, device: str) -> tuple[str, list[str]]:
    """Run a tiny causal call and compare it with the definition: (device, reasons)."""
    import torch

    from hetero_attn import attention
    from hetero_attn.backend import UnsupportedError
    from hetero_attn.explain import device_here

    device, objections = device if device_here(device) else "cpu", []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, heads, 4, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2))
        try:
            out = attention(q, k, v, is_causal=True, backend=name).float().cpu()
            break
        except UnsupportedError as error:                              # perhaps it has another dtype
            objections = objections or error.reasons.get(name, [])
        except Exception as error:
            return device, [f"a tiny call failed: {type(error).__name__}: {error}"]
    else:
        return device, objections
    expected = attention(*(t.cpu().float() for t in (q, k, v)), is_causal=True, backend="reference")
    worst = float((out - expected).abs().max())
    return device, [] if worst < 2e-2 else [f"a tiny call is wrong by {worst:.3g} against the reference; do not use it"]


def _communicators(profile) -> list[dict]:
    """The profile's communicators: 'distributed' by the transports torch has, the others by their backend's word."""
    import torch.distributed as dist

    from hetero_attn import registry
    from hetero_attn.backend import Backend

    found = []
    for name in profile.communicators:
        if name == "distributed":
            available = dist.is_available()
            transports = [t for t, has in (("gloo", dist.is_gloo_available), ("nccl", dist.is_nccl_available)) if available and has()]
            reasons = [] if transports else ["this torch was built without torch.distributed"]
            found.append({"name": name, "transports": transports, "reasons": reasons})
        else:
            backend = registry.find(name)
            reasons = registry.communicator_unavailable(backend)
            if not reasons and type(backend).communicator is Backend.communicator:
                reasons = [f"backend {name!r} has no communicator; take it out of communicators"]
            found.append({"name": name, "transports": [], "reasons": reasons})
    return found


def as_text(report: dict) -> str:
    """The report for people."""
    versions = report["versions"]
    lines = [f"hetero_attn {versions['hetero_attn']}   python {versions['python']}   torch {versions['torch']}", "", "devices"]
    for device in report["devices"]:
        details = [f"{device['memory_gib']} GiB"] if "memory_gib" in device else []
        details += [f"compute capability {device['capability']}"] if "capability" in device else []
        details += [f"{device['cores']} cores, torch uses {device['torch_threads']} threads"] if "cores" in device else []
        text = f"none: {device['absent']}" if "absent" in device else ", ".join([device["name"], *details])
        lines.append(f"  {device['device']:<8} {text}")
        lines += [f"  {'':<8} {device['remark']}"] if device.get("remark") else []
    lines += ["", "backends (a tiny call of each, checked against the definition)"]
    width = max(len(b["name"]) for b in report["backends"])
    for backend in report["backends"]:
        listed = "" if backend["listed"] else "  by name only" if not backend["absent"] else ""
        state = "absent" if backend["absent"] else "does not run here"
        if backend["runs_here"]:
            state = f"runs here ({backend['probed_on']}){listed}"
        texts = [state if not backend["reasons"] else f"{state}: {backend['reasons'][0]}", *backend["reasons"][1:], *backend["notes"]]
        lines += [f"  {backend['name'] if i == 0 else '':<{width}}  {text}" for i, text in enumerate(texts)]
    lines += ["", "communicators"]
    for communicator in report["communicators"]:
        text = "; ".join(communicator["reasons"])
        if not text:
            transports = ", ".join(communicator["transports"])
            text = f"over {transports}" if transports else "can be had here; the ranks agree on it when they meet"
        lines.append(f"  {communicator['name']:<{width}}  {text}")
    lines += ["", f"profile {report['profile']}   verified: {report['verified']}   (shipped: {', '.join(report['shipped_profiles'])})"]
    rows = [(s["key"], _plain(s["value"]), s["origin"]) for s in report["settings"] if s["value"] not in (None, (), "")]
    key_width, value_width = max(len(r[0]) for r in rows), min(44, max(len(r[1]) for r in rows))
    lines += [f"  {key:<{key_width}}  {value:<{value_width}}  {origin}" for key, value, origin in rows]
    if report["environment"]:
        lines += ["", "environment", *(f"  {name}={value}" for name, value in report["environment"].items())]
    lines += [f"  {name} is unknown and has no effect" for name in report["unknown_variables"]]
    return "\n".join(lines)


def _plain(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value).lower() if isinstance(value, bool) else str(value)
