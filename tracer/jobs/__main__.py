"""The worker process of one job: ``python -m tracer.jobs FOLDER``."""

import sys
from pathlib import Path

from tracer.jobs.worker import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
