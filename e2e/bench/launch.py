"""launch.py RESULT COMMAND...: runs a command from a small process and writes what it took to the file RESULT.

The kernel counts the memory of the process that starts a program into the program's peak, and the benchmark itself becomes
larger than what it measures.
"""

import json
import os
import sys
import time


def main() -> None:
    result, *command = sys.argv[1:]
    began = time.monotonic()
    _, status, usage = os.wait4(os.posix_spawnp(command[0], command, os.environ), 0)
    taken = {"code": os.waitstatus_to_exitcode(status), "cpu": usage.ru_utime + usage.ru_stime, "wall": time.monotonic() - began,
             "rss": usage.ru_maxrss / 1024}
    with open(result, "w", encoding="ascii") as out:
        json.dump(taken, out)


if __name__ == "__main__":
    main()
