"""Train and evaluate one model for each fold, and report on all of them and on the effect of a leak.

On a cluster:
    ray job submit --working-dir . -- python jobs/crossval.py \\
        --data s3://bucket/BreaKHis_v1 --output s3://bucket/runs --name study --protocol case,image
On this machine:
    python jobs/crossval.py --data ./BreaKHis_v1
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("crossval", __doc__)
