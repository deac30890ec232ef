"""`python -m msquant`."""

from msquant.cli.app import own_process

own_process()
