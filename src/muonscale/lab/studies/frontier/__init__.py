"""Devices against time to a loss, for each optimizer.

Steps to a loss come from a batch study. Seconds of a step are measured (`step_time`) or computed
from stated rates (`stated_step_time`).
"""
