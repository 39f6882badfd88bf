// The noise of noise.h, vectorised, as a loop that hands each vector of normals to a sink: a store, or a sampler's update.
// The same bits for every instruction set.
//
// A vector register holds Philox counters in its 64-bit lanes, packed as X = c0 | c2 << 32 and Y = c1 | c3 << 32. A round is
// then two wide multiplies, a shift, two lane merges and one xor, and after the last round X *is* the vector of
// radius words (elements 0,1 of a block in even lanes, elements 2,3 in odd lanes) and Y the vector of angle words.
// c1, c2, c3 are the same for a whole run of blocks, so the first round has one multiply and the second has two of which
// one is uniform; both are folded into `Rounds`.
#pragma once
#include "../noise.h"
#include "cpu/simd.h"

namespace bkd {
namespace BKD_ISA {

#if defined(BKD_ISA_avx512) || defined(BKD_ISA_avx2)

constexpr int kGroups = 2;  // registers of each kind in flight: with more they spill, with fewer they wait for the multiplier

#if defined(BKD_ISA_avx512)
BKD_INLINE Ints multiply(Ints a, Ints b) { return _mm512_mul_epu32(a, b); }
BKD_INLINE Ints add64(Ints a, Ints b) { return _mm512_add_epi64(a, b); }
BKD_INLINE Ints set64(uint64_t x) { return _mm512_set1_epi64((long long)x); }
BKD_INLINE Ints high_to_low(Ints a) { return _mm512_srli_epi64(a, 32); }
BKD_INLINE Ints bit_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
BKD_INLINE Ints bit_xor(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// even lanes: the low (high) halves of a, odd lanes: those of b
BKD_INLINE Ints merge_low(Ints a, Ints b) {
  return as_ints(_mm512_mask_moveldup_ps(as_floats(a), 0xAAAA, as_floats(b)));
}
BKD_INLINE Ints merge_high(Ints a, Ints b) {
  return as_ints(_mm512_mask_movehdup_ps(as_floats(b), 0x5555, as_floats(a)));
}
BKD_INLINE Ints even_of(Ints a) { return _mm512_maskz_mov_epi32(0x5555, a); }
// even lanes: the high halves of b, odd lanes: the low halves of a
BKD_INLINE Ints cross(Ints a, Ints b) {
  return _mm512_shuffle_epi32(_mm512_mask_mov_epi32(a, 0xAAAA, b), (_MM_PERM_ENUM)0xB1);
}
BKD_INLINE Floats at_least_quarter(Floats x) { return _mm512_range_ps(x, set1(kSmallestM), 0x0B); }  // max(|x|, 1/4)
BKD_INLINE Floats mantissa(Ints j) {  // (j & 0x7FFFFF) | 0x3F800000
  return as_floats(_mm512_ternarylogic_epi32(j, set1i(0x007FFFFF), set1i(0x3F800000), 0xEA));
}
BKD_INLINE Floats copy_sign_bit(Floats x, Ints sign) {
  return as_floats(_mm512_ternarylogic_epi32(as_ints(x), sign, set1i((int32_t)0x80000000), 0xF8));
}
BKD_INLINE Floats interleave_low(Floats a, Floats b) { return _mm512_unpacklo_ps(a, b); }
BKD_INLINE Floats interleave_high(Floats a, Floats b) { return _mm512_unpackhi_ps(a, b); }
// which block each 64-bit lane holds, so that interleave_low/high give elements in memory order
BKD_INLINE Ints block_order() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
#else
BKD_INLINE Ints multiply(Ints a, Ints b) { return _mm256_mul_epu32(a, b); }
BKD_INLINE Ints add64(Ints a, Ints b) { return _mm256_add_epi64(a, b); }
BKD_INLINE Ints set64(uint64_t x) { return _mm256_set1_epi64x((long long)x); }
BKD_INLINE Ints high_to_low(Ints a) { return _mm256_srli_epi64(a, 32); }
BKD_INLINE Ints bit_xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
BKD_INLINE Ints bit_xor(Ints a, Ints b, Ints c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
BKD_INLINE Ints merge_low(Ints a, Ints b) {
  return as_ints(_mm256_blend_ps(as_floats(a), _mm256_moveldup_ps(as_floats(b)), 0xAA));
}
BKD_INLINE Ints merge_high(Ints a, Ints b) {
  return as_ints(_mm256_blend_ps(as_floats(b), _mm256_movehdup_ps(as_floats(a)), 0x55));
}
BKD_INLINE Ints even_of(Ints a) { return _mm256_blend_epi32(a, _mm256_setzero_si256(), 0xAA); }
BKD_INLINE Ints cross(Ints a, Ints b) { return _mm256_shuffle_epi32(_mm256_blend_epi32(a, b, 0xAA), 0xB1); }
BKD_INLINE Floats at_least_quarter(Floats x) {
  return _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), set1(kSmallestM));
}
BKD_INLINE Floats mantissa(Ints j) {
  return as_floats(_mm256_or_si256(_mm256_and_si256(j, set1i(0x007FFFFF)), set1i(0x3F800000)));
}
BKD_INLINE Floats copy_sign_bit(Floats x, Ints sign) {
  return _mm256_or_ps(x, _mm256_and_ps(_mm256_set1_ps(-0.0f), as_floats(sign)));
}
BKD_INLINE Floats interleave_low(Floats a, Floats b) { return _mm256_unpacklo_ps(a, b); }
BKD_INLINE Floats interleave_high(Floats a, Floats b) { return _mm256_unpackhi_ps(a, b); }
BKD_INLINE Ints block_order() { return _mm256_set_epi64x(3, 1, 2, 0); }
#endif

constexpr int kBlocks = kLanes / 2;                    // blocks in a register, one per 64-bit lane
constexpr int64_t kNoiseRun = 2 * kLanes * kGroups;    // elements that each_normal makes at a time

// The uniform half of a run: the key schedule, with the words of rounds 1-3 that do not depend on the block folded in.
struct Rounds {
  alignas(64) Ints key[kPhiloxRounds];  // xored into X, round by round

