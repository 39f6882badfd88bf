#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace bkd {

Isa best_isa() {
#ifdef BKD_HAVE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

static std::atomic<int> active{-1};

Isa active_isa() {
  int isa = active.load(std::memory_order_relaxed);
  if (isa < 0) active.store(isa = static_cast<int>(best_isa()), std::memory_order_relaxed);
  return static_cast<Isa>(isa);
}

void set_active_isa(Isa isa) {
  if (isa > best_isa())
    throw std::invalid_argument(std::string("isa = '") + isa_name(isa) + "': this machine has at most '" +
                                isa_name(best_isa()) + "'");
  active.store(static_cast<int>(isa), std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "scalar";
}

Isa isa_named(const char* name) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
    if (std::string(name) == isa_name(isa)) return isa;
  throw std::invalid_argument(std::string("isa = '") + name + "': must be 'scalar', 'avx2' or 'avx512'");
}

}  // namespace bkd
