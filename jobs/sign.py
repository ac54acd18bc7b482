"""Sign a model bundle with a private key.

On this machine:
    python jobs/sign.py runs/train/model --key signing.pem
    python jobs/sign.py s3://bucket/runs/first/model --key signing.pem --certificate signing-chain.pem
On a cluster whose head node has the key:
    ray job submit --working-dir . -- python jobs/sign.py s3://bucket/model --key /secrets/signing.pem
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("sign", __doc__)
