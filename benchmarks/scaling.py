"""`python -m benchmarks.scaling`: a model on paper of a chain on 8 to 1024 GPUs, from single-device figures that are given to it.

Nothing is measured here. docs/scaling.md says what is counted; the defaults are published figures of a ResNet-50 on A100s, and
are to be replaced by those of `python -m benchmarks.imagenet` on one's own device.
"""

import argparse
import math
from dataclasses import dataclass

TRAIN, TEST, CLASSES = 1_281_167, 50_000, 1000
CELL = 144  # bytes of a class probability in the posterior's state
WINDOW = 32  # draws that the posterior's update takes at once
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Machine:
    """Devices in nodes. Bandwidths are those of an all-reduce's busiest link, bytes per second; latency in seconds a hop."""

    images_per_second: float
    memory_bandwidth: float
    node: int
    inside: float
    between: float
    latency: float


@dataclass(frozen=True)
class Step:
    """One step of a data-parallel chain, seconds: computing, moving gradients, and how much of that is not hidden."""

    compute: float
    moving: float
    exposed: float

    @property
    def efficiency(self) -> float:
        return self.compute / (self.compute + self.exposed)


def step(parameters: int, batch: int, processes: int, machine: Machine) -> Step:
    """DDP: a ring all-reduce of float32 gradients that runs beside the backward pass, two thirds of the computing."""
    compute = batch / machine.images_per_second
    share = 2 * (processes - 1) / processes
    bandwidth = machine.inside if processes <= machine.node else machine.between
    hops = 2 * math.ceil(math.log2(processes)) if processes > 1 else 0  # NCCL's trees, not its rings, for the latency
    moving = share * FLOAT * parameters / bandwidth + hops * machine.latency
    return Step(compute, moving, max(0.0, moving - 2 / 3 * compute))


def draw(processes: int, machine: Machine) -> float:
    """Seconds: the forward pass over the test images, a third of a step's work, and the state read and written once a window."""
    forward = TEST / (3 * machine.images_per_second)
    update = 2 * CELL * TEST * CLASSES / WINDOW / machine.memory_bandwidth
    return (forward + update) / processes


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parameters", type=int, default=25_557_032)
    options.add_argument("--images-per-second", type=float, default=2470, help="of training, on one device")
    options.add_argument("--batch", type=int, default=256, help="images per device and step")
    options.add_argument("--largest-batch", type=int, default=8192, help="of a chain; more devices make more chains")
    options.add_argument("--memory-bandwidth", type=float, default=2.0e12)
    options.add_argument("--node", type=int, default=8, help="devices that share the inner network")
    options.add_argument("--inside", type=float, default=2.3e11)
    options.add_argument("--between", type=float, default=2.0e10)
    options.add_argument("--latency", type=float, default=1e-5)
    given = options.parse_args()
    machine = Machine(
        given.images_per_second, given.memory_bandwidth, given.node, given.inside, given.between, given.latency
    )
    print(
        "| devices | chains x replicas | batch of a chain | ms a step | of it moving | not hidden | efficiency "
        "| hours for 90 epochs of each chain | s a draw of all test images | draws that cost 5 % of an epoch |"
    )
    print("|" + "---|" * 10)
    for devices in (1, 8, 16, 32, 64, 128, 256, 512, 1024):
        replicas = min(devices, max(1, given.largest_batch // given.batch))
        chains = devices // replicas
        found = step(given.parameters, given.batch, replicas, machine)
        seconds = found.compute + found.exposed
        epoch = TRAIN / (given.batch * replicas) * seconds
        per_draw = draw(replicas, machine)
        print(
            f"| {devices} | {chains} x {replicas} | {given.batch * replicas:,} | {1e3 * seconds:.1f} | {1e3 * found.moving:.1f} "
            f"| {1e3 * found.exposed:.1f} | {found.efficiency:.2f} | {90 * epoch / 3600:.2f} | {per_draw:.2f} "
            f"| {0.05 * epoch / per_draw:.1f} |"
        )


if __name__ == "__main__":
    main()
