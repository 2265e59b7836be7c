"""Runs `python -m lowmem` on a machine that has no `lowmem` command."""

from lowmem.cli.main import app

app(prog_name="lowmem")
