// The rules by which a sampler moves an element (langevin.h has their maths): their names, and how much state each keeps.
#pragma once

namespace bkd {

enum class Rule { sgld, sghmc, nesterov, rmsprop, adam, sgnht, baoab };

// Arrays of state that a rule keeps, like theta in the arithmetic's type.
constexpr int states_of(Rule rule) {
  return rule == Rule::sgld ? 0 : rule == Rule::adam || rule == Rule::sgnht ? 2 : 1;
}

// Numbers that a rule has beside lr, decay and sigma.
constexpr int kOwnNumbers = 6;  // at most
constexpr int own_numbers_of(Rule rule) {
  return rule == Rule::sgld ? 0 : rule == Rule::rmsprop ? 3 : rule == Rule::adam ? 6 : 2;
}

}  // namespace bkd
