// langevin_chunk(): the SGLD step of a run of elements. float32 runs of whole blocks are updated from registers, inside the
// noise loop; every other dtype, head and tail goes through buffers of noise in the first-level cache. Both apply the element
// maths of langevin.h.
#include "cpu/langevin.h"

#include "../half.h"
#include "../langevin.h"
#include "cpu/normals.h"
#include "cpu/normals_loop.h"

namespace bkd {
namespace BKD_ISA {
namespace {

// What the step does besides the plain update; each combination is compiled apart, so that none pays for another.
enum Prior { kFlat = 0, kCentredAtZero = 1, kCentred = 2, kPriors = 3 };
constexpr int kRoundings = 3;
constexpr int kOfOneRounding = kPriors * 2 * 2, kCombinations = kOfOneRounding * kRoundings;
constexpr int combination(int prior, bool moments, bool check, Rounding rounding) {
  return prior + kPriors * (moments + 2 * (check + 2 * (int)rounding));
}
constexpr int prior_of(int options) { return options % kPriors; }
constexpr bool moments_of(int options) { return options / kPriors % 2; }
constexpr bool check_of(int options) { return options / kPriors / 2 % 2; }
constexpr Rounding rounding_of(int options) { return (Rounding)(options / kOfOneRounding); }
template <class T> constexpr int combinations() { return sizeof(T) == 2 ? kCombinations : kOfOneRounding; }

int combination_of(const LangevinTensor& t, const LangevinStep& s) {
  const Prior prior = s.decay == 0 ? kFlat : t.center ? kCentred : kCentredAtZero;
  return combination(prior, t.mean != nullptr, t.nonfinite != nullptr, s.rounding);
}

template <class T> struct ArithmeticOf { using type = float; };
template <> struct ArithmeticOf<double> { using type = double; };

constexpr int64_t kBuffer = 1024;  // elements: the buffers stay in the first-level cache

// The element's gradient with the prior's share in it.
template <class Real, int options, class T> BKD_INLINE Real full_gradient(Real old, T gradient, const T* center, Real decay) {
  const Real g = widen(gradient);
  if (prior_of(options) == kCentred) return prior_gradient(old, g, (Real)widen(*center), decay);
  if (prior_of(options) == kCentredAtZero) return prior_gradient(old, g, decay);
  return g;
}

// ---- any dtype, any run: noise in a buffer, one element at a time (the compiler vectorises the loop) ----
template <class T, int options>
void update_buffered(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end) {
  using Real = typename ArithmeticOf<T>::type;
  constexpr bool has_master = rounding_of(options) == Rounding::master;
  const Real minus_lr = (Real)-step.lr, decay = (Real)step.decay, sigma = (Real)step.sigma;
  const Real inverse_count = (Real)step.inverse_count;
  const Stream stream{step.seed, step.step, step.chain, tensor.parameter, (uint32_t)Tag::langevin};
  T* __restrict theta = (T*)tensor.theta;
  const T* __restrict gradient = (const T*)tensor.gradient;
  const T* __restrict center = (const T*)tensor.center;
  Real* __restrict mean = (Real*)tensor.mean;
  Real* __restrict m2 = (Real*)tensor.m2;
  float* __restrict master = tensor.master;
  alignas(64) float noise[kBuffer];
  uint32_t bad = 0;
  for (int64_t from = begin; from < end; from += kBuffer) {
    const int64_t n = end - from < kBuffer ? end - from : kBuffer;
    if (step.sigma != 0) normals(noise, n, stream, tensor.first_element + (uint64_t)from);
    else memset(noise, 0, (size_t)n * sizeof(float));
#pragma GCC ivdep  // nothing overlaps: more pointers than the compiler would check
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = from + k;
      const Real old = has_master ? (Real)master[i] : (Real)widen(theta[i]);
      const Real g = full_gradient<Real, options>(old, gradient[i], center + i, decay);
      const bool finite = !check_of(options) || is_finite(gradient[i]);
      Real updated = sgld_drift(old, g, minus_lr);
      if (step.sigma != 0) updated = fma(sigma, (Real)noise[k], updated);
      if (check_of(options)) {
        updated = finite ? updated : old;
        bad |= !finite;
      }
      narrow(updated, theta[i]);
      if (has_master) master[i] = (float)updated;
      if (moments_of(options)) {
        const Real draw = has_master ? updated : (Real)widen(theta[i]);
        const Moments<Real> m = add_draw(Moments<Real>{mean[i], m2[i]}, draw, inverse_count);
        mean[i] = m.mean;
        m2[i] = m.m2;
      }
    }
  }
  if (check_of(options) && bad) __atomic_store_n(tensor.nonfinite, (uint8_t)1, __ATOMIC_RELAXED);
}

// ---- 16-bit types, stochastic rounding: drift, noise and rounding in turn over buffers. The look-up of the noise's size is
// spelled in vectors, the compiler vectorises the others. ----

// exponent_field() of half.h; of any lane at all the result is an index of the table
BKD_INLINE Ints exponent_field(Floats x, BFloat16) { return bit_and(shift_right<23>(as_ints(x)), set1i(0xFF)); }
BKD_INLINE Ints exponent_field(Floats x, Half) {
  const Floats magnitude = as_floats(bit_and(as_ints(x), set1i(0x7FFFFFFF)));
  const Floats clamped = min(max(magnitude, set1(0x1p-15f)), set1(0x1p15f));  // fields 0 and 30; a NaN becomes 2^-15
  return sub(shift_right<23>(as_ints(clamped)), set1i(112));
}

template <class T, int options>
void update_stochastically(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end) {
  const float minus_lr = (float)-step.lr, decay = (float)step.decay, inverse_count = (float)step.inverse_count;
  const Stream stream{step.seed, step.step, step.chain, tensor.parameter, (uint32_t)Tag::langevin};
  const Stream rounding_stream{step.seed, step.step, step.chain, tensor.parameter, (uint32_t)Tag::stochastic_rounding};
  T* __restrict theta = (T*)tensor.theta;
  const T* __restrict gradient = (const T*)tensor.gradient;
  const T* __restrict center = (const T*)tensor.center;
  float* __restrict mean = (float*)tensor.mean;
  float* __restrict m2 = (float*)tensor.m2;
  alignas(64) float updated[kBuffer] = {}, noise[kBuffer] = {};
  alignas(64) int32_t random[kBuffer];
  uint32_t bad = 0;
  for (int64_t from = begin; from < end; from += kBuffer) {
    const int64_t n = end - from < kBuffer ? end - from : kBuffer;
    normals(noise, n, stream, tensor.first_element + (uint64_t)from);
    words(random, n, rounding_stream, tensor.first_element + (uint64_t)from);
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = from + k;
      const float old = widen(theta[i]);
      const float drifted = sgld_drift(old, full_gradient<float, options>(old, gradient[i], center + i, decay), minus_lr);
      const bool finite = !check_of(options) || is_finite(gradient[i]);
      updated[k] = finite ? drifted : old;
      noise[k] = finite ? noise[k] : -0.0f;  // which leaves old as it is: x - 0 = x, for x = -0 too
      bad |= !finite;
    }
    for (int64_t k = 0; k < n; k += kLanes) {  // past n are the zeros, or values of an earlier round
      const Floats drifted = load(updated + k);
      store(updated + k, fma(gather(step.noise_table, exponent_field(drifted, T{})), load(noise + k), drifted));
    }
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = from + k;
      round_stochastically(updated[k], (uint32_t)random[k] >> 16, theta[i]);
      if (moments_of(options)) {
        const Moments<float> m = add_draw(Moments<float>{mean[i], m2[i]}, widen(theta[i]), inverse_count);
        mean[i] = m.mean;
        m2[i] = m.m2;
      }
    }
  }
  if (check_of(options) && bad) __atomic_store_n(tensor.nonfinite, (uint8_t)1, __ATOMIC_RELAXED);
}

