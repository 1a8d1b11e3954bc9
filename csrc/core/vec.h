// Vectors of floats as wide as the instruction set that a file is compiled for, by the compiler's vector extension: one
// source for every set. Loads and stores convert from and to bfloat16 by integer shifts, so no bfloat16 instruction is
// needed. NOTE: everything lives in a namespace named after the set: two files never share an inline function across
// sets.
#pragma once
#ifndef MPLUG2_ISA
#error "define MPLUG2_ISA as baseline, avx2 or avx512 before including core/vec.h"
#endif
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/bf16.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#define MPLUG2_INLINE inline __attribute__((always_inline))

namespace mplug2::MPLUG2_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecBits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VecByte __attribute__((vector_size(kLanes)));

MPLUG2_INLINE Vec splat(float value) { return value - Vec{}; }  // minus: exact for -0 too, so no addition is left

// ---- loads and stores: a whole vector, or the first `count` lanes of one --------------------------------------------
struct Whole {
  static constexpr int count = kLanes;
};
struct Part {
  int count;
};

MPLUG2_INLINE Vec load(const float* p, Whole) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// Between 16 and 32 bits; __builtin_convertvector goes by halves of a vector, five instructions for one.
MPLUG2_INLINE VecBits lengthen(VecHalf half) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecBits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(half)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(half)));
#else
  return __builtin_convertvector(half, VecBits);
#endif
}
MPLUG2_INLINE VecHalf shorten(VecBits bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecHalf>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, VecHalf);
#endif
}
MPLUG2_INLINE Vec widen(VecHalf half) { return reinterpret_cast<Vec>(lengthen(half) << 16); }
MPLUG2_INLINE Vec load(const Bf16* p, Whole) {
  VecHalf half;
  std::memcpy(&half, p, sizeof half);
  return widen(half);
}
MPLUG2_INLINE void store(float* p, Vec v, Whole) { std::memcpy(p, &v, sizeof v); }
// Round to nearest even; a NaN keeps its sign and becomes quiet (adding the rounding term could carry it to infinity).
MPLUG2_INLINE VecHalf narrow(Vec v) {
  const VecBits bits = reinterpret_cast<VecBits>(v);
  const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return shorten(v == v ? rounded : (bits >> 16) | 0x40);
}
MPLUG2_INLINE void store(Bf16* p, Vec v, Whole) {
  const VecHalf half = narrow(v);
  std::memcpy(p, &half, sizeof half);
}
// Of numbers in [0, 256), cut.
MPLUG2_INLINE void store_bytes(uint8_t* p, Vec v, Whole) {
  const VecInt cut = __builtin_convertvector(v, VecInt);
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(cut));
#else
  const VecByte bytes = __builtin_convertvector(cut, VecByte);
#endif
  std::memcpy(p, &bytes, sizeof bytes);
}
template <class T>
MPLUG2_INLINE Vec load(const T* p, Part part) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, part.count * sizeof(T));
  return load(lanes, Whole{});
}
template <class T>
MPLUG2_INLINE void store(T* p, Vec v, Part part) {
  T lanes[kLanes];
  store(lanes, v, Whole{});
  std::memcpy(p, lanes, part.count * sizeof(T));
}

MPLUG2_INLINE void store_bytes(uint8_t* p, Vec v, Part part) {
  uint8_t lanes[kLanes];
  store_bytes(lanes, v, Whole{});
  std::memcpy(p, lanes, part.count);
}

// f(i, lanes) for i = 0, kLanes, ... below n; `lanes` is Whole, and Part at the end if n is no multiple of kLanes.
template <class F>
MPLUG2_INLINE void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, Whole{});
  if (i < n) f(i, Part{static_cast<int>(n - i)});
}

// Lanes that are no part of the row, set to `value`.
MPLUG2_INLINE Vec keep(Vec v, Whole, float) { return v; }
MPLUG2_INLINE Vec keep(Vec v, Part part, float value) {
  for (int i = part.count; i < kLanes; ++i) v[i] = value;
  return v;
}

// ---- reductions, four lanes at a time -------------------------------------------------------------------------------
typedef float Quad __attribute__((vector_size(16)));

