"""`python -m model_center.recipe`: the command, for launchers such as torchrun."""

from .cli import main

raise SystemExit(main())
