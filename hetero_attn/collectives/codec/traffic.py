"""What went through a codec, site by site: values, bytes on the wire, and how many values lay beyond their scale.

A 4-bit payload that hurts a model does so without an error; the share that saturated is the first thing to look at.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetero_attn.quantity import shown_bytes


@dataclass
class Counts:
    """One site's: values encoded by this rank, the bytes they became (status bytes too), values that saturated."""

    values: int = 0
    nbytes: int = 0
    saturated: int = 0

    @property
    def bits_per_value(self) -> float:
        return 8 * self.nbytes / self.values if self.values else 0.0

    @property
    def saturated_share(self) -> float:
        return self.saturated / self.values if self.values else 0.0


class Traffic:
    """Counts by site, of one rank. For tensors of a device: packing says who packs them where, or why the host does, in words ('' = no such
    call yet); bytes_down, bytes_up: what has crossed to the host and back where the device packs."""

    def __init__(self) -> None:
        self.sites: dict[str, Counts] = {}
        self.packing = ""
        self.bytes_down = self.bytes_up = 0

    def clear(self) -> None:
        """Begin anew; who packs stays as it is."""
        self.sites.clear()
        self.bytes_down = self.bytes_up = 0

    def add(self, site: str, values: int, nbytes: int, saturated: int) -> None:
        counts = self.sites.get(site)
        if counts is None:
            counts = self.sites[site] = Counts()
        counts.values += values
        counts.nbytes += nbytes
        counts.saturated += saturated

    def total(self) -> Counts:
        """All sites together."""
        each = self.sites.values()
        return Counts(sum(c.values for c in each), sum(c.nbytes for c in each), sum(c.saturated for c in each))

    def summary(self) -> str:
        """One line for a person; '' where nothing was encoded."""
        total = self.total()
        if not total.values:
            return ""
        line = f"{total.values} values at {len(self.sites)} sites, {total.bits_per_value:.2f} bits each, "
        end = f"; {self.packing}" if self.packing else ""
        if self.bytes_down or self.bytes_up:
            end += f" ({shown_bytes(self.bytes_down)} to the host, {shown_bytes(self.bytes_up)} back)"
        if not total.saturated:
            return f"{line}none saturated{end}"
        worst = max(self.sites, key=lambda site: self.sites[site].saturated_share)
        return line + (f"{total.saturated_share:.2%} saturated (most at {worst or 'calls without a site'}: "
                       f"{self.sites[worst].saturated_share:.2%}){end}")
