"""Score every image and slide of an archive exactly once, with evidence maps, to Parquet.

On a cluster:
    ray job submit --working-dir . -- python jobs/score.py \\
        --model s3://bucket/runs/first/model --input s3://archive/ --output s3://scores/2026-11
On this machine:
    python jobs/score.py --model runs/train/model --input ./archive --output scores
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("score", __doc__)