MPLUG2_INLINE float sum(Vec v) {
  Quad quads[kLanes / 4];
  std::memcpy(quads, &v, sizeof v);
  Quad total = quads[0];
  for (int i = 1; i < kLanes / 4; ++i) total += quads[i];
  return (total[0] + total[1]) + (total[2] + total[3]);
}
MPLUG2_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
MPLUG2_INLINE float largest(Vec v) {
  Quad quads[kLanes / 4];
  std::memcpy(quads, &v, sizeof v);
  Quad top = quads[0];
  for (int i = 1; i < kLanes / 4; ++i) top = quads[i] > top ? quads[i] : top;
  const float a = top[0] > top[1] ? top[0] : top[1], b = top[2] > top[3] ? top[2] : top[3];
  return a > b ? a : b;
}

// ---- functions -----------------------------------------------------------------------------------------------------
// e^x for x <= 0 (scores below their maximum), as 2^n e^r with r in +- ln 2 / 2: Taylor to degree 7, relative error
// below 2e-7; 0 below -87.3. A NaN stays one.
MPLUG2_INLINE Vec exp_negative(Vec x) {
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  Vec p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec scaled = reinterpret_cast<Vec>(reinterpret_cast<VecBits>(p) + (reinterpret_cast<VecBits>(shifted) << 23));
  return x < -87.33f ? Vec{} : x == x ? scaled : x;
}
// e^x for any x; infinity above 88.7.
MPLUG2_INLINE Vec exp(Vec x) { return x > 88.72f ? splat(__builtin_inff()) : exp_negative(x); }

MPLUG2_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  // A 14-bit estimate and one Newton step: a third of the time of a division. An estimate of 0 or infinity is final.
  const Vec estimate = reinterpret_cast<Vec>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
  const Vec refined = estimate * (2.0f - x * estimate);
  return refined == refined ? refined : estimate;
#else
  return 1.0f / x;
#endif
}

MPLUG2_INLINE Vec sigmoid(Vec x) { return reciprocal(1.0f + exp(-x)); }

MPLUG2_INLINE Vec quick_gelu(Vec x) {
  const Vec y = x * sigmoid(1.702f * x);
  return x < -60.0f ? Vec{} : y;  // not -inf * 0
}
MPLUG2_INLINE Vec clamp(Vec x, float bound) { return x > bound ? splat(bound) : x < -bound ? splat(-bound) : x; }
MPLUG2_INLINE Vec quick_gelu_slope(Vec x) {
  x = clamp(x, 60.0f);  // constant beyond; not infinity times 0
  const Vec s = sigmoid(1.702f * x);
  return s * (1.0f + 1.702f * x * (1.0f - s));
}

// x P(x^2) / Q(x^2) on [-4, 4], relative error 6.5e-8 (our least-squares fit); +-1 beyond.
MPLUG2_INLINE Vec erf(Vec x) {
  const Vec bounded = clamp(x, 4.0f);
  const Vec u = bounded * bounded;
  Vec p = splat(1.9111029203600083e-08f);
  p = p * u - 1.942322796821827e-06f;
  p = p * u + 1.4728703536093235e-04f;
  p = p * u + 3.990582190454006e-03f;
  p = p * u + 5.152490362524986e-02f;
  p = p * u + 2.0712539553642273e-01f;
  p = p * u + 1.1283791065216064f;
  Vec q = splat(1.0211160406470299e-03f);
  q = q * u + 1.4958084560930729e-02f;
  q = q * u + 1.1797080934047699e-01f;
  q = q * u + 5.16891360282898e-01f;
  q = q * u + 1.0f;
  return bounded * p / q;
}
MPLUG2_INLINE Vec gelu(Vec x) {
  const Vec y = 0.5f * x * (1.0f + erf(x * 0.70710678f));
  return x < -60.0f ? Vec{} : y;
}
MPLUG2_INLINE Vec gelu_slope(Vec x) {
  x = clamp(x, 60.0f);
  return 0.5f * (1.0f + erf(x * 0.70710678f)) + x * 0.39894228f * exp(-0.5f * x * x);
}

}  // namespace mplug2::MPLUG2_ISA
