"""`python -m kdtrainer`."""

import sys

from kdtrainer.cli import main

sys.exit(main())
