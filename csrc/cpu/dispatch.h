// Run-time choice of the instruction set. Kernels are compiled once per set, in namespace bkd::<set>; BKD_CALL picks one.
#pragma once

namespace bkd {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

Isa best_isa();                   // the widest set that this build and this CPU both have
Isa active_isa();                 // the one in use: the best, unless a test or a benchmark chose another
void set_active_isa(Isa isa);     // throws std::invalid_argument if the machine cannot run it
const char* isa_name(Isa isa);
Isa isa_named(const char* name);  // throws std::invalid_argument

}  // namespace bkd

// BKD_DECLARE((args), name): the same function in every instruction set's namespace.
#ifdef BKD_HAVE_X86
#define BKD_DECLARE(result, name, args) \
  namespace scalar { result name args; } \
  namespace avx2 { result name args; } \
  namespace avx512 { result name args; }
#define BKD_CALL(name, ...)                                                            \
  (::bkd::active_isa() == ::bkd::Isa::avx512 ? ::bkd::avx512::name(__VA_ARGS__)        \
   : ::bkd::active_isa() == ::bkd::Isa::avx2 ? ::bkd::avx2::name(__VA_ARGS__)          \
                                             : ::bkd::scalar::name(__VA_ARGS__))
#else
#define BKD_DECLARE(result, name, args) \
  namespace scalar { result name args; }
#define BKD_CALL(name, ...) ::bkd::scalar::name(__VA_ARGS__)
#endif
