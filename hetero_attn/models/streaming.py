"""A decoder whose weights come from the disk: which slices make a piece of the weight window, and what a rank holds beside it.

Projections and experts are streamed, by each rank its own slices, in the dtype they are stored in. Norms, biases and routers are small and
held. A projection goes through the window in runs of rows, of which each makes features of its own: the smallest window is two runs and not
the largest weight (7B shape, 4 ranks: 8 MiB and not 43). The embedding is a table on the disk of which rows are looked up through a
mapping, and the head is one more projection; so a rank that has both needs no more memory than one that has neither.
"""

from __future__ import annotations

import hashlib
import mmap
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from hetero_attn.models.config import ModelError
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.moe import MixtureOfExperts
from hetero_attn.models.rope import RotaryEmbedding
from hetero_attn.models.weights import DTYPES, Checkpoint, Entry
from hetero_attn.parallel.disk import Extent, extents
from hetero_attn.parallel.linear import empty_parameter
from hetero_attn.parallel.sharding import Shard
from hetero_attn.parallel.window import Lent, Piece, Tensor, WeightWindow

RUN_ROWS = 256                  # a run has a multiple of so many rows: a folder of one rank has a checksum for each so many
RUN_BYTES = 4 << 20             # and up to so many bytes, unless those rows have more: a product's call is little beside their reading


