"""`python -m tunesmith`, as torchrun starts it too."""

import os
import sys

from tunesmith.cli.main import main

try:
    main()
except SystemExit as end:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        raise
    # gloo's threads now and then abort a process that tears itself down; all it had to write is written by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else 0)
