// The Langevin step of many tensors and chains in one launch, by any rule: one thread block per chunk of the launch table
// (kernels/table.py).
//
// In whole tiles a thread takes eight elements of each array (four of float64, and of float32 with moments or state) by 16-byte
// accesses, all loads before the arithmetic, so that bytes are on their way while Philox runs. What the ends of a tensor and odd
// addresses leave goes in blocks of four elements, one access each.
//
// Budget on sm_90 in bytes and instructions per element, the check for non-finite gradients included, in at most 64 registers:
//   float32                12, 35    with a prior's mean 16, 43    and running moments 32, 56    (118 last as long as 12 bytes)
//   bfloat16, nearest       6, 39    stochastic           6, 66    float32 master      12, 37    (59 as long as 6, at 3 TB/s)
// and of the other rules, float32: sghmc 20, 51    baoab 20, 52    sgnht 28, 58    rmsprop 20, 97    adam 28, 102
// tests/kernels/variants_langevin_cuda.py holds it.
#include "../half.h"
#include "../langevin.h"
#include "../noise.h"

namespace bkd {

// How a 16-bit parameter gets from float32 arithmetic to memory (langevin.h). Wider ones are stored as they are: nearest.
enum Rounding { kNearest, kStochastic, kMaster };

// A row of the launch table: addresses (0: there is none), the number of elements, the first one's index in its parameter.
template <class T, class Real> struct Row {
  T* theta;
  const T* gradient;
  const T* center;
  Real* mean;
  Real* m2;
  float* master;
  Real* first;
  Real* second;
  int64_t count;
  int64_t first_element;
};

struct Label { int32_t parameter, chain, tensor, unused; };
struct Chunk { int32_t row, number; };

template <class T> struct Format { using Real = float; static constexpr int kFields = 0; };
template <> struct Format<double> { using Real = double; static constexpr int kFields = 0; };
template <> struct Format<BFloat16> { using Real = float; static constexpr int kFields = 256; };
template <> struct Format<Half> { using Real = float; static constexpr int kFields = 32; };
template <class T> using RealOf = typename Format<T>::Real;

constexpr int kThreads = 128;
// 64 registers a thread; more where neighbours carry moments or state, or a root and a quotient of each: those spilled otherwise
template <class T> constexpr int blocks_per_processor(Rule rule, bool moments) {
  const int carried = 2 * moments + states_of(rule);
  if (sizeof(T) == 2) return carried == 0 ? 8 : carried == 4 ? 4 : carried == 2 && moments ? 6 : 5;
  return carried <= 2 && rule != Rule::rmsprop ? 8 : sizeof(T) == 8 ? 5 : 6;
}

// neighbours that a thread takes together, so that an access has 16 bytes; how many such runs of a tile it takes
template <class T> constexpr int kRun = sizeof(T) == 2 ? 8 : 4;
template <class T, bool plain> constexpr int kRuns = sizeof(T) == 4 && plain ? 2 : 1;

// What is the same for every element of a row, beside the rule's Numbers.
template <class Real> struct Shared {
  Real decay, inverse_count;
  uint32_t kept;  // elements whose gradient has these exponent_bits keep their value
};

constexpr uint32_t kNoExponent = 1;  // no number has such exponent_bits

// the exponent where it stands in the (upper) word
__device__ __forceinline__ uint32_t exponent_bits(float x) { return as_bits(x) & 0x7F800000u; }
__device__ __forceinline__ uint32_t exponent_bits(double x) { return (uint32_t)__double2hiint(x) & 0x7FF00000u; }
template <class Real> constexpr uint32_t kNonfiniteExponent = sizeof(Real) == 8 ? 0x7FF00000u : 0x7F800000u;

// ---- memory ----
// `whole` runs move by 16-byte accesses; of others, elements [begin, end) exist and move one by one.
struct Present { int begin, end; };

// an address that comes from memory may be anything for all the compiler knows
template <class T> __device__ __forceinline__ T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

__device__ __forceinline__ uint4 load_16_bytes(const void* from) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
  return x;
}
__device__ __forceinline__ void store_16_bytes(void* to, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

template <bool whole, class T, int n> __device__ __forceinline__ void load(T (&to)[n], const T* from, Present p) {
  if constexpr (whole) {
#pragma unroll
    for (int k = 0; k < n; k += 16 / sizeof(T)) {
      const uint4 bits = load_16_bytes(from + k);
      memcpy(&to[k], &bits, sizeof bits);
    }
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k) to[k] = p.begin <= k && k < p.end ? *global(from + k) : T{};
  }
}

