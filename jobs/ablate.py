"""Cross-validate recipes on the same folds, and report the paired difference of each from the first.

On a cluster:
    ray job submit --working-dir . -- python jobs/ablate.py \\
        --data s3://bucket/BreaKHis_v1 --output s3://bucket/runs --repeats 3 --arms plain steady stains few
On this machine:
    python jobs/ablate.py --data ./BreaKHis_v1 --arms plain ema_decay=0.99 ema_decay=0.99,mixup=0.2
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("ablate", __doc__)
