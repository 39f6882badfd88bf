// Vectors of floats and int32 for the instruction set this file is compiled for (AVX-512, AVX2 + FMA, or one lane),
// so that a kernel is written once. Only what the kernels use; every function is one or a few instructions.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common.h"
#if defined(BKD_ISA_avx512) || defined(BKD_ISA_avx2)
#include <immintrin.h>
#endif

#define BKD_INLINE static inline __attribute__((always_inline))

namespace bkd {
namespace BKD_ISA {

using bkd::add;  // the plain numbers' operations, beside the vectors' of the same names
using bkd::div;
using bkd::fma;
using bkd::mul;
using bkd::reciprocal;
using bkd::root;
using bkd::sub;

#if defined(BKD_ISA_avx512)

constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

BKD_INLINE Floats set1(float x) { return _mm512_set1_ps(x); }
BKD_INLINE Ints set1i(int32_t x) { return _mm512_set1_epi32(x); }
BKD_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
BKD_INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
BKD_INLINE Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
BKD_INLINE void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
BKD_INLINE Mask first(int n) { return (Mask)((1u << n) - 1); }  // lanes 0..n-1, 0 <= n <= kLanes
BKD_INLINE Floats load(const float* p, Mask k, Floats fill) { return _mm512_mask_loadu_ps(fill, k, p); }
BKD_INLINE void store(float* p, Mask k, Floats x) { _mm512_mask_storeu_ps(p, k, x); }
BKD_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
BKD_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
BKD_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
BKD_INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
BKD_INLINE Floats root(Floats a) { return _mm512_sqrt_ps(a); }
BKD_INLINE Floats reciprocal(Floats a) { return div(set1(1.0f), a); }
BKD_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
BKD_INLINE Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }     // a b - c
BKD_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }   // c - a b
BKD_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where either is NaN
BKD_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
BKD_INLINE Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
BKD_INLINE Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
BKD_INLINE Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
BKD_INLINE Mask unordered(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
BKD_INLINE Floats select(Mask k, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, k, yes); }
BKD_INLINE bool any(Mask k) { return k != 0; }
BKD_INLINE uint32_t bits(Mask k) { return k; }
BKD_INLINE Mask mask_not(Mask k) { return (Mask)~k; }
BKD_INLINE Mask mask_and(Mask a, Mask b) { return (Mask)(a & b); }
BKD_INLINE Mask mask_or(Mask a, Mask b) { return (Mask)(a | b); }
BKD_INLINE float reduce_add(Floats a) { return _mm512_reduce_add_ps(a); }
BKD_INLINE float reduce_max(Floats a) { return _mm512_reduce_max_ps(a); }
BKD_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
BKD_INLINE Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
BKD_INLINE Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
BKD_INLINE Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
template <int n> BKD_INLINE Ints shift_left(Ints a) { return _mm512_slli_epi32(a, n); }
template <int n> BKD_INLINE Ints shift_right(Ints a) { return _mm512_srai_epi32(a, n); }  // arithmetic
BKD_INLINE Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
BKD_INLINE Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
BKD_INLINE Ints as_ints(Floats a) { return _mm512_castps_si512(a); }
BKD_INLINE Ints round_to_int(Floats a) { return _mm512_cvtps_epi32(a); }  // ties to even; INT32_MIN out of range
BKD_INLINE void store_saturated(int16_t* p, Ints a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(a)); }
BKD_INLINE Floats gather(const float* p, Ints i) { return _mm512_i32gather_ps(i, p, 4); }
BKD_INLINE Floats lookup(const float* p, Ints i) { return _mm512_permutexvar_ps(i, load(p)); }  // 0 <= i < kLanes; reads kLanes
// Four consecutive floats of each of kLanes / 4 rows: quarter q of the register holds those of p + 4 q stride.
BKD_INLINE Floats load_quads(const float* p, int64_t stride) {  // masked broadcasts are loads, not shuffles
  Floats x = _mm512_castps128_ps512(_mm_loadu_ps(p));
  x = _mm512_mask_broadcast_f32x4(x, 0x00F0, _mm_loadu_ps(p + 4 * stride));
  x = _mm512_mask_broadcast_f32x4(x, 0x0F00, _mm_loadu_ps(p + 8 * stride));
  return _mm512_mask_broadcast_f32x4(x, 0xF000, _mm_loadu_ps(p + 12 * stride));
}
BKD_INLINE void store_quads(float* p, int64_t stride, Floats x) {
  _mm_storeu_ps(p, _mm512_castps512_ps128(x));
  _mm_storeu_ps(p + 4 * stride, _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(p + 8 * stride, _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(p + 12 * stride, _mm512_extractf32x4_ps(x, 3));
}
BKD_INLINE void transpose_quads(Floats& a, Floats& b, Floats& c, Floats& d) {  // a 4x4 transpose inside every quarter
  const Floats ab_low = _mm512_unpacklo_ps(a, b), ab_high = _mm512_unpackhi_ps(a, b);
  const Floats cd_low = _mm512_unpacklo_ps(c, d), cd_high = _mm512_unpackhi_ps(c, d);
  a = _mm512_shuffle_ps(ab_low, cd_low, 0x44);
  b = _mm512_shuffle_ps(ab_low, cd_low, 0xEE);
  c = _mm512_shuffle_ps(ab_high, cd_high, 0x44);
  d = _mm512_shuffle_ps(ab_high, cd_high, 0xEE);
}
BKD_INLINE void stream(float* p, Floats x) { _mm512_stream_ps(p, x); }  // past the caches; p is aligned to a vector
BKD_INLINE void stream_fence() { _mm_sfence(); }

#elif defined(BKD_ISA_avx2)

constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;
struct Mask { __m256 m; };  // all bits of a lane set, or none

BKD_INLINE Floats set1(float x) { return _mm256_set1_ps(x); }
BKD_INLINE Ints set1i(int32_t x) { return _mm256_set1_epi32(x); }
BKD_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
BKD_INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
BKD_INLINE Ints load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
BKD_INLINE void store(int32_t* p, Ints x) { _mm256_storeu_si256((__m256i*)p, x); }
BKD_INLINE Mask first(int n) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))};
}
BKD_INLINE Floats select(Mask k, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, k.m); }
BKD_INLINE Floats load(const float* p, Mask k, Floats fill) {
  return select(k, _mm256_maskload_ps(p, _mm256_castps_si256(k.m)), fill);
}
BKD_INLINE void store(float* p, Mask k, Floats x) { _mm256_maskstore_ps(p, _mm256_castps_si256(k.m), x); }
BKD_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
BKD_INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
BKD_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
BKD_INLINE Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
BKD_INLINE Floats root(Floats a) { return _mm256_sqrt_ps(a); }
BKD_INLINE Floats reciprocal(Floats a) { return div(set1(1.0f), a); }
BKD_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
BKD_INLINE Floats fms(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
BKD_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
BKD_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
BKD_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
BKD_INLINE Mask less(Floats a, Floats b) { return {_mm256_cmp_ps(a, b, _CMP_LT_OQ)}; }
BKD_INLINE Mask equal(Floats a, Floats b) { return {_mm256_cmp_ps(a, b, _CMP_EQ_OQ)}; }
BKD_INLINE Mask equal(Ints a, Ints b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b))}; }
BKD_INLINE Mask unordered(Floats a) { return {_mm256_cmp_ps(a, a, _CMP_UNORD_Q)}; }
BKD_INLINE bool any(Mask k) { return _mm256_movemask_ps(k.m) != 0; }
BKD_INLINE uint32_t bits(Mask k) { return (uint32_t)_mm256_movemask_ps(k.m); }
BKD_INLINE Mask mask_not(Mask k) { return {_mm256_xor_ps(k.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
BKD_INLINE Mask mask_and(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
BKD_INLINE Mask mask_or(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
BKD_INLINE float reduce_add(Floats v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
BKD_INLINE float reduce_max(Floats v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
}
BKD_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
BKD_INLINE Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
BKD_INLINE Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
BKD_INLINE Ints bit_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
template <int n> BKD_INLINE Ints shift_left(Ints a) { return _mm256_slli_epi32(a, n); }
template <int n> BKD_INLINE Ints shift_right(Ints a) { return _mm256_srai_epi32(a, n); }
BKD_INLINE Floats to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
BKD_INLINE Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
BKD_INLINE Ints as_ints(Floats a) { return _mm256_castps_si256(a); }
BKD_INLINE Ints round_to_int(Floats a) { return _mm256_cvtps_epi32(a); }
BKD_INLINE void store_saturated(int16_t* p, Ints a) {
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}
BKD_INLINE Floats gather(const float* p, Ints i) { return _mm256_i32gather_ps(p, i, 4); }
BKD_INLINE Floats lookup(const float* p, Ints i) { return _mm256_permutevar8x32_ps(load(p), i); }
// Four consecutive floats of each of kLanes / 4 rows: half h of the register holds those of p + 4 h stride.
BKD_INLINE Floats load_quads(const float* p, int64_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
}
BKD_INLINE void store_quads(float* p, int64_t stride, Floats x) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(x));
  _mm_storeu_ps(p + 4 * stride, _mm256_extractf128_ps(x, 1));
}
BKD_INLINE void transpose_quads(Floats& a, Floats& b, Floats& c, Floats& d) {  // a 4x4 transpose inside every half
  const Floats ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
  const Floats cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
  b = _mm256_shuffle_ps(ab_low, cd_low, 0xEE);
  c = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
  d = _mm256_shuffle_ps(ab_high, cd_high, 0xEE);
}
BKD_INLINE void stream(float* p, Floats x) { _mm256_stream_ps(p, x); }
BKD_INLINE void stream_fence() { _mm_sfence(); }

#else  // one lane: the portable build

constexpr int kLanes = 1;
struct Floats { float x; };
struct Ints { int32_t x; };
using Mask = bool;

BKD_INLINE Floats set1(float x) { return {x}; }
BKD_INLINE Ints set1i(int32_t x) { return {x}; }
BKD_INLINE Floats load(const float* p) { return {*p}; }
BKD_INLINE void store(float* p, Floats x) { *p = x.x; }
BKD_INLINE Ints load(const int32_t* p) { return {*p}; }
BKD_INLINE void store(int32_t* p, Ints x) { *p = x.x; }
BKD_INLINE Mask first(int n) { return n > 0; }
BKD_INLINE Floats load(const float* p, Mask k, Floats fill) { return k ? Floats{*p} : fill; }
BKD_INLINE void store(float* p, Mask k, Floats x) { if (k) *p = x.x; }
BKD_INLINE Floats add(Floats a, Floats b) { return {a.x + b.x}; }
BKD_INLINE Floats sub(Floats a, Floats b) { return {a.x - b.x}; }
BKD_INLINE Floats mul(Floats a, Floats b) { return {a.x * b.x}; }
BKD_INLINE Floats div(Floats a, Floats b) { return {a.x / b.x}; }
BKD_INLINE Floats root(Floats a) { return {bkd::root(a.x)}; }
BKD_INLINE Floats reciprocal(Floats a) { return {1.0f / a.x}; }
BKD_INLINE Floats fma(Floats a, Floats b, Floats c) { return {bkd::fma(a.x, b.x, c.x)}; }
BKD_INLINE Floats fms(Floats a, Floats b, Floats c) { return {bkd::fma(a.x, b.x, -c.x)}; }
BKD_INLINE Floats fnma(Floats a, Floats b, Floats c) { return {bkd::fma(-a.x, b.x, c.x)}; }
BKD_INLINE Floats max(Floats a, Floats b) { return {a.x > b.x ? a.x : b.x}; }
BKD_INLINE Floats min(Floats a, Floats b) { return {a.x < b.x ? a.x : b.x}; }
BKD_INLINE Mask less(Floats a, Floats b) { return a.x < b.x; }
BKD_INLINE Mask equal(Floats a, Floats b) { return a.x == b.x; }
BKD_INLINE Mask equal(Ints a, Ints b) { return a.x == b.x; }
BKD_INLINE Mask unordered(Floats a) { return a.x != a.x; }
BKD_INLINE Floats select(Mask k, Floats yes, Floats no) { return k ? yes : no; }
BKD_INLINE bool any(Mask k) { return k; }
BKD_INLINE uint32_t bits(Mask k) { return k; }
BKD_INLINE Mask mask_not(Mask k) { return !k; }
BKD_INLINE Mask mask_and(Mask a, Mask b) { return a && b; }
BKD_INLINE Mask mask_or(Mask a, Mask b) { return a || b; }
BKD_INLINE float reduce_add(Floats a) { return a.x; }
BKD_INLINE float reduce_max(Floats a) { return a.x; }
BKD_INLINE Ints add(Ints a, Ints b) { return {(int32_t)((uint32_t)a.x + (uint32_t)b.x)}; }
BKD_INLINE Ints sub(Ints a, Ints b) { return {(int32_t)((uint32_t)a.x - (uint32_t)b.x)}; }
BKD_INLINE Ints bit_and(Ints a, Ints b) { return {a.x & b.x}; }
BKD_INLINE Ints bit_or(Ints a, Ints b) { return {a.x | b.x}; }
template <int n> BKD_INLINE Ints shift_left(Ints a) { return {(int32_t)((uint32_t)a.x << n)}; }
template <int n> BKD_INLINE Ints shift_right(Ints a) { return {a.x >> n}; }
BKD_INLINE Floats to_float(Ints a) { return {(float)a.x}; }
BKD_INLINE Floats as_floats(Ints a) { return {as_float((uint32_t)a.x)}; }
BKD_INLINE Ints as_ints(Floats a) { return {(int32_t)as_bits(a.x)}; }
BKD_INLINE Ints round_to_int(Floats a) {
  if (!(a.x > -2147483648.0f && a.x < 2147483648.0f)) return {INT32_MIN};
  return {(int32_t)__builtin_lrintf(a.x)};
}
BKD_INLINE void store_saturated(int16_t* p, Ints a) {
  *p = (int16_t)(a.x < INT16_MIN ? INT16_MIN : a.x > INT16_MAX ? INT16_MAX : a.x);
}
BKD_INLINE Floats gather(const float* p, Ints i) { return {p[i.x]}; }
BKD_INLINE Floats lookup(const float* p, Ints i) { return {p[i.x]}; }
BKD_INLINE void stream(float* p, Floats x) { *p = x.x; }
BKD_INLINE void stream_fence() {}

#endif

BKD_INLINE void prefetch(const float* p) { __builtin_prefetch(p, 0, 3); }            // never faults, wherever p points
BKD_INLINE void prefetch_for_write(const float* p) { __builtin_prefetch(p, 1, 3); }

}  // namespace BKD_ISA
}  // namespace bkd