// ---- float32, whole runs of the noise loop, sigma > 0: everything in registers ----
template <int options>
void update_fused(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t count) {
  const Floats minus_lr = set1((float)-step.lr), decay = set1((float)step.decay), sigma = set1((float)step.sigma);
  const Floats inverse_count = set1((float)step.inverse_count);
  const Stream stream{step.seed, step.step, step.chain, tensor.parameter, (uint32_t)Tag::langevin};
  float* theta = (float*)tensor.theta + begin;
  const float* gradient = (const float*)tensor.gradient + begin;
  const float* center = (const float*)tensor.center + begin;
  float* mean = (float*)tensor.mean + begin;
  float* m2 = (float*)tensor.m2 + begin;
  Mask bad = first(0);
  constexpr int64_t kAhead = 384;  // floats: the loop computes for longer than the hardware prefetcher looks ahead
  each_normal(count, stream, (tensor.first_element + (uint64_t)begin) >> 2,
              [&](int64_t i, Floats noise) __attribute__((always_inline)) {
    if (kLanes == 16 || i % 16 == 0) {
      __builtin_prefetch(theta + i + kAhead, 1);
      __builtin_prefetch(gradient + i + kAhead, 0);
    }
    const Floats old = load(theta + i), raw = load(gradient + i);
    Floats g = raw;
    if (prior_of(options) == kCentred) g = prior_gradient(old, g, load(center + i), decay);
    else if (prior_of(options) == kCentredAtZero) g = prior_gradient(old, g, decay);
    Floats updated = sgld(old, g, noise, minus_lr, sigma);
    if (check_of(options)) {
      const Mask nonfinite = unordered(sub(raw, raw));
      updated = select(nonfinite, old, updated);
      bad = mask_or(bad, nonfinite);
    }
    store(theta + i, updated);
    if (moments_of(options)) {
      const Moments<Floats> m = add_draw(Moments<Floats>{load(mean + i), load(m2 + i)}, updated, inverse_count);
      store(mean + i, m.mean);
      store(m2 + i, m.m2);
    }
  });
  if (check_of(options) && any(bad)) __atomic_store_n(tensor.nonfinite, (uint8_t)1, __ATOMIC_RELAXED);
}

