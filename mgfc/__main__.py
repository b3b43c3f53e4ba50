import sys

from mgfc.cli import main

sys.exit(main())
