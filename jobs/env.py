"""Print what a bug report needs: versions, hardware, settings of the environment, without secrets.

On this machine:
    python jobs/env.py
Where a cluster runs its jobs:
    ray job submit --working-dir . -- python jobs/env.py
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("env", __doc__)
