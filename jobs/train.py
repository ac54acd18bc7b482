"""Train ResNet50 on breast histopathology, evaluate it on unseen patients, write a model bundle.

On a cluster:
    ray job submit --working-dir . -- python jobs/train.py \\
        --data s3://bucket/BreaKHis_v1 --output s3://bucket/runs --name first --weights imagenet
On this machine:
    python jobs/train.py --data ./BreaKHis_v1
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("train", __doc__)
