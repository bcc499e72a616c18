// Pattern decoders: which slots a part of a row takes, and where along K they go. Each pattern has two forms:
//
//   a Tile, for y = x W^T: rows g and g + 8 of a 16-row panel, the span of 32 inputs that lane t owns in a tile of 128
//   a Span, for dx = dy W: one row, the 16 inputs that lane group g owns in a tile of 128
//
// Both hand out octets: eight neighbouring inputs of a row as four registers (input 2i, input 2i + 1). A dot product
// does not care in which order K is walked, as long as both sides walk it alike; so lane t takes inputs that lie
// together in memory (one 16-byte load of int4 codes) for columns 2t, 2t+1, 2t+8, 2t+9 of fragment after fragment, and
// x is read from shared memory at the same inputs. The bytes stay as docs/formats.md draws them: nothing is shuffled.
#pragma once

#include "values.cuh"

namespace ctp {

constexpr int TILE_K = 128;  // the stride of ctp_weight.tile_offsets too
constexpr int ALL_LANES = 32;

// ctp_weight with what a kernel would otherwise compute again. K is a multiple of TILE_K, so that a tile is whole, and
// every plane lies on 16 bytes: no load asks where it ends.
struct Weight {
  const void* low;
  const uint8_t *high, *mask, *zeros;
  const int32_t *row_offsets, *tile_offsets;
  const void* scales;
  int n, k, row_octets, mask_octets, groups;
  uint32_t group_magic;  // 2^32 / (units of inputs a group), and one more than its whole part; 0 for one unit a group
  bool half_scales;
};

// The group of unit `unit` of a row: a division by what is known to the host only.
__device__ __forceinline__ int group_of(const Weight& w, int unit) {
  return w.group_magic == 0 ? unit : int(uint64_t(uint32_t(unit)) * w.group_magic >> 32);
}
// Where a row of W begins in each plane.
struct Row {
  const uint8_t *low, *high, *mask, *scales, *zeros;
  const int32_t* offsets;  // unstructured: how many entries before each tile, n rows apart
  int octet;               // and the octet in which its entries begin
};
// `piece` times `bytes` further on: one instruction.
__device__ __forceinline__ const uint8_t* further(const void* from, int piece, uint32_t bytes) {
  return static_cast<const uint8_t*>(from) + uint64_t(uint32_t(piece)) * bytes;
}
template <class V>
__device__ __forceinline__ Row row_at(const Weight& w, int row) {
  Row out = {};
  if (w.row_offsets != nullptr)
    out.offsets = w.tile_offsets + row, out.octet = w.row_offsets[row];
  else
    out.low = further(w.low, row, w.row_octets * V::LOW_BYTES);
  if (V::HIGH_BYTES) out.high = further(w.high, row, w.row_octets * V::HIGH_BYTES);
  if (w.mask != nullptr) out.mask = further(w.mask, row, w.mask_octets);
  if (V::CODES) {
    out.scales = further(w.scales, row, w.groups * (w.half_scales ? 2 : 4));
    out.zeros = further(w.zeros, row, w.groups);
    ptx::keep(out.scales), ptx::keep(out.zeros);
  }
  ptx::keep(out.low), ptx::keep(out.high), ptx::keep(out.mask);
  return out;
}
// A scale as it is stored: turned into a number where it is used, since that waits for the memory.
__device__ __forceinline__ uint32_t scale_bits(const Weight& w, const Row& row, int group) {
  const uint8_t* at = further(row.scales, group, w.half_scales ? 2 : 4);
  return w.half_scales ? ptx::load_global<uint16_t>(at) : ptx::load_global<uint32_t>(at);
}
__device__ __forceinline__ float scale_of(bool half_scales, uint32_t bits) {
  return half_scales ? __half2float(__ushort_as_half(uint16_t(bits))) : __uint_as_float(bits);
}
template <class V>
__device__ __forceinline__ uint32_t zero_at(const Weight& w, const Row& row, int group) {
  if (!V::CODES || w.zeros == nullptr) return V::MIDDLE;
  return ptx::load_global<uint8_t>(further(row.zeros, group, 1));
}

// Two stored numbers to two neighbouring inputs of which `bits` (two bits) say who is stored: the rest is zero.
__device__ __forceinline__ uint32_t scatter2(uint32_t stored, uint32_t bits) {
  return ptx::bytes(stored, 0, uint32_t(0x3210104444104444ull >> (16 * bits)));
}
// Up to four stored numbers to the four inputs of a quad.
__device__ __forceinline__ void scatter4(uint32_t stored01, uint32_t stored23, uint32_t bits, uint32_t& out01,
                                         uint32_t& out23) {
  out01 = scatter2(stored01, bits & 3);
  out23 = scatter2(ptx::funnel_right(stored01, stored23, 16 * ptx::ones(bits & 3)), bits >> 2 & 3);
}

// Places of the two bits in each nibble of `quads`: the lower place in bits 0-1, the higher in bits 2-3, as mma.sp
// wants them. With bits m0..m3 of a nibble: lower = m0 ? 0 : m1 ? 1 : 2, higher = m3 ? 3 : m2 ? 2 : 1. An empty nibble
// reads as 2 and 3: places must rise.
__device__ __forceinline__ uint32_t places(uint32_t quads) {
  const uint32_t up = quads << 1, down = quads >> 1, last = ~up & ~quads & 0x22222222u;
  return (down & ~quads & 0x11111111u) | last | ((down | ~quads) & 0x44444444u) |
         ((quads | up | last << 2) & 0x88888888u);
}

// Scales and zeros of rows g and g + 8: one group covers the tile, or each of its four parts of 32 inputs has its own.
template <class V, int PARTS>
struct GroupTile {
  uint32_t scale[2][PARTS], zero[2][PARTS];
  __device__ __forceinline__ void load(const Weight& w, const Row (&rows)[2], int tile) {
    if constexpr (V::CODES) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const int group = group_of(w, PARTS * tile + part);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          scale[r][part] = scale_bits(w, rows[r], group);
          zero[r][part] = zero_at<V>(w, rows[r], group);
        }
      }
    }
  }
};

