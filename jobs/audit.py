"""Find the faults of a data set before a training: duplicates, leaks, labels, damaged images.

On a cluster:
    ray job submit --working-dir . -- python jobs/audit.py \\
        --data s3://bucket/BreaKHis_v1 --folds s3://bucket/folds --output s3://bucket/audit
On this machine:
    python jobs/audit.py --data ./BreaKHis_v1
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("audit", __doc__)
