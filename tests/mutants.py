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

SAMPLER, SGLD, LAYOUT = (f"bkd_fast/samplers/{name}.py" for name in ("sampler", "sgld", "layout"))
ROUNDING = "bkd_fast/ops/rounding.py"
ELEMENT, STEP, NOISE = "csrc/langevin.h", "csrc/cpu/langevin.cpp", "csrc/noise.h"
CAPTURABLE_TESTS = "tests/samplers/test_capturable.py"
SIXTEEN_TESTS, ROUNDING_TESTS = "tests/samplers/test_sixteen_bits.py", "tests/ops/test_rounding.py"
SGLD_TESTS, NOISE_TESTS, STEP_TESTS = (
    "tests/samplers/test_sgld.py",
    "tests/ops/test_noise.py",
    "tests/ops/test_langevin.py",
)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    test: str  # the test that claims to see it


SIGMA = 'sigma = math.sqrt(2 * lr * group["temperature"] / num_data)'
LAW = f"{SGLD_TESTS}::test_exact_finite_time_law"
EQUATION = f"{SGLD_TESTS}::test_one_step_is_the_stated_equation"
MUTANTS = [
    Mutant("noise standard deviation lr", SGLD, SIGMA, "sigma = lr", LAW),
    Mutant("variance lr instead of 2 lr", SGLD, SIGMA, SIGMA.replace("2 * lr", "lr"), LAW),
    Mutant("noise 0.5 % too large", SGLD, SIGMA, SIGMA.replace("math.sqrt", "1.005 * math.sqrt"), LAW),
    Mutant("missing square root", SGLD, SIGMA, SIGMA.replace("math.sqrt", ""), LAW),
    Mutant("missing temperature", SGLD, SIGMA, SIGMA.replace(' * group["temperature"]', ""), LAW),
    Mutant("temperature not under the root", SGLD, SIGMA, SIGMA.replace('group["temperature"]', 'group["temperature"] ** 2'), LAW),
    Mutant("missing num_data", SGLD, SIGMA, SIGMA.replace(" / num_data", ""), LAW),
    Mutant("prior not divided by num_data", SGLD, '["prior_precision"] / num_data', '["prior_precision"]', LAW),
    Mutant("prior mean ignored", SGLD, "center=center", "center=[]", LAW),
    Mutant("prior counted twice", SGLD, "decay=sign * decay", "decay=2 * sign * decay", LAW),
    Mutant("maximising turns the prior round", SGLD, "decay=sign * decay", "decay=decay", f"{SGLD_TESTS}::test_temperature_zero_is_sgd_bit_for_bit"),
    Mutant("same noise in two tensors", SGLD, 'group["parameter_ids"][index] for', "0 for", f"{SGLD_TESTS}::test_one_step_law"),
    Mutant("same noise on two steps", SAMPLER, 'group["step"] += 1', 'group["step"] += 0', f"{SGLD_TESTS}::test_one_step_law"),
    Mutant("numbering restarts in each group", SAMPLER, "list(range(self._next_id, self._next_id + len", "list(range(0, len", f"{SGLD_TESTS}::test_groups_keep_numbering_across_add_param_group"),
    Mutant("gradient mutated", SGLD, "        sign = -1.0", "        [g.mul_(1 + decay) for g in launch.gradient]\n        sign = -1.0", f"{SGLD_TESTS}::test_parameters_move_in_place_and_gradients_do_not_change"),
    Mutant("parameter rebound", LAYOUT, "        launch.theta.append(parameter)\n", "        parameter.data = parameter.data.clone()\n        launch.theta.append(parameter)\n", f"{SGLD_TESTS}::test_parameters_move_in_place_and_gradients_do_not_change"),
    Mutant("autograd is not told", LAYOUT, "torch.autograd.graph.increment_version(self.theta)", "pass", f"{SGLD_TESTS}::test_autograd_notices_the_change"),
    Mutant("step lost in state_dict", SAMPLER, "return super().state_dict()", 'state = super().state_dict()\n        state["param_groups"] = [{**g, "step": 0} for g in state["param_groups"]]\n        return state', f"{SGLD_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("seed lost in state_dict", SAMPLER, "return super().state_dict()", 'state = super().state_dict()\n        state["param_groups"] = [{**g, "seed": 0} for g in state["param_groups"]]\n        return state', f"{SGLD_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("fp32 moments cast to bf16 on load", SAMPLER, 'for name in ("mean", "m2", "master"):\n                    if name in saved', 'for name in ():\n                    if name in saved', f"{SGLD_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("draws counted once per tensor", SAMPLER, "mean, m2 = self._moments_of(group, launch) if collects", "collects = collects and self._collects(group)\n                mean, m2 = self._moments_of(group, launch) if collects", f"{SGLD_TESTS}::test_moments_are_those_of_the_visited_parameters"),
    Mutant("frozen noise in a replayed graph", SAMPLER, 'self._clocks[index] += (group["lr"] != 0).any()', 'self._clocks[index] += 0', f"{CAPTURABLE_TESTS}::test_steps_equal_those_of_a_plain_sampler"),
    Mutant("a graph's noise scale forgets the temperature", SGLD, '2 * lr * group["temperature"] / torch', '2 * lr / torch', f"{CAPTURABLE_TESTS}::test_steps_equal_those_of_a_plain_sampler"),
    Mutant("a skipped step uses up noise", SAMPLER, "            self.skipped_steps += 1\n", '            self.skipped_steps += 1\n            self.param_groups[0]["step"] += 1\n', f"{SGLD_TESTS}::test_skip_moves_nothing_and_does_not_use_up_noise"),
    Mutant("the check comes after the first group moved", SAMPLER, "        for _, group, _ in work:\n            check_hyperparameters(group)\n", "", f"{SGLD_TESTS}::test_a_setting_broken_later_is_seen_before_anything_moves"),
    Mutant("warm start is noisy", "bkd_fast/sampling.py", "with _Temperature(self.sampler, 0.0):", "with _Temperature(self.sampler, 1.0):", "tests/test_sampling.py::test_warm_start_ends_exactly_where_sgd_ends"),
    Mutant("noise scaled before lr instead of after", ELEMENT, "return fma(sigma, noise, sgld_drift(theta, gradient, minus_lr));", "return sgld_drift(theta, fma(sigma, noise, gradient), minus_lr);", LAW),
    Mutant("noise 0.5 % too large, in the vector kernel", STEP, "minus_lr = set1((float)-step.lr), decay = set1((float)step.decay), sigma = set1((float)step.sigma)", "minus_lr = set1((float)-step.lr), decay = set1((float)step.decay), sigma = set1(1.005f * (float)step.sigma)", LAW),
    Mutant("chain counters overlap steps", NOISE, "s.chain << 12 | (uint32_t)(s.step >> 32)", "s.chain | (uint32_t)(s.step >> 32)", f"{NOISE_TESTS}::test_noise_known_answers"),
    Mutant("block number cut to 32 bits", NOISE, "(uint32_t)(block >> 32) << 24 | s.parameter", "s.parameter", f"{NOISE_TESTS}::test_noise_known_answers"),
    Mutant("rounding variance uncorrected", ROUNDING, "return (spacings * torch.maximum(between, beyond)).float()", "return (sigma + 0 * spacings).float()", f"{SIXTEEN_TESTS}::test_the_posterior_of_a_quadratic"),
    Mutant("rounding by the words of the noise", STEP, "(uint32_t)Tag::stochastic_rounding", "(uint32_t)Tag::langevin", f"{ROUNDING_TESTS}::test_one_step_has_the_law_of_noise_rounded_at_random"),
    Mutant("rounding carries into infinity", "csrc/half.h", "smaller(magnitude + random, 0x7F7FFFFFu)", "magnitude + random", f"{ROUNDING_TESTS}::test_a_finite_number_never_becomes_infinite"),
    Mutant("masters cast to bf16 on load", SAMPLER, 'for name in ("mean", "m2", "master"):\n                    if name in saved', 'for name in ("mean", "m2"):\n                    if name in saved', f"{SIXTEEN_TESTS}::test_a_resumed_chain_equals_the_uninterrupted_one"),
    Mutant("nine Philox rounds", NOISE, "constexpr int kPhiloxRounds = 10;", "constexpr int kPhiloxRounds = 9;", f"{NOISE_TESTS}::test_philox_known_answers"),
    Mutant("a non-finite gradient moves its element", STEP, "updated = select(nonfinite, old, updated);", "", f"{STEP_TESTS}::test_every_option_equals_the_reference"),
    Mutant("tails draw the noise of the start", STEP, "normals(noise, n, stream, tensor.first_element + (uint64_t)from)", "normals(noise, n, stream, tensor.first_element)", f"{STEP_TESTS}::test_every_option_equals_the_reference"),
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
