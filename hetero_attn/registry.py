"""Which backend runs a call, and why not the others.

Backends are found by name (modules `hetero_attn_<name>`, entry points `hetero_attn.backends`) and imported only when asked
for. Precedence: the call's argument, then use_backend(), then HETERO_ATTN_BACKEND, then the profile's list in its order.
A backend that is named runs or raises; only the profile's list falls through, and says so once.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

from hetero_attn import backend as contract
from hetero_attn.backend import AbsentBackend, Backend, UnsupportedError
from hetero_attn.profile import DeviceProfile, load_profile
from hetero_attn.reference import ReferenceBackend
from hetero_attn.spec import AttentionSpec

PREFIX = "hetero_attn_"
ENTRY_POINT_GROUP = "hetero_attn.backends"
log = logging.getLogger("hetero_attn")

_registered: dict[str, Callable[[], Backend]] = {"reference": ReferenceBackend}
_instances: dict[str, Backend] = {}
_forced_backend: ContextVar[str | None] = ContextVar("hetero_attn_backend", default=None)
_forced_profile: ContextVar[_Forced | None] = ContextVar("hetero_attn_profile", default=None)
_serials: dict[DeviceProfile, int] = {}
_device_profiles: dict[tuple[str | None, ...], DeviceProfile] = {}
_logged: set[tuple] = set()
# What lies under os.environ where it has that (its own get() raises and catches a KeyError for a name that is not set: 0.5 us each).
_environ = getattr(os.environ, "_data", os.environ)
_BACKEND, _PROFILE, _SET = map(
    os.environ.encodekey if _environ is not os.environ else str, ("HETERO_ATTN_BACKEND", "HETERO_ATTN_PROFILE", "HETERO_ATTN_SET")
)
generation = 0                    # moves when a backend is registered or removed: decisions made before it are void


class _Forced(NamedTuple):
    """What use_profile() set, under a number: plans are remembered by it, because hashing a whole profile takes as long as a call."""

    serial: int
    profile: DeviceProfile


class UnknownBackendError(ValueError):
    """A backend was asked for by a name that nothing answers to."""


@cache
def _found() -> dict[str, Callable[[], Backend]]:
    """Name -> import function, for every module and entry point on this machine; nothing is imported yet."""
    found: dict[str, Callable[[], Backend]] = {}
    for module in pkgutil.iter_modules():
        if module.name.startswith(PREFIX):
            found[module.name.removeprefix(PREFIX)] = lambda name=module.name: importlib.import_module(name).backend()
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(point.name, lambda point=point: point.load()())
    return found


def names() -> list[str]:
    """Every backend that can be named on this machine, importable or broken, in alphabetical order with 'reference' last."""
    return [*sorted({*_found(), *_registered} - {"reference"}), "reference"]


def get(name: str) -> Backend:
    """The backend of that name. One that fails to import is returned as a backend that is unavailable, with the reason.

    Raises UnknownBackendError, which lists the known names.
    """
    instance = _instances.get(name)
    if instance is not None:
        return instance
    if not isinstance(name, str):
        raise TypeError(f"backend is {name!r}, expected a name: one of {', '.join(names())}")
    factory = _registered.get(name) or _found().get(name)
    if factory is None:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UnknownBackendError(
            f"unknown backend {name!r}{_asked_where(name)}: {hint}known here: {', '.join(names())}; "
            f"a package {PREFIX}{name} on the Python path would add it"
        )
    try:
        instance = factory()
    except (Exception, SystemExit) as error:  # a broken import becomes a reason, whatever broke it
        instance = AbsentBackend(name, f"package {PREFIX}{name} does not import: {type(error).__name__}: {error}")
    if not isinstance(instance, Backend):
        got = type(instance).__name__
        instance = AbsentBackend(name, f"package {PREFIX}{name}: its `backend` gives a {got}, expected a hetero_attn.backend.Backend")
    _instances[name] = instance
    return instance


def find(name: str) -> Backend:
    """Like get(), but a name nothing answers to is an absent backend: what a profile's list means by it."""
    try:
        return get(name)
    except UnknownBackendError:
        return AbsentBackend(name, f"no package {PREFIX}{name} is installed or on the Python path")


