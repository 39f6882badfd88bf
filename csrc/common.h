// What every header of element maths needs: host/device markers, explicit fused multiply-add, bit casts.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __FAST_MATH__
#error "bkd_fast: -ffast-math changes the noise and the sketch; build without it"
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define BKD_HD static __host__ __device__ __forceinline__
#else
// always_inline and static: each instruction set's translation unit keeps its own copy, so the linker can never
// hand code compiled for AVX-512 to a machine without it
#define BKD_HD static inline __attribute__((always_inline))
#endif

namespace bkd {

// a * b + c with a single rounding on every backend; contraction of plain expressions is switched off
BKD_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
BKD_HD double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

BKD_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}
BKD_HD uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// the plain operations under the names that csrc/cpu/simd.h gives them for vectors, so that element maths reads the same
template <class T> BKD_HD T add(T a, T b) { return a + b; }
template <class T> BKD_HD T sub(T a, T b) { return a - b; }
template <class T> BKD_HD T mul(T a, T b) { return a * b; }

}  // namespace bkd