// PARTS = 1: lane t owns inputs k0 + 32 t .. + 31, octet i of them is inputs k0 + 32 t + 8 i. PARTS = 4, for groups of
// fewer than 128: mma sums over the four lanes, so all must be in one group; octet i is inputs k0 + 32 i + 8 t.
template <class V, int PARTS_>
struct DenseTile {
  using Values = V;
  static constexpr int PARTS = PARTS_, OCTETS = PARTS == 1 ? 4 : 1, SLOT_BYTES = 0;
  static constexpr int LOW_PIECE = 4 * V::LOW_BYTES, HIGH_PIECE = 4 * V::HIGH_BYTES, MASK_PIECE = 0;  // of 32 inputs
  static constexpr bool SPARSE_MMA = false;
  uint32_t low[2][V::LOW_BYTES], high[2][1];
  GroupTile<V, PARTS> groups;

  // To where lane t begins in its row.
  static __device__ __forceinline__ void begin(Row& row, int t) {
    row.low += t * OCTETS * V::LOW_BYTES, row.high += t * OCTETS * V::HIGH_BYTES;
  }
  __device__ __forceinline__ void load(const Weight& w, const Row (&rows)[2], int tile) {
    constexpr int STEP = TILE_K / 8;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint8_t* from = further(rows[r].low, tile, STEP * V::LOW_BYTES);
      const uint8_t* from_high = V::HIGH_BYTES ? further(rows[r].high, tile, STEP * V::HIGH_BYTES) : nullptr;
      if constexpr (PARTS == 1) {
        load_bytes<4 * V::LOW_BYTES>(from, low[r]);
        if constexpr (V::HIGH_BYTES) load_bytes<4 * V::HIGH_BYTES>(from_high, high[r]);
      } else {
        constexpr int WORDS = words_for(V::LOW_BYTES);
#pragma unroll
        for (int i = 0; i < V::LOW_BYTES; ++i) low[r][i] = 0;
        high[r][0] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t piece[WORDS];
          load_bytes<V::LOW_BYTES>(from + 4 * i * V::LOW_BYTES, piece);
          if constexpr (V::LOW_BYTES == 2) {
            low[r][i / 2] |= piece[0] << 16 * (i % 2);
          } else {
#pragma unroll
            for (int j = 0; j < WORDS; ++j) low[r][WORDS * i + j] = piece[j];
          }
          if constexpr (V::HIGH_BYTES) {
            load_bytes<V::HIGH_BYTES>(from_high + 4 * i * V::HIGH_BYTES, piece);
            high[r][0] |= piece[0] << 8 * i;
          }
        }
      }
    }
    groups.load(w, rows, tile);
  }
  __device__ __forceinline__ void octet(const unsigned char*, int i, int, int, uint32_t (&out)[2][4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      V::decode(low[r], high[r], i, V::zero(V::CODES ? groups.zero[r][PARTS == 1 ? 0 : i] : 0), out[r]);
  }
};

