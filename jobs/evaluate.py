"""Score a model's held-out test part, and report metrics with intervals.

On a cluster:
    ray job submit --working-dir . -- python jobs/evaluate.py \\
        --model s3://bucket/runs/first/model --data s3://bucket/BreaKHis_v1
On this machine:
    python jobs/evaluate.py --model runs/train/model --data ./BreaKHis_v1
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("evaluate", __doc__)
