// The pipeline of every reducing collective: cut in a slice per rank, each slice in chunks that fit a staging buffer; per step a rank
// takes back the last chunk's results, lays out the next chunk, and sums its own slice of this chunk for everybody. One step a chunk.
//
//   staging buffer of a rank, one of two:   | piece of slice 0 | piece of slice 1 | ... one per rank, equally long
//
// A rank's own piece never passes through its buffer, and what lies in the rank's heap passes through none: the others read x and write
// the result where they are.
#pragma once
#include "shared_group.h"
#include "shared_sum.h"

namespace ha {

// Bytes of x: slice r is [start[r], start[r + 1]); chunk k of it begins k * piece bytes further.
struct Slices {
    int64_t start[MAX_RANKS + 1], piece;
    int64_t chunks;

    // `units` of unit_bytes each, contiguous shares as hetero_attn.communicator.shard_rows gives them, of total_bytes in all (the last unit
    // may be cut short); pieces of whole `grain`s. piece is 0 when not even one grain fits.
    Slices(int64_t units, int64_t unit_bytes, int64_t total_bytes, int64_t grain, int world_size, int64_t stage_bytes) {
        const int64_t share = units / world_size, extra = units % world_size;
        int64_t longest = 0;
        for (int r = 0; r <= world_size; ++r) start[r] = std::min((r * share + std::min<int64_t>(r, extra)) * unit_bytes, total_bytes);
        for (int r = 0; r < world_size; ++r) longest = std::max(longest, start[r + 1] - start[r]);
        piece = stage_bytes / world_size / grain * grain;
        chunks = piece ? (longest + piece - 1) / piece : 0;
    }
    int64_t from(int r, int64_t k) const { return std::min(start[r] + k * piece, start[r + 1]); }
    int64_t size(int r, int64_t k) const { return std::min(start[r] + (k + 1) * piece, start[r + 1]) - from(r, k); }
};

// work(ends, from, bytes): makes the result of own bytes [from, from + bytes) of x. publish: to every rank's `out` (as long as x), else to
// this rank's alone, which then holds its own slice only. Returns `wanted`, or a negative code.
template <class Work>
int64_t reduce_pieces(HaGroup& g, Record record, const Slices& slices, const char* x, char* out, bool publish, const Work& work) {
    const int me = g.rank, n = g.world_size;
    const Place x_place = g.find(x), out_place = publish ? g.find(out) : Place{-1, 0};
    const bool staged = x_place.segment < 0, handed_back = publish && out_place.segment < 0;
    record.x_segment = x_place.segment;
    record.x_offset = x_place.offset;
    record.out_segment = out_place.segment;
    record.out_offset = out_place.offset;
    const uint64_t first = g.step + 1;
    auto lay_out = [&](int64_t k) {
        for (int r = 0; r < n && staged; ++r)
            if (r != me) std::memcpy(g.stage(me, first + k) + r * slices.piece, x + slices.from(r, k), slices.size(r, k));
    };
    auto take_back = [&](int64_t k) {
        for (int r = 0; r < n && handed_back; ++r)
            if (r != me) std::memcpy(out + slices.from(r, k), g.stage(me, first + k) + r * slices.piece, slices.size(r, k));
    };
    const char* reads[MAX_RANKS];            // null: its staging buffer
    char* writes[MAX_RANKS];
    bool any_in_place = false;
    int64_t wanted = 0;
    lay_out(0);
    g.post(&record);
    for (int64_t k = 0; k < slices.chunks; ++k) {
        if (!g.wait()) return -1;
        if (k == 0) {
            if (!g.agree()) return -2;
            wanted = g.most_wanted();
            for (int r = 0; r < n; ++r) {
                const Record& other = g.record(r);
                reads[r] = g.at(r, {other.x_segment, other.x_offset});
                writes[r] = g.at(r, {other.out_segment, other.out_offset});
                any_in_place |= reads[r] != nullptr;
            }
        } else {
            take_back(k - 1);
        }
        if (k + 1 < slices.chunks) lay_out(k + 1);
        const int64_t from = slices.from(me, k), bytes = slices.size(me, k);
        if (bytes > 0) {
            Ends ends;
            ends.froms = n;
            ends.tos = 0;
            if (!publish) ends.to[ends.tos++] = out + (from - slices.start[me]);
            for (int r = 0; r < n; ++r) {
                char* stage = g.stage(r, first + k) + me * slices.piece;
                ends.from[r] = r == me ? x + from : reads[r] ? reads[r] + from : stage;
                if (publish) ends.to[ends.tos++] = r == me ? out + from : writes[r] ? writes[r] + from : stage;
            }
            work(ends, from, bytes);
        }
        if (k + 1 < slices.chunks || publish || any_in_place) g.post();
    }
    // The results of the last chunk; and nobody returns while another may still read its x.
    if (publish || any_in_place) {
        if (!g.wait()) return -1;
        take_back(slices.chunks - 1);
    }
    return wanted;
}

}  // namespace ha
