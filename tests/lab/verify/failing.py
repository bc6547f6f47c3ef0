"""Stands in for a worker: leaves its process id, and then ends or waits as the job says."""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
how = json.loads((folder / "config.json").read_text())["data"]["path"]
with Path(how).open("a") as pids:
    pids.write(f"{os.getpid()}\n")
if rank == 1:
    if how.endswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif how.endswith("refused"):
        (folder / "rank-1.txt").write_text("a reason of its own")
        sys.exit(1)
    elif how.endswith("ended"):
        print("Traceback ...\nOops: the last line", file=sys.stderr)
        sys.exit(3)
time.sleep(60)
