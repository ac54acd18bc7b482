"""Examine a cluster before a long job, and report what would break it. Exit code 1 for a fault.

On a cluster, with the flags of the job that is to run:
    ray job submit --working-dir . -- python jobs/doctor.py --for train \\
        --data s3://bucket/BreaKHis_v1 --output s3://bucket/runs --weights imagenet
On this machine:
    python jobs/doctor.py --for score --model runs/train/model --input ./archive --output scores
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("doctor", __doc__)
