// What every header of element maths needs: host/device markers, explicit fused multiply-add, bit casts.
#pragma once
#ifdef __CUDACC_RTC__  // NVRTC has no standard headers, and needs none
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#include <cstring>
#endif

#ifdef __FAST_MATH__
#error "bkd_fast: -ffast-math changes the noise and the sketch; build without it"
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define BKD_HD static __host__ __device__ __forceinline__
#define BKD_MEMBER __host__ __device__ __forceinline__  // of a class
#else
// always_inline and static: each instruction set's translation unit keeps its own copy, so the linker can never
// hand code compiled for AVX-512 to a machine without it
#define BKD_HD static inline __attribute__((always_inline))
#define BKD_MEMBER inline __attribute__((always_inline))
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

BKD_HD float absolute(float x) {
#if defined(__CUDA_ARCH__)
  return fabsf(x);
#else
  return __builtin_fabsf(x);
#endif
}

// a * b in 64 bits
BKD_HD uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // the plain expression becomes a 64-bit multiplication, which adds products of zeros
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return (uint64_t)a * b;
#endif
}

// the plain operations under the names that csrc/cpu/simd.h gives them for vectors, so that element maths reads the same
template <class T> BKD_HD T add(T a, T b) { return a + b; }
template <class T> BKD_HD T sub(T a, T b) { return a - b; }
template <class T> BKD_HD T mul(T a, T b) { return a * b; }
BKD_HD float div(float a, float b) { return a / b; }  // to nearest on every backend, as the square roots are
BKD_HD double div(double a, double b) { return a / b; }
BKD_HD float root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
BKD_HD double root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}
BKD_HD float reciprocal(float x) { return 1.0f / x; }
BKD_HD double reciprocal(double x) { return 1.0 / x; }

}  // namespace bkd
