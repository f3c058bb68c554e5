"""Estimates of the memory and communication of a training run, from its settings alone."""

from lightning_distill.planning.machine import Machine, Plan, Strategy
from lightning_distill.planning.plan import PlanOptions, plan
from lightning_distill.planning.step import StepCost, measure_step

__all__ = ["Machine", "Plan", "PlanOptions", "StepCost", "Strategy", "measure_step", "plan"]
