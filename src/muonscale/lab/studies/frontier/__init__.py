"""Devices against time to a loss: the curve of what can be had, for each optimizer.

Steps to a loss come from a batch study; seconds of a step are measured (`step_time`) or come from
stated rates (`stated_step_time`).
"""