// 2:4 on the sparse tensor cores: the stored pairs of a quad are a register of A as they are. Step i takes quads 2i and
// 2i + 1 of each lane's span of 32 inputs, as quads t and t + 4 of the fragment.
template <class V>
struct Sparse24Tile {
  using Values = V;
  static constexpr int PARTS = 1, OCTETS = 2, SLOT_BYTES = 0;
  static constexpr int LOW_PIECE = 2 * V::LOW_BYTES, HIGH_PIECE = 2 * V::HIGH_BYTES, MASK_PIECE = 4;  // of 32 inputs
  static constexpr bool SPARSE_MMA = true;
  uint32_t low[2][V::LOW_BYTES / 2], high[2][1], mask[2][4];
  GroupTile<V, 1> groups;

  static __device__ __forceinline__ void begin(Row& row, int t) {
    row.low += t * OCTETS * V::LOW_BYTES, row.high += t * OCTETS * V::HIGH_BYTES;
  }
  __device__ __forceinline__ void load(const Weight& w, const Row (&rows)[2], int tile) {
    constexpr int STEP = TILE_K / 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      load_bytes<2 * V::LOW_BYTES>(further(rows[r].low, tile, STEP * V::LOW_BYTES), low[r]);
      if constexpr (V::HIGH_BYTES)
        load_bytes<2 * V::HIGH_BYTES>(further(rows[r].high, tile, STEP * V::HIGH_BYTES), high[r]);
      load_bytes<16>(further(rows[r].mask, tile, TILE_K / 8), mask[r]);
    }
    groups.load(w, rows, tile);
  }
  // A of step i: quad 2i of row g, of row g + 8, quad 2i + 1 of row g, of row g + 8.
  __device__ __forceinline__ void fragment(int i, uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t pairs[4];
      V::decode(low[r], high[r], i / 2, V::zero(V::CODES ? groups.zero[r][0] : 0), pairs);
      a[r] = pairs[i % 2 * 2], a[r + 2] = pairs[i % 2 * 2 + 1];
    }
  }
  // This lane's metadata of step 2 (t / 2) + j: lanes t = 0, 1 serve steps 0 and 1 (SELECTOR 0), lanes 2, 3 the others,
  // so every lane makes two words a tile. A word of the mask is the span of one lane, its byte i the quads of step i:
  // the even nibble goes to quad t (lanes t % 2 = 0 give these), the odd to quad t + 4.
  __device__ __forceinline__ uint32_t metadata(int j, int t) const {
    const uint32_t step = t / 2 * 2 + j, shift = t % 2 * 4;
    uint32_t half[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t two = step | (step + 4) << 4;
      const uint32_t all =
          ptx::bytes(ptx::bytes(mask[r][0], mask[r][1], two), ptx::bytes(mask[r][2], mask[r][3], two), 0x5410) >>
              shift &
          0x0F0F0F0Fu;
      half[r] = all | all >> 4;  // nibbles 0, 1 in byte 0 and 2, 3 in byte 2
    }
    return places(ptx::bytes(half[0], half[1], 0x6420));
  }
};

// Stored entries by number, from where a row begins in global memory, or from a copy of a part of it in shared memory.
struct GlobalEntries {
  const void* base;
  __device__ __forceinline__ uint32_t word(int i) const { return static_cast<const uint32_t*>(base)[i]; }
  __device__ __forceinline__ uint32_t half(int i) const { return static_cast<const uint16_t*>(base)[i]; }
};
struct SharedEntries {
  const unsigned char* base;
  __device__ __forceinline__ uint32_t word(int i) const { return ptx::load_shared<uint32_t>(base + 4 * i); }
  __device__ __forceinline__ uint32_t half(int i) const { return ptx::load_shared<uint16_t>(base + 2 * i); }
};