template <bool whole, class T, int n> __device__ __forceinline__ void store(T* to, const T (&from)[n], Present p) {
  if constexpr (whole) {
#pragma unroll
    for (int k = 0; k < n; k += 16 / sizeof(T)) {
      uint4 bits;
      memcpy(&bits, &from[k], sizeof bits);
      store_16_bytes(to + k, bits);
    }
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      if (p.begin <= k && k < p.end) *global(to + k) = from[k];
    }
  }
}

// ---- the step ----
template <int n> __device__ __forceinline__ void draw_normals(float (&to)[n], const Stream& stream, uint64_t block) {
#pragma unroll
  for (int k = 0; k < n; k += 4) {
    const Words words = words_of(stream, block + k / 4);
    const Pair first = normals_of(words.w[0], words.w[1]), second = normals_of(words.w[2], words.w[3]);
    to[k] = first.z0;
    to[k + 1] = first.z1;
    to[k + 2] = second.z0;
    to[k + 3] = second.z1;
  }
}

template <int n> __device__ __forceinline__ void draw_16_bits(uint32_t (&to)[n], Stream stream, uint64_t block) {
  stream.tag = (uint32_t)Tag::stochastic_rounding;
#pragma unroll
  for (int k = 0; k < n; k += 4) {
    const Words words = words_of(stream, block + k / 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[k + j] = words.w[j] >> 16;
  }
}

// n neighbours of one tensor in registers.
template <class T, Rule rule, Rounding rounding, bool noisy, bool prior, bool moments, int n> struct Run {
  using Real = RealOf<T>;
  T theta[n], gradient[n], center[n];
  Real mean[n], m2[n];
  float master[n];
  Real first[n], second[n];

  // the first is element `at` + `plus` of what the row's addresses point to; `plus` is known at compile time
  template <bool whole> __device__ __forceinline__ void read(const Row<T, Real>& row, uint32_t at, int plus, Present p) {
    if constexpr (rounding == kMaster) load<whole>(master, row.master + at + plus, p);
    else load<whole>(theta, row.theta + at + plus, p);
    load<whole>(gradient, row.gradient + at + plus, p);
    if constexpr (prior) {
#pragma unroll
      for (int k = 0; k < n; ++k) center[k] = T{};  // theta - 0 has the bits of theta
      if (row.center) load<whole>(center, row.center + at + plus, p);
    }
    if constexpr (moments) {
      load<whole>(mean, row.mean + at + plus, p);
      load<whole>(m2, row.m2 + at + plus, p);
    }
    if constexpr (states_of(rule) > 0) load<whole>(first, row.first + at + plus, p);
    if constexpr (states_of(rule) > 1) load<whole>(second, row.second + at + plus, p);
  }

  template <bool whole> __device__ __forceinline__ void write(const Row<T, Real>& row, uint32_t at, int plus, Present p) const {
    store<whole>(row.theta + at + plus, theta, p);
    if constexpr (rounding == kMaster) store<whole>(row.master + at + plus, master, p);
    if constexpr (moments) {
      store<whole>(row.mean + at + plus, mean, p);
      store<whole>(row.m2 + at + plus, m2, p);
    }
    if constexpr (states_of(rule) > 0) store<whole>(row.first + at + plus, first, p);
    if constexpr (states_of(rule) > 1) store<whole>(row.second + at + plus, second, p);
  }

  // `block`: the Philox block of the first element. Returns whether an element kept its value because of its gradient.
  __device__ __forceinline__ bool step(const Stream& stream, uint64_t block, const Numbers<Real>& numbers, const Shared<Real>& c,
                                       const float* noise_table) {
    float noise[n];
    uint32_t random[n];
    if constexpr (noisy) draw_normals(noise, stream, block);
    if constexpr (rounding == kStochastic) draw_16_bits(random, stream, block);
    bool any_kept = false;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const Real old = rounding == kMaster ? (Real)master[k] : widen(theta[k]);
      Real g = widen(gradient[k]);
      const bool keep = exponent_bits(g) == c.kept;
      if constexpr (prior) g = prior_gradient(old, g, widen(center[k]), c.decay);
      any_kept |= keep;
      if constexpr (rounding == kStochastic) {
        T rounded;
        round_stochastically(sgld_to_round<T>(old, g, noise[k], numbers.minus_lr, noise_table), random[k], rounded);
        theta[k] = keep ? theta[k] : rounded;
      } else {
        Element<Real> e{old, states_of(rule) > 0 ? first[k] : Real{}, states_of(rule) > 1 ? second[k] : Real{}};
        if constexpr (noisy) advance<rule>(e, g, (Real)noise[k], numbers);
        else if constexpr (rule == Rule::sgld) e.theta = sgld_drift(old, g, numbers.minus_lr);
        else advance<rule>(e, g, (Real)-0.0, numbers);
        const Real updated = keep ? old : e.theta;
        if constexpr (states_of(rule) > 0) first[k] = keep ? first[k] : e.first;
        if constexpr (states_of(rule) > 1) second[k] = keep ? second[k] : e.second;
        narrow(updated, theta[k]);
        if constexpr (rounding == kMaster) master[k] = updated;
      }
      if constexpr (moments) {
        const Real draw = rounding == kMaster ? (Real)master[k] : widen(theta[k]);
        const Moments<Real> m = add_draw(Moments<Real>{mean[k], m2[k]}, draw, c.inverse_count);
        mean[k] = m.mean;
        m2[k] = m.m2;
      }
    }
    return any_kept;
  }
};

