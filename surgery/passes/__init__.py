"""Passes, one file each: functions from a `Checkpoint` to a `Checkpoint`."""
