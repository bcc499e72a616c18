// Packed weights on their way through shared memory: a warp's 16 rows of W and the 128 inputs of a tile.
//
// Nobody else needs them, and loads into registers would do, if the compiler kept those of several tiles apart: it
// counts them on one scoreboard, so that the first use of one tile waits for all of them (seen in the SASS). Copies are
// waited for by groups, and take no registers while they are under way.
//
// Lane (g, t) copies its span of 32 inputs of rows g and g + 8; each piece has a place of its own, lane after lane.
// What is shorter than four bytes comes with the word that it lies in.
#pragma once

#include "patterns.cuh"

namespace ctp {

template <class Tile>
struct Packed {
  using V = typename Tile::Values;
  static constexpr bool OFFSETS = Tile::SLOT_BYTES > 0;
  static constexpr int LOW = Tile::LOW_PIECE, HIGH = Tile::HIGH_PIECE, MASK = Tile::MASK_PIECE;
  // Bytes of a lane and row, as if they lay together.
  static constexpr int HIGH_AT = LOW, MASK_AT = HIGH_AT + (HIGH ? 4 : 0), OFFSET_AT = MASK_AT + MASK;
  static constexpr int SCALE_AT = OFFSET_AT + (OFFSETS ? 4 : 0), ZERO_AT = SCALE_AT + 4;
  static constexpr int LANE = V::CODES ? ZERO_AT + 4 : SCALE_AT;
  static constexpr int ROW = ALL_LANES * LANE, BYTES = 2 * ROW;
  static_assert(HIGH <= 4 && (LOW <= 16 || LOW % 16 == 0), "pieces that one copy brings");

  Row rows[2];

