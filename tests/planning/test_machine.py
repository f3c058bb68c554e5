"""What is divided among GPUs, what is not, and which machine is large enough."""

from dataclasses import replace

import pytest

from lightning_distill.planning.machine import STRATEGIES, Machine, Plan, plan_for, smallest
from lightning_distill.planning.step import SHARES, StepCost

MILLION = 1_000_000


@pytest.fixture
def cost() -> StepCost:
    """A million parameters in float32 in each network, and activations of 8 MB."""
    numbers = {
        **{f"parameters/{name}": MILLION for name in ("teacher", "student", "text_encoders", "autoencoder")},
        **{f"weights/{name}": 4 * MILLION for name in ("teacher", "student", "text_encoders", "autoencoder")},
        "weights/average": 0,
        "trained/student": MILLION,
        "state/student": 8 * MILLION,
        "step": 4 * MILLION,
        "encode": MILLION,
        **{f"pass/discrete/{share}": 8 * MILLION + 4 * MILLION / share for share in SHARES},
    }
    calls = {"discrete": {"teacher": 3, "student": 1, "student_backward": 1}}
    return StepCost(numbers, calls, {"teacher": (100_000, 0), "student": (100_000, 0)})  # type: ignore[arg-type]


def planned(cost: StepCost, name: str, processes: int) -> Plan:
    return plan_for(cost, STRATEGIES[name], processes)


def test_one_gpu_has_everything(cost: StepCost) -> None:
    plan = planned(cost, "auto", 1)
    # four networks, the optimizer's state, gradients and activations
    assert plan.peak == (16 + 8 + 4 + 8) * MILLION
    assert plan.communication == {"discrete": 0}


def test_ddp_divides_nothing_and_exchanges_gradients(cost: StepCost) -> None:
    plan = planned(cost, "ddp", 4)
    assert plan.peak == planned(cost, "auto", 1).peak + 4 * MILLION  # its buffers
    assert plan.communication["discrete"] == pytest.approx(2 * 0.75 * 4 * MILLION)


def test_fsdp2_divides_all_but_the_autoencoder(cost: StepCost) -> None:
    plan = planned(cost, "fsdp2", 4)
    divided = (12 + 8 + 4) / 4
    assert plan.peak == pytest.approx((divided + 4 + 8) * MILLION + 5 * 100_000)
    # three forwards of the teacher, forward and backward of the student, its gradients, and the text encoders
    assert plan.communication["discrete"] == pytest.approx(0.75 * (3 * 4 + 2 * 4 + 4 + 4) * MILLION)


def test_lora_gathers_the_teachers_weights_under_fsdp2_and_sends_its_own_gradients(cost: StepCost) -> None:
    own = MILLION // 10
    cost.numbers.update({"parameters/student": MILLION + own, "weights/student": 4 * own, "trained/student": own})
    plan = planned(cost, "fsdp2", 4)
    assert plan.gpu["weights: teacher"] == MILLION
    assert plan.gpu["weights: student"] == own
    assert plan.communication["discrete"] == pytest.approx(0.75 * (3 * 4 + 2 * 4.4 + 0.4 + 4) * MILLION)


def test_the_guard_keeps_parts_of_what_is_spread(cost: StepCost) -> None:
    for name, share in {"ddp": 1, "fsdp2": 4}.items():
        plan = plan_for(cost, STRATEGIES[name], 4, guard=True)
        assert plan.cpu == {"guard of the switch": pytest.approx(4 * MILLION / share)}


@pytest.mark.parametrize("name", ["fsdp2_offload", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_optimizer"])
def test_what_is_offloaded_is_on_the_cpu(cost: StepCost, name: str) -> None:
    plan, plain = planned(cost, name, 2), planned(cost, name.partition("_offload")[0], 2)
    assert plan.peak < plain.peak
    assert plan.cpu["optimizer"] == plain.gpu["optimizer"]
    assert ("weights: student" in plan.cpu) == (not name.endswith("optimizer"))
    assert "weights: autoencoder" in plan.gpu


def test_zero3_has_buffers_no_larger_than_gradients(cost: StepCost) -> None:
    plan = planned(cost, "deepspeed_stage_3", 4)
    divided = (12 + 8 + 4 + 4) / 4  # weights, the optimizer's state, gradients, and float32 copies of what trains
    # Teacher and student gathered; gradients in a buffer, and once more as they leave.
    assert plan.peak == pytest.approx((divided + 4 + 8 + 8 + 4 + 4) * MILLION)
    small = replace(STRATEGIES["deepspeed_stage_3"], bucket=MILLION // 10, live=MILLION // 10)
    assert plan_for(cost, small, 4).peak == pytest.approx((divided + 4 + 8 + 3 * 0.4) * MILLION)


def test_the_smallest_machine(cost: StepCost) -> None:
    machine = Machine(gpus=1, gpu_memory=20 * MILLION / 2**30 + 1, reserve=1)
    needed = {count: planned(cost, "fsdp2", count).peak for count in (1, 2, 4, 8)}
    found = smallest(lambda count: machine.holds(planned(cost, "fsdp2", count).peak))
    assert found == 4
    assert needed[2] > 20 * MILLION >= needed[4]
    assert smallest(lambda count: False) is None
