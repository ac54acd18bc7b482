"""Train attention over the tiles of labelled slides, or apply it to the slides of a scored archive.

On a cluster:
    ray job submit --working-dir . -- python jobs/pool.py \\
        --scores s3://scores/2026-11 --labels s3://bucket/labels.csv --output s3://bucket/runs
On this machine:
    python jobs/pool.py --scores scores --labels labels.csv
    python jobs/pool.py --scores others --model runs/pool/model --name others
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("pool", __doc__)
