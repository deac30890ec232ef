"""`python -m msquant`."""

from msquant.cli.app import main

main()