using Update = void (*)(const LangevinTensor&, const LangevinStep&, int64_t, int64_t);
struct UpdateTable { Update of[kCombinations]; };

// the functions for every combination of options that a type has, in order
template <class T, int options = combinations<T>() - 1> struct Buffered {
  static void fill(UpdateTable& table) {
    if constexpr (rounding_of(options) == Rounding::stochastic) table.of[options] = update_stochastically<T, options>;
    else table.of[options] = update_buffered<T, options>;
    Buffered<T, options - 1>::fill(table);
  }
};
template <class T> struct Buffered<T, -1> { static void fill(UpdateTable&) {} };
template <int options = combinations<float>() - 1> struct Fused {
  static void fill(UpdateTable& table) {
    table.of[options] = update_fused<options>;
    Fused<options - 1>::fill(table);
  }
};
template <> struct Fused<-1> { static void fill(UpdateTable&) {} };

template <class F> UpdateTable make_table() {
  UpdateTable table;
  F::fill(table);
  return table;
}

void float32_chunk(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end) {
  static const UpdateTable fused = make_table<Fused<>>(), buffered = make_table<Buffered<float>>();
  const int options = combination_of(tensor, step);
  const uint64_t from = tensor.first_element + (uint64_t)begin, to = tensor.first_element + (uint64_t)end;
  const int64_t head = (int64_t)(-from & 3);  // elements before the first whole block
  const int64_t whole = end - begin - head > 0 ? (end - begin - head) / kNoiseRun * kNoiseRun : 0;
  const bool wraps = from >> 34 != to >> 34;  // the low word of the block number wraps inside
  if (step.sigma == 0 || whole == 0 || wraps) return buffered.of[options](tensor, step, begin, end);
  if (head) buffered.of[options](tensor, step, begin, begin + head);
  fused.of[options](tensor, step, begin + head, whole);
  if (begin + head + whole < end) buffered.of[options](tensor, step, begin + head + whole, end);
}

template <class T> bool any_nonfinite(const void* data, int64_t count) {
  const T* x = (const T*)data;
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= !is_finite(x[i]);
  return bad != 0;
}

}  // namespace

void langevin_chunk(const LangevinTensor& tensor, const LangevinStep& step, int64_t begin, int64_t end) {
  static const UpdateTable float64 = make_table<Buffered<double>>(), bfloat16 = make_table<Buffered<BFloat16>>(),
                           float16 = make_table<Buffered<Half>>();
  const int options = combination_of(tensor, step);
  switch (step.storage) {
    case Storage::float32: return float32_chunk(tensor, step, begin, end);
    case Storage::float64: return float64.of[options](tensor, step, begin, end);
    case Storage::bfloat16: return bfloat16.of[options](tensor, step, begin, end);
    case Storage::float16: return float16.of[options](tensor, step, begin, end);
  }
}

bool has_nonfinite(const void* data, int64_t count, Storage storage) {
  switch (storage) {
    case Storage::float32: return any_nonfinite<float>(data, count);
    case Storage::float64: return any_nonfinite<double>(data, count);
    case Storage::bfloat16: return any_nonfinite<BFloat16>(data, count);
    case Storage::float16: return any_nonfinite<Half>(data, count);
  }
  return false;
}

}  // namespace BKD_ISA
}  // namespace bkd