  // Rows first + g and first + g + 8: beyond the last row they are the last one, and never stored.
  __device__ __forceinline__ void begin(const Weight& w, int first, int g, int t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r] = row_at<V>(w, min(first + g + 8 * r, w.n - 1));
      rows[r].low += t * LOW, rows[r].high += t * HIGH, rows[r].mask += t * MASK;
    }
  }

  // It becomes part of this lane's next group of copies.
  __device__ __forceinline__ void copy(const Weight& w, int tile, int lane, unsigned char* slot) const {
    const int own = V::CODES ? group(w, tile, lane % 4) : 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      unsigned char* const to = slot + r * ROW;
      if constexpr (LOW > 16) {
#pragma unroll
        for (int i = 0; i < LOW / 16; ++i)
          ptx::copy_async<16>(to + 512 * i + 16 * lane, further(rows[r].low, tile, 4 * LOW) + 16 * i, 16);
      } else if constexpr (LOW > 0) {
        ptx::copy_async<LOW>(to + LOW * lane, further(rows[r].low, tile, 4 * LOW), LOW);
      }
      if constexpr (HIGH) word(to, HIGH_AT, lane, further(rows[r].high, tile, 4 * HIGH));
      if constexpr (MASK) word(to, MASK_AT, lane, further(rows[r].mask, tile, 4 * MASK));
      if constexpr (OFFSETS) word(to, OFFSET_AT, lane, rows[r].offsets + int64_t(tile) * w.n);
      if constexpr (V::CODES) {
        word(to, SCALE_AT, lane, further(rows[r].scales, own, w.half_scales ? 2 : 4));
        if (w.zeros != nullptr) word(to, ZERO_AT, lane, further(rows[r].zeros, own, 1));
      }
    }
  }

  // What `copy` brought, once it is there for all lanes.
  __device__ __forceinline__ Tile read(const Weight& w, int tile, int lane, const unsigned char* slot) const {
    const int t = lane % 4, first = lane - t;  // spans 0 to 3 of these rows: lanes `first` to first + 3
    Tile out;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned char* const from = slot + r * ROW;
      if constexpr (Tile::PARTS == 4) {
        out.high[r][0] = 0;
#pragma unroll
        for (int i = 0; i < V::LOW_BYTES; ++i) out.low[r][i] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // octet t of span i
          if constexpr (V::LOW_BYTES == 2) {
            const uint32_t piece = ptx::load_shared<uint16_t>(from + (first + i) * LOW + 2 * t);
            out.low[r][i / 2] |= piece << 16 * (i % 2);
          } else if constexpr (V::LOW_BYTES == 4) {
            out.low[r][i] = ptx::load_shared<uint32_t>(from + (first + i) * LOW + 4 * t);
          } else {
            const uint2 piece = ptx::load_shared<uint2>(from + 512 * (t / 2) + 16 * (first + i) + 8 * (t % 2));
            out.low[r][2 * i] = piece.x, out.low[r][2 * i + 1] = piece.y;
          }
          if constexpr (HIGH)
            out.high[r][0] |= uint32_t(ptx::load_shared<uint8_t>(place(from, HIGH_AT, first + i) + t)) << 8 * i;
        }
      } else {
        if constexpr (LOW >= 16) {
#pragma unroll
          for (int i = 0; i < LOW / 16; ++i) {
            const uint4 v = ptx::load_shared<uint4>(from + 512 * i + 16 * lane);
            out.low[r][4 * i] = v.x, out.low[r][4 * i + 1] = v.y, out.low[r][4 * i + 2] = v.z,
                           out.low[r][4 * i + 3] = v.w;
          }
        } else if constexpr (LOW == 8) {
          const uint2 v = ptx::load_shared<uint2>(from + 8 * lane);
          out.low[r][0] = v.x, out.low[r][1] = v.y;
        } else if constexpr (LOW == 4) {
          out.low[r][0] = ptx::load_shared<uint32_t>(from + 4 * lane);
        }
        if constexpr (HIGH)  // two bytes: a row's begin on eight
          out.high[r][0] = ptx::load_shared<uint32_t>(place(from, HIGH_AT, lane)) >> (HIGH == 2 ? 16 * (t % 2) : 0);
        if constexpr (MASK) {  // of all spans
          const uint4 v = ptx::load_shared<uint4>(place(from, MASK_AT, first));
          out.mask[r][0] = v.x, out.mask[r][1] = v.y, out.mask[r][2] = v.z, out.mask[r][3] = v.w;
        }
        if constexpr (OFFSETS)
          out.lead[r] =
              (8 * (rows[r].octet & 15) + ptx::load_shared<int>(place(from, OFFSET_AT, lane))) & (Tile::PIECE - 1);
      }
      if constexpr (V::CODES) {
#pragma unroll
        for (int part = 0; part < Tile::PARTS; ++part) {
          const int owner = Tile::PARTS == 1 ? lane : first + part, own = group(w, tile, part);
          const uint32_t scale = ptx::load_shared<uint32_t>(place(from, SCALE_AT, owner));
          const uint32_t at = low_bits(rows[r].scales) + 2 * own, zero_at = low_bits(rows[r].zeros) + own;
          out.groups.scale[r][part] = w.half_scales ? scale >> 8 * (at & 2) & 0xFFFF : scale;
          out.groups.zero[r][part] = V::MIDDLE;
          if (w.zeros != nullptr)
            out.groups.zero[r][part] =
                ptx::load_shared<uint32_t>(place(from, ZERO_AT, owner)) >> 8 * (zero_at & 3) & 0xFF;
        }
      }
    }
    return out;
  }

 private:
  static __device__ __forceinline__ int group(const Weight& w, int tile, int part) {
    return group_of(w, Tile::PARTS == 1 ? tile : 4 * tile + part);
  }
  static __device__ __forceinline__ uint32_t low_bits(const uint8_t* pointer) {
    return uint32_t(reinterpret_cast<uintptr_t>(pointer));
  }
  template <typename Bytes>
  static __device__ __forceinline__ Bytes* place(Bytes* row, int at, int lane) {
    return row + ALL_LANES * at + 4 * lane;
  }
  static __device__ __forceinline__ void word(unsigned char* row, int at, int lane, const void* from) {
    const uintptr_t aligned = reinterpret_cast<uintptr_t>(from) & ~uintptr_t(3);
    ptx::copy_async<4>(place(row, at, lane), reinterpret_cast<const void*>(aligned), 4);
  }
};

}  // namespace ctp