// The eight inputs of one mask byte of an unstructured row; their entries begin with number `first`.
template <class V, class Entries>
__device__ __forceinline__ void load_sparse_octet(const Entries& entries, int first, uint32_t bits,
                                                  typename V::Zero zero, uint32_t (&out)[4]) {
  const uint32_t quad[2] = {bits & 15, bits >> 4};
  const int in_first = ptx::ones(quad[0]), count = ptx::ones(bits);
  if constexpr (V::CODES) {
    static_assert(V::LOW_BYTES == 4 && V::HIGH_BYTES == 0, "unstructured codes are int4");
    // Eight codes from any nibble on: two words, of which the second is read only where it holds some.
    const uint32_t word0 = count ? entries.word(first / 8) : 0;
    const uint32_t word1 = first % 8 + count > 8 ? entries.word(first / 8 + 1) : 0;
    const uint32_t codes = ptx::funnel_right(word0, word1, 4 * (first % 8));
    const uint32_t later = in_first == 4 ? codes >> 16 : codes >> 4 * in_first;
    uint32_t pairs[4];
    V::decode(&codes, nullptr, 0, zero, pairs);
    scatter4(pairs[0], pairs[1], quad[0], out[0], out[1]);
    V::decode(&later, nullptr, 0, zero, pairs);
    scatter4(pairs[0], pairs[1], quad[1], out[2], out[3]);
  } else {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int from = first + (q ? in_first : 0), here = q ? count - in_first : in_first;
      uint32_t stored[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) stored[i] = i < here ? entries.half(from + i) : 0;
      scatter4(stored[0] | stored[1] << 16, stored[2] | stored[3] << 16, quad[q], out[2 * q], out[2 * q + 1]);
    }
  }
}

// Word `word` of a row's 128 bits, and the bits set in the words before it. Selects, not an index: registers have none.
__device__ __forceinline__ uint32_t own_word(const uint32_t (&mask)[4], int word) {
  return word < 2 ? (word == 0 ? mask[0] : mask[1]) : (word == 2 ? mask[2] : mask[3]);
}
__device__ __forceinline__ int ones_before(const uint32_t (&mask)[4], int word) {
  return (word > 0 ? ptx::ones(mask[0]) : 0) + (word > 1 ? ptx::ones(mask[1]) : 0) +
         (word > 2 ? ptx::ones(mask[2]) : 0);
}

// Load sparse, compute dense. The entries of a row in a tile lie together, at most 128 of them from any place on:
// 16-byte pieces that cover them go to a slot of shared memory (EntryCopies). A lane finds its own by counting bits.
template <class V>
struct UnstructuredTile {
  using Values = V;
  static constexpr int PARTS = 1, LOW_PIECE = 0, HIGH_PIECE = 0, MASK_PIECE = 4;
  static constexpr bool SPARSE_MMA = false;
  static constexpr int PIECE = 128 / V::LOW_BYTES;  // entries in 16 bytes
  static constexpr int SLOT_BYTES = TILE_K / 8 * V::LOW_BYTES + 16;
  uint32_t mask[2][4];
  int lead[2];  // entries in the slot before the tile's first: a slot begins at a whole piece
  GroupTile<V, 1> groups;

  // `slots`: of this warp's rows.
  __device__ __forceinline__ void octet(const unsigned char* slots, int i, int g, int t, uint32_t (&out)[2][4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t own = own_word(mask[r], t);
      const int before = ones_before(mask[r], t) + ptx::ones(own & ((1u << 8 * i) - 1));
      load_sparse_octet<V>(SharedEntries{slots + (g + 8 * r) * SLOT_BYTES}, lead[r] + before, own >> 8 * i & 0xFF,
                           V::zero(V::CODES ? groups.zero[r][0] : 0), out[r]);
    }
  }
};

// Copies the entries of 16 rows, tile after tile; two lanes share a row. The offset of the next tile is on its way
// while this one's is used.
template <class Tile>
struct EntryCopies {
  using V = typename Tile::Values;
  int row, entries, start, stop;
  int64_t octet;

