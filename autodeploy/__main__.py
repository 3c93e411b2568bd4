"""`python -m autodeploy` is the `autodeploy` command."""

import sys

from .cli.main import main

sys.exit(main())
