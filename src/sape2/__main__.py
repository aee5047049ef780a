"""`python -m sape2`, and `torchrun ... -m sape2`: the command line."""

from sape2.cli import main

raise SystemExit(main())