template <class T, class Real> __device__ __forceinline__ void advance_by(Row<T, Real>& row, int64_t elements) {
  row.theta += elements;
  row.gradient += elements;
  if (row.center) row.center += elements;
  row.mean += elements;
  row.m2 += elements;
  row.master += elements;
  row.first += elements;
  row.second += elements;
}

template <class T, class Real> __device__ __forceinline__ bool is_aligned(const Row<T, Real>& row) {
  const uint64_t bits = (uint64_t)row.theta | (uint64_t)row.gradient | (uint64_t)row.center | (uint64_t)row.mean |
                        (uint64_t)row.m2 | (uint64_t)row.master | (uint64_t)row.first | (uint64_t)row.second;
  return bits % 16 == 0;
}

// `scalars` (lr, decay, sigma, the rule's own) and `clock` (the step) stand for the numbers where they are not null; `nonfinite`
// has a flag for each tensor, or is null: no check; `noise_table` has kFields entries where the rounding is stochastic. The
// strides are from one chain's scalars and table to the next's, 0 where one serves all. Without `noisy` or `prior` the step is
// that of sigma = 0 or decay = 0.
template <class T, Rule rule, Rounding rounding, bool noisy, bool prior, bool moments>
__global__ void __launch_bounds__(kThreads, blocks_per_processor<T>(rule, moments))
    langevin_step(const Row<T, RealOf<T>>* rows, const Label* labels, const Chunk* chunks, int32_t chunk_size,
                  uint8_t* nonfinite, const float* noise_table, const RealOf<T>* scalars, const int64_t* clock, uint64_t seed,
                  uint64_t step, uint32_t chain, int32_t scalars_stride, int32_t table_stride, RealOf<T> lr,
                  RealOf<T> decay, RealOf<T> sigma, RealOf<T> inverse_count, RealOf<T> n0, RealOf<T> n1, RealOf<T> n2,
                  RealOf<T> n3, RealOf<T> n4, RealOf<T> n5) {
  using Real = RealOf<T>;
  const Chunk chunk = chunks[blockIdx.x];
  const Label label = labels[chunk.row];
  __shared__ float table[rounding == kStochastic ? Format<T>::kFields : 1];
  if constexpr (rounding == kStochastic) {
    for (int k = threadIdx.x; k < Format<T>::kFields; k += kThreads) table[k] = noise_table[label.chain * table_stride + k];
    __syncthreads();
  }
  Numbers<Real> numbers{-lr, sigma, {n0, n1, n2, n3, n4, n5}};
  if (scalars) {
    scalars += label.chain * scalars_stride;
    numbers.minus_lr = -scalars[0];
    decay = scalars[1];
    numbers.sigma = scalars[2];
#pragma unroll
    for (int k = 0; k < own_numbers_of(rule); ++k) numbers.own[k] = scalars[3 + k];
  }
  if (clock) step = (uint64_t)*clock;
  Row<T, Real> row = rows[chunk.row];
  const Shared<Real> shared{decay, inverse_count, nonfinite ? kNonfiniteExponent<Real> : kNoExponent};
  const Stream stream{seed, step, chain + label.chain, (uint32_t)label.parameter, (uint32_t)Tag::langevin};

  // a chunk begins with a Philox block, of which the first `phase` elements may lie before the tensor
  const int phase = (int)(row.first_element & 3);
  const int64_t begin = (int64_t)chunk.number * chunk_size - phase;
  const uint64_t first_block = (uint64_t)(row.first_element + begin) >> 2;
  const int length = (int)(row.count - begin < chunk_size ? row.count - begin : chunk_size);
  const int absent = chunk.number == 0 ? phase : 0;
  advance_by(row, begin);

  bool any_kept = false;
  int done = 0;
  if (absent == 0 && is_aligned(row)) {
    constexpr int n = kRun<T>, runs = kRuns<T, !moments && states_of(rule) == 0>, stride = kThreads * n, tile = stride * runs;
    for (; done + tile <= length; done += tile) {
      Run<T, rule, rounding, noisy, prior, moments, n> run[runs];
      const uint32_t at = done + n * threadIdx.x;
#pragma unroll
      for (int r = 0; r < runs; ++r) run[r].template read<true>(row, at, stride * r, {});
#pragma unroll
      for (int r = 0; r < runs; ++r) {
        any_kept |= run[r].step(stream, first_block + at / 4 + stride * r / 4, numbers, shared, table);
        run[r].template write<true>(row, at, stride * r, {});
      }
    }
  }
  for (uint32_t at = done + 4 * threadIdx.x; at < length; at += 4 * kThreads) {
    const Present present{absent - (int)at, length - (int)at};
    Run<T, rule, rounding, noisy, prior, moments, 4> run;
    run.template read<false>(row, at, 0, present);
    any_kept |= run.step(stream, first_block + at / 4, numbers, shared, table);
    run.template write<false>(row, at, 0, present);
  }
  if (any_kept) nonfinite[label.tensor] = 1;
}

// found[i] becomes 1 where theta of row i holds a NaN or an infinity.
template <class T>
__global__ void __launch_bounds__(kThreads)
    find_nonfinite(const Row<T, RealOf<T>>* rows, const Chunk* chunks, int32_t chunk_size, uint8_t* found) {
  const Chunk chunk = chunks[blockIdx.x];
  const Row<T, RealOf<T>> row = rows[chunk.row];
  const int64_t begin = (int64_t)chunk.number * chunk_size;
  const T* values = row.theta + begin;
  const int length = (int)(row.count - begin < chunk_size ? row.count - begin : chunk_size);
  bool bad = false;
  int done = 0;
  if ((uint64_t)values % 16 == 0) {
    constexpr int n = 16 / sizeof(T);
    done = length / n * n;
    for (int at = n * threadIdx.x; at < done; at += n * kThreads) {
      T run[n];
      load<true>(run, values + at, {});
#pragma unroll
      for (int k = 0; k < n; ++k) bad |= !is_finite(run[k]);
    }
  }
  for (int at = done + threadIdx.x; at < length; at += kThreads) bad |= !is_finite(*global(values + at));
  if (bad) found[chunk.row] = 1;
}

}  // namespace bkd
