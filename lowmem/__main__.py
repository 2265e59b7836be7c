"""`python -m lowmem`, for a machine where nothing is installed."""

from lowmem.cli.main import app

app(prog_name="lowmem")