  __device__ __forceinline__ int offset(const Weight& w, int tile) const {
    return tile < w.k / TILE_K ? w.tile_offsets[int64_t(tile) * w.n + row] : entries;
  }
  __device__ __forceinline__ void begin(const Weight& w, int first_row, int lane, int tile) {
    row = min(first_row + lane / 2, w.n - 1);
    octet = w.row_offsets[row];
    entries = 8 * int(w.row_offsets[row + 1] - octet);
    start = offset(w, tile), stop = offset(w, tile + 1);
  }
  __device__ __forceinline__ void copy(const Weight& w, int tile, int lane, unsigned char* slots) {
    const int64_t piece = (8 * octet + start) / Tile::PIECE;
    const int pieces = stop > start ? int((8 * octet + stop + Tile::PIECE - 1) / Tile::PIECE - piece) : 0;
    const int64_t end = octet * V::LOW_BYTES + int64_t(entries / 8) * V::LOW_BYTES;  // of the row, in bytes
    for (int i = lane % 2; i < pieces; i += 2) {
      const int64_t from = 16 * (piece + i);
      ptx::copy_async<16>(slots + lane / 2 * Tile::SLOT_BYTES + 16 * i, static_cast<const uint8_t*>(w.low) + from,
                          end - from < 16 ? int(end - from) : 16);
    }
    start = stop, stop = offset(w, tile + 2);
  }
};

// out *= scale for two numbers of type T, rounded once. The products of codes and fp16 scales are exact before that.
template <typename T>
__device__ __forceinline__ void scale_octet(uint32_t (&out)[4], float scale, bool half_scales) {
  if (Number<T>::ONE == 0x3C003C00u && half_scales) {
    const uint32_t both = ptx::pack2<T>(scale, scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = ptx::fma2<T>(out[i], both, 0x80008000u);  // -0 keeps the sign of a zero
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = ptx::pack2<T>(Number<T>::low(out[i]) * scale, Number<T>::high(out[i]) * scale);
  }
}

template <class V>
struct DenseSpan {
  using Values = V;
  static constexpr bool EARLY = true;  // loads of a whole step are sent off before its first use
  uint32_t low[words_for(2 * V::LOW_BYTES)], high[1];

  __device__ __forceinline__ void load(const Weight&, const Row& row, int k0, int g) {
    const int octet = k0 / 8 + 2 * g;
    load_bytes<2 * V::LOW_BYTES>(row.low + octet * V::LOW_BYTES, low);
    if constexpr (V::HIGH_BYTES) load_bytes<2 * V::HIGH_BYTES>(row.high + octet * V::HIGH_BYTES, high);
  }
  __device__ __forceinline__ void octet(const Weight&, int i, int, typename V::Zero zero, uint32_t (&out)[4]) const {
    V::decode(low, high, i, zero, out);
  }
};

template <class V>
struct Sparse24Span {
  using Values = V;
  static constexpr bool EARLY = true;
  uint32_t low[words_for(V::LOW_BYTES)], high[1], mask[1];

  __device__ __forceinline__ void load(const Weight&, const Row& row, int k0, int g) {
    const int octet = k0 / 16 + g;
    load_bytes<V::LOW_BYTES>(row.low + octet * V::LOW_BYTES, low);
    if constexpr (V::HIGH_BYTES) load_bytes<V::HIGH_BYTES>(row.high + octet * V::HIGH_BYTES, high);
    load_bytes<2>(row.mask + k0 / 8 + 2 * g, mask);
  }
  __device__ __forceinline__ void octet(const Weight&, int i, int, typename V::Zero zero, uint32_t (&out)[4]) const {
    uint32_t pairs[4];
    V::decode(low, high, 0, zero, pairs);
    scatter4(pairs[2 * i], 0, mask[0] >> 8 * i & 15, out[0], out[1]);
    scatter4(pairs[2 * i + 1], 0, mask[0] >> (8 * i + 4) & 15, out[2], out[3]);
  }
};

template <class V>
struct UnstructuredSpan {
  using Values = V;
  static constexpr bool EARLY = false;  // its values can only be found when the mask is there
  uint32_t mask[4];
  int position;  // of the tile's first entry

  __device__ __forceinline__ void load(const Weight& w, const Row& row, int k0, int) {
    position = 8 * row.octet + row.offsets[int64_t(k0 / TILE_K) * w.n];
    load_bytes<16>(row.mask + k0 / 8, mask);
  }
  __device__ __forceinline__ void octet(const Weight& w, int i, int g, typename V::Zero zero,
                                        uint32_t (&out)[4]) const {
    const int word = g / 2, shift = g % 2 * 16 + 8 * i;
    const uint32_t own = own_word(mask, word);
    const int before = position + ones_before(mask, word) + ptx::ones(own & ((1u << shift) - 1));
    load_sparse_octet<V>(GlobalEntries{w.low}, before, own >> shift & 0xFF, zero, out);
  }
};

}  // namespace ctp
