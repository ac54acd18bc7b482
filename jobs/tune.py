"""Search settings on validation patients with Ray Tune, then train with the best and test once.

On a cluster:
    ray job submit --working-dir . -- python jobs/tune.py \\
        --data s3://bucket/BreaKHis_v1 --output s3://bucket/runs --space space.yaml --trials 32
On this machine:
    python jobs/tune.py --data ./BreaKHis_v1 --space space.yaml --epochs 5 --trials 8
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("tune", __doc__)
