"""Memory and communication per GPU under each strategy, and the smallest sufficient machine."""

from dataclasses import replace

import pytest

from lightning_distill.planning.machine import STRATEGIES, Machine, Plan, plan_for, smallest_gpu_count
from lightning_distill.planning.step import SHARD_COUNTS, StepCost

MILLION = 1_000_000


@pytest.fixture
def cost() -> StepCost:
    """Cost with a million float32 parameters in each network, and activations of 8 MB."""
    numbers = {
        **{f"parameters/{name}": MILLION for name in ("teacher", "student", "text_encoders", "autoencoder")},
        **{f"weights/{name}": 4 * MILLION for name in ("teacher", "student", "text_encoders", "autoencoder")},
        "weights/ema": 0,
        "trained/student": MILLION,
        "state/student": 8 * MILLION,
        "optimizer_temporaries": 4 * MILLION,
        "encode": MILLION,
        **{f"pass/discrete/{shards}": 8 * MILLION + 4 * MILLION / shards for shards in SHARD_COUNTS},
    }
    calls = {"discrete": {"teacher": 3, "student": 1, "student_backward": 1}}
    return StepCost(numbers, calls, {"teacher": (100_000, 0), "student": (100_000, 0)})  # type: ignore[arg-type]


def make_plan(cost: StepCost, name: str, processes: int) -> Plan:
    return plan_for(cost, STRATEGIES[name], processes)


def test_single_gpu_holds_all_networks(cost: StepCost) -> None:
    plan = make_plan(cost, "auto", 1)
    # four networks, optimizer state, gradients and activations
    assert plan.peak == (16 + 8 + 4 + 8) * MILLION
    assert plan.communication == {"discrete": 0}


def test_ddp_replicates_networks_and_reduces_gradients(cost: StepCost) -> None:
    plan = make_plan(cost, "ddp", 4)
    assert plan.peak == make_plan(cost, "auto", 1).peak + 4 * MILLION  # DDP's buffers
    assert plan.communication["discrete"] == pytest.approx(2 * 0.75 * 4 * MILLION)


def test_fsdp2_shards_all_networks_except_the_autoencoder(cost: StepCost) -> None:
    plan = make_plan(cost, "fsdp2", 4)
    divided = (12 + 8 + 4) / 4
    assert plan.peak == pytest.approx((divided + 4 + 8) * MILLION + 5 * 100_000)
    # three forward passes of the teacher, a forward and a backward pass of the student, its gradients, and the text encoders
    assert plan.communication["discrete"] == pytest.approx(0.75 * (3 * 4 + 2 * 4 + 4 + 4) * MILLION)


def test_lora_under_fsdp2_gathers_the_teacher_and_reduces_only_lora_gradients(cost: StepCost) -> None:
    own = MILLION // 10
    cost.numbers.update({"parameters/student": MILLION + own, "weights/student": 4 * own, "trained/student": own})
    plan = make_plan(cost, "fsdp2", 4)
    assert plan.gpu["weights: teacher"] == MILLION
    assert plan.gpu["weights: student"] == own
    assert plan.communication["discrete"] == pytest.approx(0.75 * (3 * 4 + 2 * 4.4 + 0.4 + 4) * MILLION)


def test_rollback_snapshot_is_sharded_like_the_student(cost: StepCost) -> None:
    for name, shards in {"ddp": 1, "fsdp2": 4}.items():
        plan = plan_for(cost, STRATEGIES[name], 4, rollback=True)
        assert plan.cpu == {"rollback snapshot": pytest.approx(4 * MILLION / shards)}


@pytest.mark.parametrize("name", ["fsdp2_offload", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_optimizer"])
def test_offloaded_state_is_in_cpu_memory(cost: StepCost, name: str) -> None:
    plan, plain = make_plan(cost, name, 2), make_plan(cost, name.partition("_offload")[0], 2)
    assert plan.peak < plain.peak
    assert plan.cpu["optimizer"] == plain.gpu["optimizer"]
    assert ("weights: student" in plan.cpu) == (not name.endswith("optimizer"))
    assert "weights: autoencoder" in plan.gpu


def test_zero3_buffers_are_no_larger_than_gradients(cost: StepCost) -> None:
    plan = make_plan(cost, "deepspeed_stage_3", 4)
    divided = (12 + 8 + 4 + 4) / 4  # weights, optimizer state, gradients, float32 copies of trained weights
    # Teacher and student are gathered. Gradients are in a buffer, and in a copy of it during the reduction.
    assert plan.peak == pytest.approx((divided + 4 + 8 + 8 + 4 + 4) * MILLION)
    small = replace(STRATEGIES["deepspeed_stage_3"], reduce_bucket_size=MILLION // 10, max_live_parameters=MILLION // 10)
    assert plan_for(cost, small, 4).peak == pytest.approx((divided + 4 + 8 + 3 * 0.4) * MILLION)


def test_smallest_machine_is_the_first_that_fits(cost: StepCost) -> None:
    machine = Machine(gpus=1, gpu_memory=20 * MILLION / 2**30 + 1, reserve=1)
    needed = {count: make_plan(cost, "fsdp2", count).peak for count in (1, 2, 4, 8)}
    found = smallest_gpu_count(lambda count: machine.fits(make_plan(cost, "fsdp2", count).peak))
    assert found == 4
    assert needed[2] > 20 * MILLION >= needed[4]
    assert smallest_gpu_count(lambda count: False) is None
