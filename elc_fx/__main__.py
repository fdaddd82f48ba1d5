"""`python -m elc_fx` is `elc-fx`."""

from elc_fx.cli import main

main()
