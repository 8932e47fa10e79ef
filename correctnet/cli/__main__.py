"""`python -m correctnet.cli`, the same as the command `correctnet`."""

import sys

from correctnet.cli import main

sys.exit(main())