class Layout:
    """The pieces of a decoder (on the meta device) in a checkpoint, in the order of a pass, and who takes which. Raises ModelError.

    users: (the layer with `streamed`, its pieces' indices, which are runs of its weight's rows in order). held: parameters that stay in
    memory.
    """

    def __init__(self, decoder: Decoder, checkpoint: Checkpoint) -> None:
        self.pieces: list[Piece] = []
        self.users: list[tuple[nn.Module, list[int]]] = []
        self._checkpoint, names = checkpoint, set(checkpoint.entries)
        self._streamed: set[int] = set()
        for number, layer in enumerate(decoder.layers):
            by_weight: dict[int, list[Shard]] = {}
            for shard in layer.shards(f"model.layers.{number}.", names):
                by_weight.setdefault(_storage(shard.into), []).append(shard)
            attention, mlp = f"layers.{number}.attention", f"layers.{number}.mlp"
            self._add_runs(layer.attention.qkv_proj, f"{attention}.qkv_proj", by_weight)
            self._add_runs(layer.attention.o_proj, f"{attention}.o_proj", by_weight, ends_block=True)
            if isinstance(layer.mlp, MixtureOfExperts):
                self._add(layer.mlp, f"{mlp}.experts", ["gate_up", "down"], by_weight)
            else:
                self._add_runs(layer.mlp.gate_up_proj, f"{mlp}.gate_up_proj", by_weight)
                self._add_runs(layer.mlp.down_proj, f"{mlp}.down_proj", by_weight, ends_block=True)
        self._add_head(decoder)
        self._streamed |= {_storage(decoder.embed.weight), _storage(decoder.lm_head.weight)}

    def held(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of the shards that do not go through the window, and are no vocabulary's."""
        return [shard for shard in shards if _storage(shard.into) not in self._streamed]

    def is_streamed(self, parameter: torch.Tensor) -> bool:
        return _storage(parameter) in self._streamed

    def _add_runs(self, module: nn.Module, name: str, by_weight: dict[int, list[Shard]], *, ends_block: bool = False) -> None:
        """A projection, in runs of the rows of its weight [own features, in]; none goes over the edge of a tensor of the checkpoint."""
        weight = module.weight
        shards = [shard for shard in by_weight.get(_storage(weight), []) if shard.into.numel()]
        dtype, width, indices = self._dtype(name, shards, weight.dtype), weight.shape[1], []
        for shard in shards:
            before = shard.into.storage_offset() // width                # rows of the weight that other tensors fill
            for rows in self._runs(shard.name, shard.into.shape[0], width * dtype.itemsize):
                own = (shard.own[0][rows.start : rows.stop], *shard.own[1:])
                parts = self._parts(shard.name, own, 0, (width, 1), dtype)
                checks = self._checks(shard.name, own, 0, shard.into[rows.start : rows.stop])
                indices.append(len(self.pieces))
                self.pieces.append(Piece(f"{name}.{before + rows.start}", (Tensor(0, (len(rows), width), dtype),), tuple(parts),
                                         tuple(checks)))
        if indices:
            self.pieces[-1] = replace(self.pieces[-1], ends_block=ends_block)
        else:
            indices.append(len(self.pieces))
            self.pieces.append(Piece(name, (Tensor(0, tuple(weight.shape), dtype),), (), ends_block=ends_block))
        self._streamed.add(_storage(weight))
        self.users.append((module, indices))

    def _runs(self, name: str, rows: int, row_bytes: int) -> Iterator[range]:
        """`rows` rows of a tensor, cut where its checksums end."""
        grain = self._checkpoint.entries[name].check_rows or RUN_ROWS
        step = max(1, RUN_BYTES // (grain * row_bytes)) * grain
        for start in range(0, rows, step):
            yield range(start, min(start + step, rows))

    def _add(self, module: nn.Module, name: str, weights: Sequence[str], by_weight: dict[int, list[Shard]]) -> None:
        """Experts: all of a layer's are one piece."""
        tensors, parts, checks, end = [], [], [], 0
        for weight in weights:
            parameter = getattr(module, weight)
            shards = by_weight.get(_storage(parameter), [])
            dtype = self._dtype(name, shards, parameter.dtype)
            tensors.append(Tensor(end, tuple(parameter.shape), dtype))
            for shard in shards:
                into = end + shard.into.storage_offset() * dtype.itemsize
                parts += self._parts(shard.name, shard.own, into, shard.into.stride(), dtype)
                checks += self._checks(shard.name, shard.own, into, shard.into)
            self._streamed.add(_storage(parameter))
            end += -(-parameter.numel() * dtype.itemsize // 64) * 64
        self.users.append((module, [len(self.pieces)]))
        self.pieces.append(Piece(name, tuple(tensors), tuple(parts), tuple(checks), ends_block=True))

    def _add_head(self, decoder: Decoder) -> None:
        head, own = decoder.lm_head, decoder.lm_head.own
        if not len(own):
            return
        name = "model.embed_tokens.weight" if head.tied else "lm_head.weight"
        dtype, width = DTYPES[self._checkpoint.entries[name].dtype], head.weight.shape[1]
        indices = []
        for run in self._runs(name, len(own), width * dtype.itemsize):
            rows = own[run.start : run.stop]
            parts = self._parts(name, (rows,), 0, (width, 1), dtype)
            checks = self._checks(name, (rows,), 0, None)
            indices.append(len(self.pieces))
            self.pieces.append(Piece(f"lm_head.{rows.start}", (Tensor(0, (len(rows), width), dtype),), tuple(parts), tuple(checks)))
        self.users.append((head, indices))

    def _parts(self, name: str, own: Sequence[range], into: int, strides: Sequence[int], dtype: torch.dtype) -> Iterator[Extent]:
        entry = self._checkpoint.entries[name]
        return extents(entry.file, entry.offset, dtype.itemsize, entry.stored_shape, entry.within(own), into, strides)

    def _checks(self, name: str, own: Sequence[range], into: int, destination: torch.Tensor | None) -> list[tuple[int, int, str]]:
        """(byte in the piece, bytes, sha256) of the runs of rows that the checkpoint has checksums of and that are whole here."""
        entry = self._checkpoint.entries[name]
        if not entry.checks or (destination is not None and not destination.is_contiguous()):
            return []
        rows = entry.within(own)[0]
        return [(into + (start - rows.start) * entry.row_bytes, (stop - start) * entry.row_bytes, digest)
                for start, stop, digest in entry.checked_rows() if rows.start <= start and stop <= rows.stop]

    def _dtype(self, name: str, shards: Sequence[Shard], otherwise: torch.dtype) -> torch.dtype:
        stored = {self._checkpoint.entries[shard.name].dtype for shard in shards}
        if len(stored) > 1:
            raise ModelError(f"{shards[0].name} and its neighbours in {name} are stored as {', '.join(sorted(stored))}; a weight window "
                             "needs one dtype for them: leave --memory-budget out, or convert the checkpoint")
        return DTYPES[stored.pop()] if stored else otherwise


class EmbeddingTable:
    """Rows of a tensor on the disk, looked up through a mapping whose pages are let go of again: what is held does not grow."""

    def __init__(self, entry: Entry, own: range, dtype: torch.dtype) -> None:
        self.dtype, self._width = dtype, entry.shape[1]
        self._stored = DTYPES[entry.dtype]
        self._first = entry.within((own,))[0].start
        self._entry, self._unchecked = entry, {start // entry.check_rows: (start, stop, digest)
                                               for start, stop, digest in entry.checked_rows()} if entry.checks else {}
        with open(entry.file, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_RANDOM)                          # no reading ahead: the next row is somewhere else

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        """indices [T] int64 into this rank's rows -> [T, C]."""
        out = torch.empty(len(indices), self._width, dtype=self._stored)
        size = self._width * self._stored.itemsize
        for place, index in enumerate(indices.tolist()):
            row = index + self._first
            if self._unchecked:
                self._check(row)
            start = self._entry.offset + row * size
            out[place] = torch.frombuffer(bytearray(self._map[start : start + size]), dtype=self._stored)
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return out.to(self.dtype)

    def _check(self, row: int) -> None:
        found = self._unchecked.pop(row // self._entry.check_rows, None)
        if found is not None:
            start, stop, digest = found
            base = self._entry.offset
            content = self._map[base + start * self._entry.row_bytes : base + stop * self._entry.row_bytes]
            if hashlib.sha256(content).hexdigest() != digest:
                raise ModelError(f"{self._entry.file} is damaged: the checksum of rows {start} to {stop} is not that of its export; "
                                 "copy the folder again, or run hetero-attn shard again")


def materialise(decoder: Decoder, layout: Layout, device: torch.device) -> None:
    """Gives memory to what a decoder made on the meta device holds itself: all but the layout's weights and the vocabulary."""
    decoder.device = device
    decoder.rotary = RotaryEmbedding(decoder.config.rotary, device)
    for module in decoder.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and not layout.is_streamed(parameter):
                module._parameters[name] = empty_parameter(*parameter.shape, dtype=parameter.dtype, device=device)


def connect(decoder: Decoder, layout: Layout, checkpoint: Checkpoint, window: WeightWindow) -> None:
    """Puts the window between the decoder and its weights; it ends with the decoder."""
    for module, indices in layout.users:
        lent = [Lent(window, index) for index in indices]
        module.streamed = lent[0] if isinstance(module, MixtureOfExperts) else lent
    if len(decoder.embed.own):
        entry = checkpoint.entries["model.embed_tokens.weight"]
        decoder.embed.table = EmbeddingTable(entry, decoder.embed.own, decoder.dtype)
    decoder.window = window
    weakref.finalize(decoder, window.close)


def _storage(tensor: torch.Tensor) -> int:
    """What tells whether two tensors share memory, on the meta device too."""
    return tensor.untyped_storage()._cdata
