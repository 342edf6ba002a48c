"""Folders of PEFT: read beside a base, and written."""
