"""Whether the ranks of a group can reach one another's memory, by which door, and the communicator for those that can.

Every rank says the same few things over the base, so all come to the same verdict and none waits for one that has given up. Rank 0's
profile counts for sizes and CTAs.
"""

from __future__ import annotations

from hetero_attn.communicator import Communicator, CommunicatorError
from hetero_attn.profile import DeviceProfile
from hetero_attn_hopper import plan
from hetero_attn_hopper.abi import MAX_RANKS
from hetero_attn_hopper.communicator import HopperCommunicator
from hetero_attn_hopper.device import Device
from hetero_attn_hopper.group import Ctas
from hetero_attn_hopper.kernels import MULTIMEM, UNICAST, sources
from hetero_attn_hopper.layout import ALIGN, Layout
from hetero_attn_hopper.telling import on_all_ranks, told_by_all

MULTIMEM_CAPABILITY = (9, 0)
# What a profile may force that only the communicator over torch.distributed has.
FORCIBLE = {"algorithm": ("auto",), "codec": ("none", "auto")}


def hopper_communicator(base: Communicator, profile: DeviceProfile, device: Device, door: str | None = None) -> Communicator | list[str]:
    """The communicator, or the reasons against it, which are every rank's alike. All ranks call it together. door: one of DOORS, None = the
    best there is. Raises CommunicatorError when a rank is lost meanwhile."""
    reasons, facts = _own_reasons(base, profile, device), {}
    if not reasons:
        try:
            facts = device.facts(base.device)
        except Exception as error:                   # told like any other reason: the other ranks wait for a word
            reasons = [f"its device does not describe itself: {type(error).__name__}: {error}"]
    own = {"reasons": reasons, "facts": facts, "sizes": sizes_of(profile, base.world_size), "ctas": ctas_of(profile), "door": door}
    told = told_by_all(base, own)
    reasons = [f"rank {rank}: {reason}" for rank, each in enumerate(told) for reason in each["reasons"]]
    if reasons:
        return reasons
    everyone = [each["facts"] for each in told]
    try:
        objections = device.objections(everyone, base.rank)
    except Exception as error:
        objections = [f"whether it reaches the others' devices cannot be told: {type(error).__name__}: {error}"]
    reasons = [f"rank {rank}: {reason}" for rank, each in enumerate(told_by_all(base, objections)) for reason in each]
    if reasons:
        return reasons
    layout = Layout(*told[0]["sizes"])
    try:
        memory = device.symmetric(base, layout, everyone)            # tells itself how every rank fared
    except CommunicatorError:
        raise
    except RuntimeError as error:
        return [f"the ranks got no memory in common ({layout.size / 2**20:.0f} MiB each): {error}"]
    lacking = told_by_all(base, not_multimem(memory.multicast, everyone[base.rank]["capability"]))
    why = sorted({reason for each in lacking for reason in each})
    if told[0]["door"] == MULTIMEM and why:
        memory.close()
        return [f"door multimem was asked for: {reason}" for reason in why]
    door = told[0]["door"] or (UNICAST if why else MULTIMEM)
    try:
        on_all_ranks(base, "the kernels", lambda: device.prepare(sources(door), base.device))
    except CommunicatorError:
        raise
    except RuntimeError as error:
        memory.close()
        return [str(error)]
    return HopperCommunicator(base, device, memory, layout, door, Ctas(*told[0]["ctas"]), why)


def not_multimem(multicast: int, capability: list[int]) -> list[str]:
    """Why the switch cannot sum for this rank."""
    reasons = []
    if tuple(capability) < MULTIMEM_CAPABILITY:
        reasons.append(f"compute capability is {'.'.join(map(str, capability))}, multimem instructions need 9.0")
    if not multicast:
        reasons.append("the ranks' memory has no multicast address (it takes NVSwitch, and each rank a GPU of its own)")
    return reasons


def sizes_of(profile: DeviceProfile, world_size: int) -> list[int]:
    """Layout's stage, room and heap by a profile."""
    stage = profile.symmetric_stage_bytes // max(world_size // 2, 1)     # every rank reads all of everyone's
    return [max(stage // ALIGN, 1) * ALIGN, profile.symmetric_room_bytes, profile.symmetric_heap_bytes]


def symmetric_bytes(profile: DeviceProfile, world_size: int) -> int:
    """What each rank's symmetric memory takes by a profile; 0 where there would be no communicator."""
    return 0 if _profile_reasons(profile, world_size) else Layout(*sizes_of(profile, world_size)).size


def ctas_of(profile: DeviceProfile) -> Ctas:
    """CTAs by a profile: alone as many as communication may keep to itself, beside products what was measured."""
    overlap = profile.overlap
    alone = min(max(overlap.communication_units or plan.DEFAULT_CTAS, plan.MIN_CTAS), plan.MAX_CTAS)
    beside = min(alone, plan.OVERLAPPED_CTAS)
    return Ctas(alone, overlap.attention_ctas or beside, overlap.mlp_ctas or beside)


def _own_reasons(base: Communicator, profile: DeviceProfile, device: Device) -> list[str]:
    reasons = device.unavailable_reasons(base.device.index)
    if base.device.type != device.type:
        reasons = [*reasons, f"device is {base.device}, these kernels run on {device.type}"]
    return [*reasons, *_profile_reasons(profile, base.world_size)]


def _profile_reasons(profile: DeviceProfile, world_size: int) -> list[str]:
    """Those that need no device to be known."""
    reasons = []
    if not 2 <= world_size <= MAX_RANKS:
        reasons.append(f"world size is {world_size}, these kernels serve 2 to {MAX_RANKS} ranks")
    for name, harmless in FORCIBLE.items():
        asked = getattr(profile, name, harmless[0])
        if asked not in harmless:
            reasons.append(f"{name} is {asked!r}, which travels over torch.distributed; say {name}: {harmless[0]}")
    for name, count in zip(("overlap.attention_ctas", "overlap.mlp_ctas"), ctas_of(profile)[1:]):
        if reason := plan.ctas_reason(name, count):
            reasons.append(reason)
    return reasons
