"""`make mutants`: break the code in ways that real samplers were broken, and see the test that claims each one fail.

Works on a copy of the tree. A mutant is a replacement of one piece of text that must occur exactly once. A mutant in C++ is built
again. Most of the list were bugs of published samplers (docs/methods.md, docs/samplers.md).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

SAMPLER, SGLD, LAYOUT, SGHMC, PSGLD, ADAM, SGNHT, BAOAB, CYCLICAL = (
    f"bkd_fast/samplers/{name}.py"
    for name in ("sampler", "sgld", "layout", "sghmc", "psgld", "adam_sghmc", "sgnht", "baoab", "cyclical")
)
ROUNDING = "bkd_fast/ops/rounding.py"
ELEMENT, STEP, NOISE, CHUNKS = "csrc/langevin.h", "csrc/cpu/langevin.cpp", "csrc/noise.h", "csrc/cpu/langevin_table.cpp"
SGLD_TESTS, LAW_TESTS, CHAIN_TESTS, CAPTURABLE_TESTS, SIXTEEN_TESTS, PSGLD_TESTS, STATE_TESTS, BACKWARD_TESTS, CYCLICAL_TESTS = (
    f"tests/samplers/test_{name}.py"
    for name in (
        "sgld", "laws", "chains", "capturable", "sixteen_bits", "psgld", "family_state", "step_in_backward", "cyclical",
    )
)  # fmt: skip
LAYOUT_TESTS = "tests/samplers/test_layout.py"
NOISE_TESTS, STEP_TESTS, RULE_TESTS, ROUNDING_TESTS = (
    f"tests/ops/test_{name}.py" for name in ("noise", "langevin", "rules", "rounding")
)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    test: str  # the test that claims to see it


SIGMA = "return lr, m.sqrt(2 * lr * temperature / num_data)"
DECAY = 'decay = group["weight_decay"] or group["prior_precision"] / group["num_data"]'
SAVED_STATES = 'for name in ("mean", "m2", "master", *self.states):'
SAVED = 'saved = {**saved, "state": states}'
LOST = 'saved = {"state": states, "param_groups": [{**g, "%s": %s} for g in saved["param_groups"]]}'
LAW = f"{SGLD_TESTS}::test_exact_finite_time_law"
EQUATION = f"{SGLD_TESTS}::test_one_step_is_the_stated_equation"
EQUATIONS = f"{LAW_TESTS}::test_steps_are_the_stated_equation"
MOMENTUM_LAW, FROZEN_LAW = (
    f"{LAW_TESTS}::test_exact_finite_time_law_with_momentum",
    f"{LAW_TESTS}::test_exact_finite_time_law_of_a_frozen_metric",
)
MUTANTS = [
    Mutant("noise standard deviation lr", SGLD, SIGMA, "return lr, lr", LAW),
    Mutant("variance lr instead of 2 lr", SGLD, SIGMA, SIGMA.replace("2 * lr", "lr"), LAW),
    Mutant("noise 0.5 % too large", SGLD, SIGMA, SIGMA.replace("m.sqrt", "1.005 * m.sqrt"), LAW),
    Mutant("missing square root", SGLD, SIGMA, SIGMA.replace("m.sqrt", ""), LAW),
    Mutant("missing temperature", SGLD, SIGMA, SIGMA.replace(" * temperature", ""), LAW),
    Mutant("temperature not under the root", SGLD, SIGMA, SIGMA.replace("temperature", "temperature ** 2"), LAW),
    Mutant("missing num_data", SGLD, SIGMA, SIGMA.replace(" / num_data", ""), LAW),
    Mutant("prior not divided by num_data", SAMPLER, DECAY, DECAY.replace(' / group["num_data"]', ""), LAW),
    Mutant("prior mean ignored", SAMPLER, "center=self._prior_means_of(group, launch)", "center=[]", LAW),
    Mutant("prior counted twice", SAMPLER, "decay=sign * decay", "decay=2 * sign * decay", LAW),
    Mutant("maximising turns the prior round", SAMPLER, "decay=sign * decay", "decay=decay", f"{SGLD_TESTS}::test_temperature_zero_is_sgd_bit_for_bit"),
    Mutant("same noise in two tensors", SAMPLER, "parameters=launch.parameters", "parameters=[0] * len(launch.parameters)", f"{SGLD_TESTS}::test_one_step_law"),
    Mutant("same noise on two steps", SAMPLER, 'group["step"] += 1', 'group["step"] += 0', f"{SGLD_TESTS}::test_one_step_law"),
    Mutant("numbering restarts in each group", SAMPLER, "list(range(self._next_id, self._next_id + len", "list(range(0, len", f"{SGLD_TESTS}::test_groups_keep_numbering_across_add_param_group"),
    Mutant("gradient mutated", SAMPLER, "        sign = -1.0", "        [g.mul_(1 + decay) for g in launch.gradient]\n        sign = -1.0", f"{SGLD_TESTS}::test_parameters_move_in_place_and_gradients_do_not_change"),
    Mutant("parameter rebound", LAYOUT, "        launch.theta.append(parameter)\n", "        parameter.data = parameter.data.clone()\n        launch.theta.append(parameter)\n", f"{SGLD_TESTS}::test_parameters_move_in_place_and_gradients_do_not_change"),
    Mutant("autograd is not told", LAYOUT, "torch.autograd.graph.increment_version(self.theta)", "pass", f"{SGLD_TESTS}::test_autograd_notices_the_change"),
    Mutant("gradients held after the step", LAYOUT, "replace(launch, gradient=[], ", "replace(launch, ", f"{LAYOUT_TESTS}::test_gradients_are_not_held"),
    Mutant("a replaced parameter not seen", LAYOUT, " or not all(map(is_, params, self._params))", "", f"{LAYOUT_TESTS}::test_a_change_between_steps_is_noticed"),
    Mutant("a parameter's new memory not seen", LAYOUT, "return addresses == self._addresses and", "return", f"{LAYOUT_TESTS}::test_another_memory_has_another_identity"),
    Mutant("another gradient order not seen", LAYOUT, "[*map(order, theta), *map(order, gradient)]", "[*map(order, theta)]", f"{LAYOUT_TESTS}::test_a_gradient_in_another_order_is_followed"),
    Mutant("gradients that come and go not seen", LAYOUT, "if len(theta) < len(params) and", "if False and", f"{LAYOUT_TESTS}::test_gradients_that_come_and_go_are_followed"),
    Mutant("a replaced state not seen", LAYOUT, "same = all(map(is_, [tensor() for tensor in kept], lists[name]))", "same = True", f"{LAYOUT_TESTS}::test_a_change_between_steps_is_noticed"),
    Mutant("a state held after the step", LAYOUT, "list(map(ref, tensors)), tuple", "[lambda t=t: t for t in tensors], tuple", f"{LAYOUT_TESTS}::test_the_state_is_not_held"),
    Mutant("freed memory not seen", LAYOUT, "if address == 0 and tensor.numel():", "if False:", f"{LAYOUT_TESTS}::test_freed_memory_is_refused_before_anything_moves"),
    Mutant("step lost in state_dict", SAMPLER, SAVED, LOST % ("step", 0), f"{SGLD_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("seed lost in state_dict", SAMPLER, SAVED, LOST % ("seed", 0), f"{SGLD_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("fp32 moments cast to bf16 on load", SAMPLER, SAVED_STATES, 'for name in ("master", *self.states):', f"{SGLD_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("draws counted once per tensor", SAMPLER, "        mean, m2 = self._moments_of(group, launch) if collects", "        collects = collects and self._collects(group)\n        mean, m2 = self._moments_of(group, launch) if collects", f"{SGLD_TESTS}::test_moments_are_those_of_the_visited_parameters"),
    Mutant("frozen noise in a replayed graph", SAMPLER, 'moves = group["lr"] != 0', 'moves = group["lr"] != group["lr"]', f"{CAPTURABLE_TESTS}::test_steps_equal_those_of_a_plain_sampler"),
    Mutant("a graph's noise scale forgets the temperature", SAMPLER, "self._numbers(group, lr, temperature, num_data, step, torch)", "self._numbers(group, lr, 0 * temperature + 1, num_data, step, torch)", f"{CAPTURABLE_TESTS}::test_steps_equal_those_of_a_plain_sampler"),
    Mutant("a skipped step uses up noise", SAMPLER, "            self.skipped_steps += 1\n", '            self.skipped_steps += 1\n            self.param_groups[0]["step"] += 1\n', f"{SGLD_TESTS}::test_skip_moves_nothing_and_does_not_use_up_noise"),
    Mutant("the settings are not looked at again", SAMPLER, "            self._check_changes(index, group)\n            for launch in", "            for launch in", f"{SGLD_TESTS}::test_a_setting_broken_later_is_seen_before_anything_moves"),
    Mutant("warm start is noisy", "bkd_fast/sampling.py", "            group[\"temperature\"] = 0.0\n", "            group[\"temperature\"] = 1.0\n", "tests/test_sampling.py::test_warm_start_ends_exactly_where_sgd_ends"),
    Mutant("noise share without the metric", "bkd_fast/energy.py", "here = metric * coordinates", "here = coordinates", "tests/test_sampling.py::test_noise_share_weighs_the_variance_by_the_metric"),
    Mutant("curvature without the prior's", "bkd_fast/step_size.py", " + decay * d", "", "tests/test_step_size.py::test_limited_by_the_gradient_noise"),
    Mutant("noise scaled before lr instead of after", ELEMENT, "e.theta = fma(n.sigma, noise, sgld_drift(e.theta, g, n.minus_lr));", "e.theta = sgld_drift(e.theta, fma(n.sigma, noise, g), n.minus_lr);", LAW),
    Mutant("noise 0.5 % too large, in the vector kernel", STEP, "set1((float)-given.lr), set1((float)given.sigma), {}", "set1((float)-given.lr), set1(1.005f * (float)given.sigma), {}", LAW),
    Mutant("chain counters overlap steps", NOISE, "s.chain << 12 | (uint32_t)(s.step >> 32)", "s.chain | (uint32_t)(s.step >> 32)", f"{NOISE_TESTS}::test_noise_known_answers"),
    Mutant("block number cut to 32 bits", NOISE, "(uint32_t)(block >> 32) << 24 | s.parameter", "s.parameter", f"{NOISE_TESTS}::test_noise_known_answers"),
    Mutant("rounding variance uncorrected", ROUNDING, "return (spacings * torch.maximum(between, beyond)).float()", "return (sigma + 0 * spacings).float()", f"{SIXTEEN_TESTS}::test_the_posterior_of_a_quadratic"),
    Mutant("rounding by the words of the noise", STEP, "stream_of(tensor, step, Tag::stochastic_rounding)", "stream_of(tensor, step)", f"{ROUNDING_TESTS}::test_one_step_has_the_law_of_noise_rounded_at_random"),
    Mutant("rounding carries into infinity", "csrc/half.h", "smaller(magnitude + random, 0x7F7FFFFFu)", "magnitude + random", f"{ROUNDING_TESTS}::test_a_finite_number_never_becomes_infinite"),
    Mutant("masters cast to bf16 on load", SAMPLER, SAVED_STATES, 'for name in ("mean", "m2", *self.states):', f"{SIXTEEN_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("nine Philox rounds", NOISE, "constexpr int kPhiloxRounds = 10;", "constexpr int kPhiloxRounds = 9;", f"{NOISE_TESTS}::test_philox_known_answers"),
    Mutant("a non-finite gradient moves its element", STEP, "e.theta = select(nonfinite, old.theta, e.theta);", "", f"{STEP_TESTS}::test_every_option_equals_the_reference"),
    Mutant("a non-finite gradient reaches the momentum", STEP, "e.first = select(nonfinite, old.first, e.first);", "e.first = e.first;", f"{RULE_TESTS}::test_every_rule_equals_the_reference"),
    Mutant("tails draw the noise of the start", STEP, "if (given.sigma != 0) normals(b.noise, n, stream, tensor.first_element + (uint64_t)from)", "if (given.sigma != 0) normals(b.noise, n, stream, tensor.first_element)", f"{STEP_TESTS}::test_every_option_equals_the_reference"),
    # the family
    Mutant("momentum's noise 0.5 % too large", SGHMC, "return lr, m.sqrt(", "return lr, 1.005 * m.sqrt(", MOMENTUM_LAW),
    Mutant("momentum's noise without the friction", SGHMC, "2 * (1 - mu) * share", "2 * share", MOMENTUM_LAW),
    Mutant("momentum's noise without the dampening", SGHMC, "2 * (1 - mu) * share", "2 * (1 - mu)", MOMENTUM_LAW),
    Mutant("momentum's noise not over lr", SGHMC, "/ (lr * num_data)), mu", "/ num_data), mu", MOMENTUM_LAW),
    Mutant("momentum's noise with N twice", SGHMC, "/ (lr * num_data)), mu", "/ (lr * num_data**2)), mu", MOMENTUM_LAW),
    Mutant("the first step is dampened", SGHMC, "if not born:", "if True:", "tests/samplers/test_sghmc.py::test_temperature_zero_is_sgd_with_momentum_bit_for_bit"),
    Mutant("momentum cast to bf16 on load", SAMPLER, SAVED_STATES, 'for name in ("mean", "m2", "master"):', f"{STATE_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("a momentum lost in state_dict", SAMPLER, SAVED, LOST % ("momentum", 0.5), f"{STATE_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("drawn momenta forget the temperature", SGHMC, "torch.sqrt(share * temperature / (lr", "torch.sqrt(share / (lr", f"{LAW_TESTS}::test_drawn_momenta_have_their_stationary_law"),
    Mutant("drawn momenta are the step's noise", SAMPLER, "self._noise_like(group, position, Tag.INITIAL_MOMENTUM)", "self._noise_like(group, position, Tag.LANGEVIN)", f"{LAW_TESTS}::test_drawn_momenta_have_their_stationary_law"),
    Mutant("BAOAB's noise 1 - mu for 1 - mu^2", BAOAB, "(1 - mu * mu)", "(1 - mu)", MOMENTUM_LAW),
    Mutant("BAOAB drifts whole steps", BAOAB, "mu, h / 2", "mu, h", MOMENTUM_LAW),
    Mutant("BAOAB kicks between the drifts", ELEMENT, "fma(n.own[1], kicked, e.theta)", "fma(n.own[1], e.first, e.theta)", MOMENTUM_LAW),
    Mutant("norm for squared norm in the thermostat", ELEMENT, "const V square = mul(e.first, e.first);", "const V square = e.first;", EQUATIONS),
    Mutant("the thermostat forgets the step", ELEMENT, "fma(n.own[0], fma(square, e.second, square), e.second)", "fma(n.own[0], add(square, square), e.second)", f"{LAW_TESTS}::test_the_thermostat_takes_the_minibatch_noise_out"),
    Mutant("the thermostat's temperature is 1", SGNHT, "gain = -rate * lr * num_data / (2 * temperature)", "gain = -rate * lr * num_data / 2", f"{LAW_TESTS}::test_the_thermostat_takes_the_minibatch_noise_out"),
    Mutant("preconditioned twice", ELEMENT, "mul(n.minus_lr, mul(root_of_metric, g))", "mul(n.minus_lr, mul(root_of_metric, mul(root_of_metric, g)))", FROZEN_LAW),
    Mutant("the noise is not preconditioned", ELEMENT, "fma(mul(n.sigma, root(inverse_metric)), noise,", "fma(n.sigma, noise,", FROZEN_LAW),
    Mutant("preconditioned noise 0.5 % too large", PSGLD, "return lr, m.sqrt(", "return lr, 1.005 * m.sqrt(", FROZEN_LAW),
    Mutant("Adam's noise without its friction", ADAM, "sigma = (1 - beta1) * m.sqrt", "sigma = m.sqrt", FROZEN_LAW),
    Mutant("a frozen metric moves", PSGLD, 'alpha = group["alpha"] if group["frozen_at"] is None else 1.0', 'alpha = group["alpha"]', f"{PSGLD_TESTS}::test_a_frozen_metric_stays_through_steps_and_saving"),
    Mutant("Gamma of the wrong sign", PSGLD, "parameter.sub_(torch.nan_to_num_", "parameter.add_(torch.nan_to_num_", f"{PSGLD_TESTS}::test_gamma_makes_a_metric_that_follows_the_gradient_right"),
    Mutant("chains share their noise", STEP, "s.chain + t.chain", "s.chain", f"{CHAIN_TESTS}::test_chains_are_the_chains_alone"),
    Mutant("a chain's elements do not count from the first", CHUNKS, "const int64_t elements = chain * part.count;", "const int64_t elements = chain * part.count;\n      part.first_element += static_cast<uint64_t>(elements);", f"{CHAIN_TESTS}::test_chains_are_the_chains_alone"),
    Mutant("every chain has the first one's lr", STEP.replace("langevin.cpp", "langevin.h"), "numbers[numbers_per_chain ? tensor.chain : 0]", "numbers[0]", f"{CHAIN_TESTS}::test_chains_are_the_chains_alone"),
    Mutant("each backward step is a draw", SAMPLER, "self._move(index, group, launch, begun.collects)", "self._move(index, group, launch, begun.collects and self._collects(group))", f"{BACKWARD_TESTS}::test_the_chain_is_the_same"),
    Mutant("a restart keeps its momentum", CYCLICAL, "begins = position == 0 or", "begins =", f"{CYCLICAL_TESTS}::test_a_restart_does_not_throw_the_chain"),
    Mutant("sampling begins cold", CYCLICAL, "position == 0 or (self.sampling and not self._samples(position - 1))", "position == 0", f"{CYCLICAL_TESTS}::test_sampling_begins_with_a_warm_momentum"),
]  # fmt: skip


def run(command: list[str], tree: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "BKD_FAST_REQUIRE_CMAKE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def build(tree: Path) -> None:
    result = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)
    if result.returncode:
        sys.exit(f"the copy does not build:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")


def passes(tree: Path, tests: list[str]) -> bool:
    """Whether the tests pass; a mutant that takes the process down (a negative exit status) does not."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    result = run(command, tree)
    if result.returncode > 1:
        sys.exit(f"{' '.join(tests)} could not run:\n{result.stdout[-3000:]}\n{result.stderr[-1000:]}")
    return result.returncode == 0


def main() -> None:
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
        for mutant in chosen:
            count = (tree / mutant.file).read_text().count(mutant.old)
            if count != 1:
                sys.exit(f"{mutant.name}: its text occurs {count} times in {mutant.file}")
        print("building the copy and running the tests on it unbroken", flush=True)
        build(tree)
        if not passes(tree, sorted({m.test for m in chosen})):
            sys.exit("the tests fail without any mutant")
        survivors = []
        for mutant in chosen:
            path = tree / mutant.file
            original = path.read_text()
            path.write_text(original.replace(mutant.old, mutant.new))
            began = time.perf_counter()
            if mutant.file.startswith("csrc/"):
                build(tree)
            survived = passes(tree, [mutant.test])
            path.write_text(original)
            survivors += [mutant.name] if survived else []
            seconds = time.perf_counter() - began
            print(
                f"{'SURVIVED' if survived else 'killed':<9} {mutant.name}  ({mutant.test}, {seconds:.0f} s)", flush=True
            )
    killed = len(chosen) - len(survivors)
    print(f"{killed} of {len(chosen)} mutants killed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
