"""Decode plans: one token of a batch through a whole model in one C call, from an array of op records.

builder.py collects the records that parts ask for, records.py holds the structures, op.c runs them. No
architecture has C of its own: an op is one step (steps_*.h, or step.h beside the kernel whose mathematics it
is).
"""
