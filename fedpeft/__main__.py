"""`python -m fedpeft` is the command `fedpeft`."""

from fedpeft.cli import main

raise SystemExit(main())