  Rounds(const Stream& s, uint64_t block) {
    const Words c = counter_of(s, block);
    uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
    k0[0] = (uint32_t)s.seed;
    k1[0] = (uint32_t)(s.seed >> 32);
    for (int r = 1; r < kPhiloxRounds; ++r) {
      k0[r] = k0[r - 1] + kPhiloxW0;
      k1[r] = k1[r - 1] + kPhiloxW1;
    }
    const uint64_t p1 = (uint64_t)kPhiloxM1 * c.w[2];                      // round 1's second product: c2 is uniform
    const uint32_t c0 = (uint32_t)(p1 >> 32) ^ c.w[1] ^ k0[0];             // so c0 after round 1 is uniform
    const uint64_t p0 = (uint64_t)kPhiloxM0 * c0;                          // and round 2's first product with it
    key[0] = set64(c.w[3] ^ k1[0]);                                        // enters c2 in round 1
    key[1] = pack((uint32_t)p1 ^ k0[1], (uint32_t)(p0 >> 32) ^ k1[1]);         // enters c0 and c2 in round 2
    key[2] = pack(k0[2], (uint32_t)p0 ^ k1[2]);                            // c3 after round 2 is uniform
    for (int r = 3; r < kPhiloxRounds; ++r) key[r] = pack(k0[r], k1[r]);
  }
  static Ints pack(uint32_t even, uint32_t odd) { return set64((uint64_t)odd << 32 | even); }
};

#define BKD_EACH_GROUP _Pragma("GCC unroll 8") for (int g = 0; g < kGroups; ++g)

// Calls sink(i, z) for i = 0, kLanes, 2 kLanes ... count - kLanes with z the noise of elements 4 first_block + i ...
// count is a multiple of kNoiseRun, and the run does not cross a multiple of 2^32 blocks.
//
// The loop is software-pipelined by hand: while one group of blocks goes through Box-Muller (fused multiply-adds, the square
// root), the next goes through Philox (integer multiplies); their instructions alternate.
template <class Sink>
BKD_INLINE void each_normal(int64_t count, const Stream& stream, uint64_t first_block, Sink&& sink) {
  Rounds rounds(stream, first_block);
  __asm__ volatile("" : "+m"(rounds));  // keep the schedule in memory: as operands it costs nothing, in registers it spills
  const Ints m0 = set64(kPhiloxM0), m1 = set64(kPhiloxM1), m0_step = set64((uint64_t)kBlocks * kPhiloxM0);
  // low block word times M0, carried along by addition; runs never cross a multiple of 2^32 blocks
  Ints product = multiply(add64(block_order(), set64((uint32_t)first_block)), m0);
  Ints x[kGroups], y[kGroups], radius_word[kGroups], angle_word[kGroups];

#define BKD_FIRST_ROUNDS                                                                \
  BKD_EACH_GROUP {                                                                      \
    const Ints p0 = product;                                                            \
    product = add64(product, m0_step);                                                  \
    const Ints p1 = multiply(bit_xor(high_to_low(p0), rounds.key[0]), m1);              \
    x[g] = bit_xor(cross(p0, p1), rounds.key[1]);                                \
    y[g] = even_of(p1);                                                                 \
  }
#define BKD_ROUND(r)                                                                    \
  BKD_EACH_GROUP {                                                                      \
    const Ints p0 = multiply(x[g], m0), p1 = multiply(high_to_low(x[g]), m1);           \
    x[g] = bit_xor(merge_high(p1, p0), y[g], rounds.key[r]);                            \
    y[g] = merge_low(p1, p0);                                                           \
  }
#define BKD_HORNER(q, t, k) BKD_EACH_GROUP q[g] = fma(q[g], t[g], set1(k));

  BKD_FIRST_ROUNDS
  BKD_ROUND(2) BKD_ROUND(3) BKD_ROUND(4) BKD_ROUND(5) BKD_ROUND(6) BKD_ROUND(7) BKD_ROUND(8) BKD_ROUND(9)
  for (int64_t i = 0; i < count; i += 2 * kLanes * kGroups) {
    Floats w[kGroups], v[kGroups], distance[kGroups], t[kGroups], q[kGroups], s[kGroups], c[kGroups];
    Ints j[kGroups];
    BKD_EACH_GROUP {
      radius_word[g] = x[g];
      angle_word[g] = y[g];
    }
    BKD_FIRST_ROUNDS
    BKD_EACH_GROUP j[g] = sub(set1i(0x4F000000), as_ints(at_least_quarter(to_float(radius_word[g]))));
    BKD_ROUND(2)
    BKD_EACH_GROUP {
      distance[g] = to_float(j[g]);
      t[g] = sub(mantissa(j[g]), set1(1.0f));
      q[g] = fma(set1(kRadiusQ[6]), t[g], set1(kRadiusQ[5]));
    }
    BKD_ROUND(3)
    BKD_HORNER(q, t, kRadiusQ[4]) BKD_HORNER(q, t, kRadiusQ[3])
    BKD_ROUND(4)
    BKD_HORNER(q, t, kRadiusQ[2]) BKD_HORNER(q, t, kRadiusQ[1])
    BKD_ROUND(5)
    BKD_HORNER(q, t, kRadiusQ[0]) BKD_HORNER(q, t, kRadiusEps)
    BKD_EACH_GROUP q[g] = root(fma(distance[g], set1(kRadiusA), q[g]));
    BKD_ROUND(6)
    BKD_EACH_GROUP {
      w[g] = mul(to_float(angle_word[g]), set1(0x1p-32f));
      v[g] = mul(w[g], w[g]);
      s[g] = fma(set1(kSin[4]), v[g], set1(kSin[3]));
      c[g] = fma(set1(kCos[4]), v[g], set1(kCos[3]));
    }
    BKD_ROUND(7)
    BKD_HORNER(s, v, kSin[2]) BKD_HORNER(c, v, kCos[2])
    BKD_ROUND(8)
    BKD_HORNER(s, v, kSin[1]) BKD_HORNER(c, v, kCos[1]) BKD_HORNER(s, v, kSin[0]) BKD_HORNER(c, v, kCos[0])
    BKD_ROUND(9)
    BKD_EACH_GROUP {
      const Floats signed_radius = copy_sign_bit(q[g], radius_word[g]);
      const Floats z0 = mul(signed_radius, c[g]), z1 = mul(mul(signed_radius, w[g]), s[g]);
      const int64_t at = i + 2 * kLanes * g;
      sink(at, interleave_low(z0, z1));
      sink(at + kLanes, interleave_high(z0, z1));
    }
  }
}

// The same for sink(i, w) with w the words of elements 4 first_block + i ... themselves, one for each element.
template <class Sink>
BKD_INLINE void each_word(int64_t count, const Stream& stream, uint64_t first_block, Sink&& sink) {
  Rounds rounds(stream, first_block);
  __asm__ volatile("" : "+m"(rounds));
  const Ints m0 = set64(kPhiloxM0), m1 = set64(kPhiloxM1), m0_step = set64((uint64_t)kBlocks * kPhiloxM0);
  Ints product = multiply(add64(block_order(), set64((uint32_t)first_block)), m0);
  Ints x[kGroups], y[kGroups];
  for (int64_t i = 0; i < count; i += 2 * kLanes * kGroups) {
    BKD_FIRST_ROUNDS
    BKD_ROUND(2) BKD_ROUND(3) BKD_ROUND(4) BKD_ROUND(5) BKD_ROUND(6) BKD_ROUND(7) BKD_ROUND(8) BKD_ROUND(9)
    BKD_EACH_GROUP {
      const Floats even = as_floats(x[g]), odd = as_floats(y[g]);  // words 0, 2 and words 1, 3 of each block
      const int64_t at = i + 2 * kLanes * g;
      sink(at, as_ints(interleave_low(even, odd)));
      sink(at + kLanes, as_ints(interleave_high(even, odd)));
    }
  }
}

#else

constexpr int64_t kNoiseRun = 4;

template <class Sink>
BKD_INLINE void each_normal(int64_t count, const Stream& stream, uint64_t first_block, Sink&& sink) {
  for (int64_t i = 0; i < count; i += 4) {
    const Words words = words_of(stream, first_block + (uint64_t)(i / 4));
    const Pair low = normals_of(words.w[0], words.w[1]), high = normals_of(words.w[2], words.w[3]);
    sink(i, Floats{low.z0});
    sink(i + 1, Floats{low.z1});
    sink(i + 2, Floats{high.z0});
    sink(i + 3, Floats{high.z1});
  }
}

template <class Sink>
BKD_INLINE void each_word(int64_t count, const Stream& stream, uint64_t first_block, Sink&& sink) {
  for (int64_t i = 0; i < count; i += 4) {
    const Words words = words_of(stream, first_block + (uint64_t)(i / 4));
    for (int k = 0; k < 4; ++k) sink(i + k, Ints{(int32_t)words.w[k]});
  }
}

#endif

#undef BKD_EACH_GROUP
#undef BKD_FIRST_ROUNDS
#undef BKD_ROUND
#undef BKD_HORNER

}  // namespace BKD_ISA
}  // namespace bkd