@contextmanager
def register(name: str, factory: Callable[[], Backend]) -> Iterator[None]:
    """Add a backend for the length of a `with` block: emulated backends and tests. Backends of a package need no registering."""
    global generation
    if name in _registered or name in _found():
        raise ValueError(f"backend {name!r} exists already; known: {', '.join(names())}")
    _registered[name] = factory
    generation += 1
    try:
        yield
    finally:
        _registered.pop(name)
        _instances.pop(name, None)
        generation += 1


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Every attention call of this thread or task inside the block runs on backend `name`, or raises. None lifts an outer block.

    Raises UnknownBackendError at once.
    """
    if name is not None:
        get(name)
    token = _forced_backend.set(name)
    try:
        yield
    finally:
        _forced_backend.reset(token)


@contextmanager
def use_profile(profile: DeviceProfile | str | os.PathLike | None) -> Iterator[DeviceProfile | None]:
    """Calls inside the block choose by this profile (a name, a path or a DeviceProfile) instead of the detected one."""
    loaded = profile if profile is None or isinstance(profile, DeviceProfile) else load_profile(profile)
    forced = None if loaded is None else _Forced(_serials.setdefault(loaded, len(_serials)), loaded)
    token = _forced_profile.set(forced)
    try:
        yield loaded
    finally:
        _forced_profile.reset(token)


def current_profile(device: str, index: int | None = None) -> DeviceProfile:
    """The profile that chooses for tensors on `device`, a type, and number `index` of it (None: the first that the profile of its kind is
    detected by): use_profile()'s, else HETERO_ATTN_PROFILE's, else the detected one."""
    forced = _forced_profile.get()
    if forced is not None:
        return forced.profile
    kind = device if device in ("cpu", "cuda", "npu") else None         # mps, xpu, meta, …: the best profile of this machine
    kind = f"{kind}:{index}" if kind not in (None, "cpu") and index is not None else kind
    key = (kind, os.environ.get("HETERO_ATTN_PROFILE"), os.environ.get("HETERO_ATTN_SET"))
    profile = _device_profiles.get(key)
    if profile is None:
        profile = _device_profiles[key] = load_profile(None, device=kind)
    return profile


def chosen_name(argument: str | None) -> str | None:
    """The backend that is asked for by name, by precedence; None = the profile decides."""
    return argument if argument is not None else _forced_backend.get() or os.environ.get("HETERO_ATTN_BACKEND") or None


def choice(argument: str | None) -> tuple:
    """Everything outside a call's own arguments that its choice depends on, hashable: two calls that agree on it choose alike."""
    forced = _forced_profile.get()
    return (
        argument, _forced_backend.get(), None if forced is None else forced.serial, generation + contract.withdrawals,
        _environ.get(_BACKEND), _environ.get(_PROFILE), _environ.get(_SET),
    )


def unavailable(backend: Backend, index: int | None = None) -> list[str]:
    """backend.unavailable_reasons(), or unavailable_on(index); a check of the machine that itself fails is such a reason."""
    try:
        return list(backend.unavailable_reasons() if index is None else backend.unavailable_on(index))
    except Exception as error:
        return [f"its look at this machine failed: {type(error).__name__}: {error}"]


def communicator_unavailable(backend: Backend) -> list[str]:
    """backend.communicator_unavailable_reasons(), likewise."""
    try:
        return list(backend.communicator_unavailable_reasons())
    except Exception as error:
        return [f"its look at this machine failed: {type(error).__name__}: {error}"]


