"""Run all jobs on synthetic images: generate, train, evaluate, report, score an archive.
Requires no data and no download.

On this machine (the same as `make demo`):
    python jobs/demo.py
On a cluster:
    ray job submit --working-dir . -- python jobs/demo.py
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("demo", __doc__)
