// Eight lanes as two vectors of 16 bytes, by the vector extension of GCC and Clang: what needs no instruction of its
// own.
#pragma once

namespace {

// Two vectors of 16 bytes, not one of 32: GCC keeps a vector that is wider than the registers in memory, and every turn
// of a loop would load and store its sums.
template <class T>
struct Pair {
  typedef T Half __attribute__((vector_size(16)));
  Half lo, hi;
  Pair() = default;
  Pair(Half lo, Half hi) : lo(lo), hi(hi) {}
  Pair(T a, T b, T c, T d, T e, T f, T g, T h) : lo{a, b, c, d}, hi{e, f, g, h} {}
  Pair(T v) : lo{v, v, v, v}, hi(lo) {}
  template <class U>
  explicit Pair(Pair<U> bits) : lo((Half)bits.lo), hi((Half)bits.hi) {}
  T operator[](int i) const { return i < 16 / (int)sizeof(T) ? lo[i] : hi[i - 16 / (int)sizeof(T)]; }
  friend Pair operator+(Pair a, Pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
  friend Pair operator-(Pair a, Pair b) { return {a.lo - b.lo, a.hi - b.hi}; }
  friend Pair operator*(Pair a, Pair b) { return {a.lo * b.lo, a.hi * b.hi}; }
  friend Pair operator&(Pair a, Pair b) { return {a.lo & b.lo, a.hi & b.hi}; }
  friend Pair operator|(Pair a, Pair b) { return {a.lo | b.lo, a.hi | b.hi}; }
  friend Pair operator<<(Pair a, Pair b) { return {a.lo << b.lo, a.hi << b.hi}; }
  friend Pair operator>>(Pair a, Pair b) { return {a.lo >> b.lo, a.hi >> b.hi}; }
  friend Pair operator==(Pair a, Pair b) { return {(Half)(a.lo == b.lo), (Half)(a.hi == b.hi)}; }
  friend Pair operator<(Pair a, Pair b) { return {(Half)(a.lo < b.lo), (Half)(a.hi < b.hi)}; }
};

typedef Pair<float> vf;
typedef Pair<int32_t> vi;
typedef Pair<uint8_t> Bytes;
constexpr int W = 8, kDotSums = 4;

// Halves, not a whole Pair, which GCC would copy to the stack first.
inline vf load(const float* p) { return {peek<vf::Half>(p), peek<vf::Half>(p + 4)}; }
inline vf held_load(const float* p) { return load(p); }
inline void store(float* p, vf v) {
  memcpy(p, &v.lo, sizeof v.lo);
  memcpy(p + 4, &v.hi, sizeof v.hi);
}
inline vf zero() { return vf{}; }
inline vf set1(float v) { return v; }
inline vf repeat(const float* p) { return {peek<vf::Half>(p), peek<vf::Half>(p)}; }
inline vf repeat(const uint16_t* p) {
  typedef uint16_t Four __attribute__((vector_size(8)));
  const vf::Half four = (vf::Half)(__builtin_convertvector(peek<Four>(p), vi::Half) << 16);
  return {four, four};
}
inline vf add(vf a, vf b) { return a + b; }
inline vf mul(vf a, vf b) { return a * b; }

inline vf as_float(vi v) { return (vf)v; }
inline vi lanes() { return {0, 1, 2, 3, 4, 5, 6, 7}; }

inline vf first(vf v, int count) { return as_float((vi)v & (lanes() < count)); }
inline vf keep(vf v, unsigned bits) {
  const vi bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return as_float((vi)v & ((bit & (int32_t)bits) == bit));
}

inline vf to_float(vi v) { return {__builtin_convertvector(v.lo, vf::Half), __builtin_convertvector(v.hi, vf::Half)}; }

template <int S>
inline vf from_fp32(const float* p) {
  return load(p);
}
inline void to_bf16(uint16_t* p, vf v) {
  for (int i = 0; i < 8; ++i) {
    const float number = v[i];
    const uint32_t bits = peek<uint32_t>(&number);
    p[i] = number != number ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

inline vi no_sums() { return vi{}; }
inline vi load_bytes(const void* p) { return {peek<vi::Half>(p), peek<vi::Half>((const char*)p + 16)}; }
inline vi repeat4(const void* p) { return peek<int32_t>(p); }
inline vi masked_or(vi v, vi mask, vi other) { return (v & mask) | other; }

inline vi widen_bytes(const void* p);  // as the processor does it best
inline vi widen_words(const void* p);
template <int S>
inline vf from_bf16(const uint16_t* p) {
  return as_float(widen_words(p) << 16);
}
template <int S>
inline vf codes8(const uint8_t* p) {
  return as_float(widen_bytes(p));
}

}  // namespace