def objections(backend: Backend, spec: AttentionSpec) -> list[str]:
    """Everything that stands against running `spec` on `backend` here; [] = it runs."""
    return [*unavailable(backend, spec.device_index), *backend.unsupported_reasons(spec)]


class Selection(NamedTuple):
    backend: Backend
    name: str                     # by which it is registered
    holds: bool                   # for other lengths too: no backend that could run here judges lengths


def select(spec: AttentionSpec, name: str | None = None) -> Selection:
    """The backend that runs `spec`. `name` is chosen_name()'s answer. Raises UnsupportedError, UnknownBackendError, ProfileError."""
    if name is None:
        return first_without_objection(spec, current_profile(spec.device, spec.device_index))
    backend = get(name)
    reasons = objections(backend, spec)
    if reasons:
        headline = f"backend {name!r}{_asked_where(name)} cannot run this attention"
        raise UnsupportedError(_refusal(headline, spec, {name: reasons}), {name: reasons})
    return Selection(backend, name, not backend.judges_lengths)


def linear_backend(profile: DeviceProfile) -> Backend:
    """Whose linear the profile's models use: its first available backend that defines one, else torch's own (a bare Backend)."""
    return _first_with("linear", profile)


def norm_backend(profile: DeviceProfile) -> Backend:
    """Whose rms_norm the profile's models use, by the same rule: a backend may have a norm and leave products to torch."""
    return _first_with("rms_norm", profile)


def _first_with(method: str, profile: DeviceProfile) -> Backend:
    for name in profile.backends:
        backend = find(name)
        if getattr(type(backend), method) is not getattr(Backend, method) and not unavailable(backend):
            return backend
    return Backend()


def _asked_where(name: str) -> str:
    """' (from HETERO_ATTN_BACKEND)' where the environment may have asked for `name`: it is set far from the line that fails."""
    return " (from HETERO_ATTN_BACKEND)" if not _forced_backend.get() and os.environ.get("HETERO_ATTN_BACKEND") == name else ""


def first_without_objection(spec: AttentionSpec, profile: DeviceProfile, *, quiet: bool = False) -> Selection:
    """The first backend of the profile's list that runs `spec`; says so in the log, once, unless `quiet`. Raises UnsupportedError."""
    against: dict[str, list[str]] = {}
    holds = True
    for name in profile.backends:
        backend = find(name)
        if against and profile.strict:
            against[name] = ["excluded by strict: true"]
            continue
        here_not = unavailable(backend, spec.device_index)     # then no length makes it run, and none has to be judged again
        reasons = [*here_not, *backend.unsupported_reasons(spec)]
        holds = holds and (bool(here_not) or not backend.judges_lengths)
        if not reasons:
            if not quiet:
                _log_choice(profile, name, against, spec)
            return Selection(backend, name, holds)
        against[name] = reasons
    strict = " (strict)" if profile.strict else ""
    message = _refusal(f"no backend of profile {profile.name!r}{strict} runs this attention", spec, against)
    raise UnsupportedError(message, against)


def _log_choice(profile: DeviceProfile, name: str, against: dict[str, list[str]], spec: AttentionSpec) -> None:
    key = (profile.name, name, *against)
    if key in _logged:
        return
    _logged.add(key)
    if against:
        passed = "; ".join(f"{other}: {', '.join(reasons)}" for other, reasons in against.items())
        log.warning("attention falls to %s (profile %s): %s [%s]", name, profile.name, passed, spec)
    else:
        log.info("attention runs on %s (profile %s) [%s]", name, profile.name, spec)


def _refusal(headline: str, spec: AttentionSpec, against: dict[str, list[str]]) -> str:
    width = max((len(name) for name in against), default=0)
    lines = [headline, f"  {spec}"]
    for name, reasons in against.items():
        lines += [f"  {name if position == 0 else '':<{width}}  {reason}" for position, reason in enumerate(reasons)]
    return "\n".join([*lines, "see: hetero-attn doctor"])
