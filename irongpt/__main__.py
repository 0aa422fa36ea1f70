import sys

from irongpt.cli import main

sys.exit(main())
